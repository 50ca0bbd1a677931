#include "common/cuda_device.h"
#include "common/ptx.cuh"

#ifdef MMK_EMULATOR

int mmk_multiprocessors() { return mmk::emulator::multiprocessors(); }

int mmk_shared_memory() { return mmk::emulator::shared_memory_limit(); }

int mmk_capability() { return mmk::emulator::capability(); }

const char* mmk_launch_error(int) { return mmk::emulator::last_error().c_str(); }

#else

static int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

int mmk_multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

int mmk_shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

int mmk_capability() { return attribute(cudaDevAttrComputeCapabilityMajor); }

const char* mmk_launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#endif
