// Rows of V neighbouring elements a thread: one load of 8 or 16 bytes for V = 4, any stride for V = 1.
#pragma once
#include "common/ptx.cuh"
#include "common/rows_cuda.h"

namespace mmk {

template <class T, int V>
struct alignas(sizeof(T) * V) Elements {
  T at[V];
};

// a b, rounded: never part of a fused multiply-add.
__device__ __forceinline__ float product(float a, float b) {
#ifdef MMK_EMULATOR
  return a * b;
#else
  return __fmul_rn(a, b);
#endif
}

// Columns c to c + V - 1 of a row that lie `stride` apart; V = 4 wants stride 1 and aligned rows.
template <class T, int V>
__device__ __forceinline__ void load_elements(float (&to)[V], const T* row, int64_t c, int64_t stride) {
  if constexpr (V == 1) {
    to[0] = to_float(row[c * stride]);
  } else {
    const auto elements = *reinterpret_cast<const Elements<T, V>*>(row + c);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(elements.at[i]);
  }
}

// The same of a contiguous result.
template <class T, int V>
__device__ __forceinline__ void store_elements(T* row, int64_t c, const float (&from)[V]) {
  Elements<T, V> elements;
#pragma unroll
  for (int i = 0; i < V; ++i) elements.at[i] = from_float<T>(from[i]);
  *reinterpret_cast<Elements<T, V>*>(row + c) = elements;
}

template <class T, int V>
__device__ __forceinline__ void load_parameter(float (&to)[V], const DeviceParameter& p, int64_t example, int64_t c,
                                               float without) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t at = example * p.example + (c + i) * p.column;
    to[i] = !p.data     ? without
            : p.is_fp32 ? static_cast<const float*>(p.data)[at]
                        : to_float(static_cast<const T*>(p.data)[at]);
  }
}

template <class F>
int with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::bf16) return f(bf16{});
  if (dtype == Dtype::fp16) return f(fp16{});
  return f(float{});
}

}  // namespace mmk
