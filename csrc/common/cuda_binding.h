// What the stable-ABI bindings of all CUDA families share. The same binding is compiled for CUDA tensors (namespace
// mmkernels) and, with -DMMK_EMULATOR, for CPU tensors (namespace mmkernels_emulator).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/cuda_device.h"

// MMK_REGISTER_CUDA(m) { m.impl("name", TORCH_BOX(&function)); }
#ifdef MMK_EMULATOR
#define MMK_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(mmkernels_emulator, CPU, m)
#else
#define MMK_REGISTER_CUDA(m) STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m)
#endif

namespace mmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline const char* dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

// Makes the tensor's device current for as long as it lives, and knows its stream.
#ifdef MMK_EMULATOR
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream = nullptr;
};
#else
struct __attribute__((visibility("hidden"))) OnDevice {
  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};
#endif

inline void check_launch(int code, const char* op) {
  STD_TORCH_CHECK(code == 0, op, ": the kernel was not launched: ", mmk_launch_error(code));
}

inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A tensor whose rows are read by address and stride only: the last dimension has stride 1.
inline Tensor unit_last_stride(const Tensor& t) {
  return t.dim() == 0 || t.size(-1) == 1 || t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

}  // namespace mmk
