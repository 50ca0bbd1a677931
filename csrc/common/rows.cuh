// Rows of V neighbouring elements a thread: four where a row has a multiple of four, so that they may come in one load
// of 8 or 16 bytes. Which thread has which elements, and so every sum, depends on the sizes alone, never on strides.
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

// Columns c to c + V - 1 of a row that lie `stride` apart; `at_once`: as by_four says, in one load.
template <class T, int V>
__device__ __forceinline__ void load_elements(float (&to)[V], const T* row, int64_t c, int64_t stride, bool at_once) {
  if (V > 1 && at_once) {
    const auto elements = *reinterpret_cast<const Elements<T, V>*>(row + c);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(elements.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(row[(c + i) * stride]);
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
  if (!p.data) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = without;
  } else if (p.is_fp32) {
    load_elements<float, V>(to, static_cast<const float*>(p.data) + example * p.example, c, p.column, p.by_four);
  } else {
    load_elements<T, V>(to, static_cast<const T*>(p.data) + example * p.example, c, p.column, p.by_four);
  }
}

template <class F>
int with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::bf16) return f(bf16{});
  if (dtype == Dtype::fp16) return f(fp16{});
  return f(float{});
}

}  // namespace mmk
