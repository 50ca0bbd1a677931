// a(x), and what becomes of a sum before it is stored.
#pragma once
#include "common/dropout.h"
#include "common/gelu.cuh"
#include "hypergrid/hypergrid_cuda.h"

namespace mmk::hypergrid {

__device__ __forceinline__ float activated(float x, int activation) {
  if (activation == 1) return x < 0.0f ? 0.0f : x;
  if (activation == 2) return gelu<false>(x);
  return activation == 3 ? gelu<true>(x) : x;
}

__device__ __forceinline__ float activation_slope(float x, int activation) {
  if (activation == 1) return x > 0.0f ? 1.0f : 0.0f;
  return activation == 2 ? gelu_slope<false>(x) : gelu_slope<true>(x);
}

// Element (m, n) of the result from its sum.
template <class T>
__device__ __forceinline__ float finished(const Epilogue& e, float sum, int64_t m, int64_t n) {
  if (e.bias) sum += to_float(static_cast<const T*>(e.bias)[n]);
  if (e.activation) sum *= activation_slope(to_float(static_cast<const T*>(e.x)[m * e.x_row + n]), e.activation);
  if (e.seed) {
    const DropoutRow row = dropout_row(static_cast<uint64_t>(*e.seed), static_cast<uint64_t>(m));
    sum = dropout_bits(row, static_cast<uint32_t>(n)) >= e.threshold ? sum * e.gain : 0.0f;
  }
  return sum;
}

}  // namespace mmk::hypergrid
