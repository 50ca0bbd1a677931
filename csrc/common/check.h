// Checks of tensors at the entry of CPU ops, and their description for the kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "common/cpu.h"

namespace mmk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string text(std::initializer_list<int64_t> sizes) {
  std::string s;
  for (int64_t n : sizes) s += (s.empty() ? "(" : ", ") + std::to_string(n);
  return s + ")";
}

inline std::string text_of_shape(const Tensor& t) {
  std::string s = "(";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return s + ")";
}

inline void check_dtype(const Tensor& t, const char* name, ScalarType wanted) {
  STD_TORCH_CHECK(t.is_cpu(), name, " is not on the CPU; every tensor of this call must be");
  STD_TORCH_CHECK(t.scalar_type() == wanted, name, " has dtype ", torch::headeronly::toString(t.scalar_type()),
                  "; it must be ", torch::headeronly::toString(wanted));
}

inline void check_rank(const Tensor& t, const char* name, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, name, " has shape ", text_of_shape(t), "; it must have ", rank, " dimensions");
}

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  bool equal = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t n : sizes) equal = equal && t.size(i++) == n;
  STD_TORCH_CHECK(equal, name, " has shape ", text_of_shape(t), "; it must be ", text(sizes));
}

// The group of every example: int64 (examples), contiguous, in [0, groups).
inline const int64_t* group_index(const Tensor& t, const char* name, int64_t examples, int64_t groups) {
  check_dtype(t, name, ScalarType::Long);
  check_shape(t, name, {examples});
  STD_TORCH_CHECK(t.is_contiguous(), name, " is not contiguous; it must be");
  const auto* index = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < examples; ++i)
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < groups, name, " has the number ", index[i], "; numbers must be in [0, ",
                    groups, ")");
  return index;
}

// The dtype that all floating-point arguments of a call share is the one of its first argument.
inline ScalarType check_first(const Tensor& t, const char* name, int64_t rank) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " has dtype ", torch::headeronly::toString(dtype), "; it must be float32, bfloat16 or float16");
  check_dtype(t, name, dtype);
  check_rank(t, name, rank);
  return dtype;
}

inline DType dtype_of(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float      ? DType::kFloat32
         : t.scalar_type() == ScalarType::BFloat16 ? DType::kBFloat16
                                                   : DType::kFloat16;
}

// Its dimensions are the last ones of a Strided; with `broadcast`, those of size 1 get the stride 0.
inline Strided strided(const Tensor& t, bool broadcast = false) {
  Strided s;
  s.data = static_cast<char*>(const_cast<void*>(t.const_data_ptr()));
  s.dtype = dtype_of(t);
  for (int64_t i = 0, rank = t.dim(); i < rank; ++i)
    s.stride[4 - rank + i] = broadcast && t.size(i) == 1 ? 0 : t.stride(i);
  return s;
}

inline Strided strided(const std::optional<Tensor>& t) { return t.has_value() ? strided(*t) : Strided{}; }

inline const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

// Uninitialised, of `like`'s dtype unless told, on its device. The C entry allocates at once; torch::stable's own looks
// the operator up by name first, which costs as much as a small op.
inline Tensor allocate(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                       std::optional<ScalarType> dtype = std::nullopt) {
  int64_t strides[8], size = 1;
  const int64_t rank = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(rank <= 8, "a tensor of ", rank, " dimensions; 8 are allowed");
  for (int64_t i = rank - 1; i >= 0; --i) strides[i] = size, size *= std::max<int64_t>(sizes[i], 1);
  int32_t type, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (dtype.has_value()) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes.data(), strides, type, device, index, &made));
  return Tensor(made);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Uninitialised float32 memory from torch's allocator, which accounts for it; aligned to cache lines.
class Space {
 public:
  Space() = default;
  explicit Space(int64_t floats) {
    if (floats <= 0) return;
    const int64_t stride = 1;
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &floats, &stride, aoti_torch_dtype_float32(),
                                                    aoti_torch_device_type_cpu(), 0, &made));
    tensor_ = Tensor(made);
    at_ = static_cast<float*>(tensor_->mutable_data_ptr());
  }
  float* at(int64_t i) const { return at_ + i; }

 private:
  std::optional<Tensor> tensor_;
  float* at_ = nullptr;
};

}  // namespace mmk
