// gelu(x + bias), element by element; the formulas are those of gelu_simd.cpp.
#include <cmath>

#include "activation/gelu_cuda.h"
#include "common/rows.cuh"

namespace mmk::activation {
namespace {

constexpr int kThreads = 128;
constexpr float kLinear = 1.5957691216057308f, kCubic = kLinear * 0.044715f;  // of 2 sqrt(2/pi) (y + 0.044715 y^3)

// The normal distribution at y, where e = exp(-y^2/2).
__device__ __forceinline__ float probability(float y, float e) {
  const float u = 1.0f / (fabsf(y) * 0.4f + 1.0f);
  float w = u * 0.03210155f - 0.17619535f;
  w = w * u + 0.38083178f;
  w = w * u - 0.37203285f;
  w = w * u + 0.117794f;
  w = w * u - 0.02591531f;
  w = w * u + 0.09101176f;
  w = w * u + 0.13320881f;
  w = w * u + 0.15961935f;
  w = w * u + 0.1595763f;
  const float tail = e * (u * w);
  return y > 0.0f ? 1.0f - tail : tail;
}

template <bool kTanh>
__device__ __forceinline__ float value(float y) {
  if constexpr (kTanh) return y / (1.0f + expf(-y * (y * y * kCubic + kLinear)));
  return y * probability(y, expf(y * y * -0.5f));
}

template <bool kTanh>
__device__ __forceinline__ float slope(float y) {
  const float square = y * y;
  if constexpr (kTanh) {
    const float e = expf(-y * (square * kCubic + kLinear)), sigmoid = 1.0f / (1.0f + e);
    const float near = (e * sigmoid) * (y * sigmoid) * (square * (3.0f * kCubic) + kLinear);
    return sigmoid + (square > 100.0f ? y * 0.0f : near);
  }
  const float e = expf(square * -0.5f);
  return probability(y, e) + y * (e * 0.3989422804f);
}

// Blocks of columns in a row.
template <int V>
__host__ __device__ __forceinline__ int64_t column_blocks(const Gelu& g) {
  return (g.columns + kThreads * V - 1) / (kThreads * V);
}

template <class T, int V, bool kTanh>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Gelu g) {
  const int64_t blocks = column_blocks<V>(g), r = blockIdx.x / blocks;
  const int64_t c = (blockIdx.x % blocks * kThreads + threadIdx.x) * V;
  if (c >= g.columns) return;
  float y[V], bias[V];
  load_elements<T, V>(y, static_cast<const T*>(g.x.data) + r * g.x.row, c, g.x.column, g.x.by_four);
  load_parameter<T, V>(bias, g.bias, 0, c, 0.0f);
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] = value<kTanh>(y[i] + bias[i]);
  store_elements<T, V>(static_cast<T*>(g.out) + r * g.columns, c, y);
}

template <class T, int V, bool kTanh>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Gelu g) {
  const int64_t blocks = column_blocks<V>(g), part = blockIdx.x / blocks;
  const int64_t c = (blockIdx.x % blocks * kThreads + threadIdx.x) * V;
  if (c >= g.columns) return;
  const int64_t begin = part * g.size, end = min(begin + g.size, g.rows);
  float bias[V], sums[V] = {};
  load_parameter<T, V>(bias, g.bias, 0, c, 0.0f);
#pragma unroll 2
  for (int64_t r = begin; r < end; ++r) {
    float y[V], d[V];
    load_elements<T, V>(y, static_cast<const T*>(g.x.data) + r * g.x.row, c, g.x.column, g.x.by_four);
    load_elements<T, V>(d, static_cast<const T*>(g.dout.data) + r * g.dout.row, c, g.dout.column, g.dout.by_four);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      d[i] *= slope<kTanh>(y[i] + bias[i]);
      sums[i] += d[i];
    }
    if (g.out) store_elements<T, V>(static_cast<T*>(g.out) + r * g.columns, c, d);
  }
  if (g.sums) store_elements<float, V>(g.sums + part * g.columns, c, sums);
}

template <class T, int V>
int start(bool is_forward, const Gelu& g, int64_t parts, void* stream) {
  const dim3 grid(static_cast<unsigned>(parts * column_blocks<V>(g)));
  auto kernel = is_forward ? (g.tanh ? forward_kernel<T, V, true> : forward_kernel<T, V, false>)
                           : (g.tanh ? backward_kernel<T, V, true> : backward_kernel<T, V, false>);
  return launch(kernel, grid, dim3(kThreads), 0, stream, g);
}

int start(Dtype dtype, bool is_forward, const Gelu& g, int64_t parts, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return g.columns % 4 == 0 ? start<T, 4>(is_forward, g, parts, stream) : start<T, 1>(is_forward, g, parts, stream);
  });
}

}  // namespace
}  // namespace mmk::activation

int mmk_gelu_forward(mmk::Dtype dtype, const mmk::activation::Gelu* gelu, void* stream) {
  return mmk::activation::start(dtype, true, *gelu, gelu->rows, stream);
}

int mmk_gelu_backward(mmk::Dtype dtype, const mmk::activation::Gelu* gelu, int64_t parts, void* stream) {
  return mmk::activation::start(dtype, false, *gelu, parts, stream);
}
