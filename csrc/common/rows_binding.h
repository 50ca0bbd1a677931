// Checks and descriptions of tensors that bindings of row kernels share.
#pragma once
#include <initializer_list>
#include <string>

#include "common/cuda_binding.h"
#include "common/rows_cuda.h"

namespace mmk {

inline std::string shape_text(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i == 0 ? "" : ", ") + std::to_string(sizes[i]);
  return s + ")";
}

inline Dtype row_dtype(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " has dtype ", dtype_name(type), "; it must be Float, BFloat16 or Half");
  return type == ScalarType::Float ? Dtype::fp32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::fp16;
}

inline void check_rows(const Tensor& t, const char* name, const Tensor& like, ScalarType type,
                       torch::headeronly::IntHeaderOnlyArrayRef shape) {
  STD_TORCH_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), name,
                  " is on another device than the rows; it must be on the same");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has dtype ", dtype_name(t.scalar_type()), "; it must be ",
                  dtype_name(type));
  bool equal = t.dim() == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; equal && i < t.dim(); ++i) equal = t.size(i) == shape[i];
  STD_TORCH_CHECK(equal, name, " has shape ", shape_text(t.sizes()), "; it must be ", shape_text(shape));
}

// Can `count` neighbouring elements of every row be read by one load?
inline bool by_elements(const Tensor& t, int64_t count) {
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  if (t.dim() == 0 || t.size(-1) % count != 0 || t.stride(-1) != 1) return false;
  if (reinterpret_cast<uint64_t>(t.const_data_ptr()) % static_cast<uint64_t>(count * size) != 0) return false;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    if (t.size(i) > 1 && t.stride(i) % count != 0) return false;
  return true;
}
inline bool by_four(const Tensor& t) { return by_elements(t, 4); }

// (C) or, where `examples` is not negative, also (examples, C); of the rows' dtype or float32.
inline DeviceParameter row_parameter(const std::optional<Tensor>& t, const char* name, const Tensor& like,
                                     int64_t columns, int64_t examples) {
  DeviceParameter p;
  if (!t) return p;
  p.is_fp32 = t->scalar_type() == ScalarType::Float;
  const ScalarType type = p.is_fp32 ? ScalarType::Float : like.scalar_type();
  if (examples >= 0 && t->dim() == 2) {
    check_rows(*t, name, like, type, {examples, columns});
    p.example = t->stride(0);
  } else {
    check_rows(*t, name, like, type, {columns});
  }
  p.data = t->const_data_ptr();
  p.column = t->stride(-1);
  p.by_four = by_four(*t);
  return p;
}

// The row of every example: int64 (examples), contiguous. Its numbers are on the device; nobody looks at them here.
inline const int64_t* row_index(const Tensor& t, const char* name, const Tensor& like, int64_t examples) {
  check_rows(t, name, like, ScalarType::Long, {examples});
  STD_TORCH_CHECK(t.is_contiguous(), name, " is not contiguous; it must be");
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline void check_blocks(int64_t blocks, const char* op) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op, ": the problem needs ", blocks,
                  " thread blocks; a launch has at most 2**31 - 1");
}

}  // namespace mmk
