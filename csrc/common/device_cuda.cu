#include "common/cuda_device.h"
#include "common/ptx.cuh"

#ifdef MMK_EMULATOR

int mmk_multiprocessors() { return mmk::emulator::multiprocessors(); }

const char* mmk_launch_error(int) { return mmk::emulator::last_error().c_str(); }

#else

int mmk_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

const char* mmk_launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

#endif
