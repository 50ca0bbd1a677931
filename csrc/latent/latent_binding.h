// What the bindings of the latent family's CUDA kernels share.
#pragma once
#include "common/cuda_binding.h"
#include "latent/latent_cuda.h"

namespace mmk::latent {

using OptionalTensor = std::optional<Tensor>;

inline void check_like(const Tensor& t, const char* name, const Tensor& first, ScalarType type, int64_t rank) {
  STD_TORCH_CHECK(t.dim() == rank, name, " has ", t.dim(), " dimensions; it must have ", rank);
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has dtype ", dtype_name(t.scalar_type()), "; it must be ",
                  dtype_name(type));
  STD_TORCH_CHECK(t.is_cpu() == first.is_cpu() && t.is_cuda() == first.is_cuda() &&
                      t.get_device_index() == first.get_device_index(),
                  name, " is not on the device of the others");
}

inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
  STD_TORCH_CHECK(t.size(dim) == size, name, " has size ", t.size(dim), " in dimension ", dim, "; it must be ", size);
}

// The argument whose dtype and device the others share.
inline void check_first(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " has dtype ", dtype_name(type), "; it must be Float, BFloat16 or Half");
  check_like(t, name, t, type, 3);
}

inline Type type_of(ScalarType type) {
  return type == ScalarType::Float ? Type::float32 : type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float16;
}

inline Strided strided(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

// The rows of q or dout as the kernels read them: as they are where they are aligned, of the problem's type and in the
// kernels' channel order, otherwise a copy, which `keep` holds.
inline QueryRows aligned_rows(const Problem& p, const Tensor& t, ScalarType type, Tensor& keep, void* stream) {
  const int64_t vector = type == ScalarType::Float ? 4 : 8, width = p.content + p.position;
  auto whole = [&](int64_t stride) { return stride % vector == 0; };
  QueryRows rows{t.const_data_ptr(), t.stride(0), t.stride(1)};
  const bool direct = t.scalar_type() == type && p.position == 0 && t.stride(2) == 1 && whole(width) &&
                      whole(t.stride(0)) && whole(t.stride(1)) && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  if (!direct) {
    const int64_t pitch = (width + vector - 1) / vector * vector;
    keep = empty(t, {t.size(0), t.size(1), pitch}, type);
    const Strided source = strided(t);
    check_launch(
        mmk_latent_pack(&p, &source, t.scalar_type() != type, t.size(0), keep.mutable_data_ptr(), pitch, stream),
        "latent");
    rows = {keep.const_data_ptr(), t.size(1) * pitch, pitch};
  }
  if (t.size(0) == 1) rows.batch = 0;
  return rows;
}

inline float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace mmk::latent
