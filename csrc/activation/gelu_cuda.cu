// gelu(x + bias), element by element; the formulas are those of gelu_simd.cpp.
#include "activation/gelu_cuda.h"
#include "common/gelu.cuh"
#include "common/rows.cuh"

namespace mmk::activation {
namespace {

constexpr int kThreads = 128;

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
  for (int i = 0; i < V; ++i) y[i] = gelu<kTanh>(y[i] + bias[i]);
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
      d[i] *= gelu_slope<kTanh>(y[i] + bias[i]);
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
