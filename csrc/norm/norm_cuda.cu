// LayerNorm with its residual addition: a block to a row, which its registers hold; memory is read and written once.
#include "common/rows.cuh"
#include "norm/norm_cuda.h"

namespace mmk::norm {
namespace {

// Threads of a block at most, and groups of V elements that each of them holds of 8192 columns. Single elements want
// the registers of half as many threads.
template <int V>
constexpr int kMostThreads = V == 1 ? 512 : 1024;
template <int V>
constexpr int kGroups = kMostColumns / kMostThreads<V> / V;

constexpr int kSumBytes = 1024 / 32 * 8;  // of shared memory: two sums a warp

template <int V>
__device__ __forceinline__ int column_of(int group) {
  return static_cast<int>(group * blockDim.x + threadIdx.x) * V;
}

template <class T>
__device__ __forceinline__ const T* row_of(const Rows& m, int64_t example, int64_t t) {
  return static_cast<const T*>(m.data) + example * m.example + t * m.row;
}

__device__ __forceinline__ int64_t parameter_row(const Norm& n, int64_t example) {
  return n.index ? n.index[example] : example;
}

// The sums of a and b over the block, in every thread.
__device__ __forceinline__ void sum_over_block(float& a, float& b) {
  auto* sums = reinterpret_cast<float2*>(shared_memory());
  for (int bits = 16; bits; bits /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, bits);
    b += __shfl_xor_sync(0xffffffffu, b, bits);
  }
  const int warps = blockDim.x / 32;
  __syncthreads();  // everybody has read the sums before
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = make_float2(a, b);
  __syncthreads();
  a = b = 0.0f;
  for (int w = 0; w < warps; ++w) {
    a += sums[w].x;
    b += sums[w].y;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kMostThreads<V>) forward_kernel(const Norm n) {
  const int64_t r = blockIdx.x, example = r / n.length, t = r % n.length, own = parameter_row(n, example);
  const Rows& x = n.x[t < n.first ? 0 : 1];
  const T* row = row_of<T>(x, example, t < n.first ? t : t - n.first);
  const float scale = 1.0f / static_cast<float>(n.columns);
  float s[kGroups<V>][V], total = 0.0f, squares = 0.0f, unused = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups<V>; ++g) {
    const int c = column_of<V>(g);
    if (c >= n.columns) continue;
    load_elements<T, V>(s[g], row, c, x.column, x.by_four);
    if (n.residual.data) {
      float branch[V], bias[V];
      load_elements<T, V>(branch, row_of<T>(n.residual, example, t), c, n.residual.column, n.residual.by_four);
      load_parameter<T, V>(bias, n.residual_bias, example, c, 0.0f);
#pragma unroll
      for (int i = 0; i < V; ++i) s[g][i] = to_float(from_float<T>(s[g][i] + (branch[i] + bias[i])));
      store_elements<T, V>(static_cast<T*>(n.sum) + r * n.columns, c, s[g]);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total += s[g][i];
  }
  sum_over_block(total, unused);
  const float mean = total * scale;
#pragma unroll
  for (int g = 0; g < kGroups<V>; ++g) {
    if (column_of<V>(g) >= n.columns) continue;
#pragma unroll
    for (int i = 0; i < V; ++i) squares += (s[g][i] - mean) * (s[g][i] - mean);
  }
  sum_over_block(squares, unused);
  const float rstd = 1.0f / sqrtf(squares * scale + n.eps);
  if (threadIdx.x == 0) {
    n.mean[r] = mean;
    n.rstd[r] = rstd;
  }
#pragma unroll
  for (int g = 0; g < kGroups<V>; ++g) {
    const int c = column_of<V>(g);
    if (c >= n.columns) continue;
    float gain[V], bias[V];
    load_parameter<T, V>(gain, n.gain, own, c, 1.0f);
    load_parameter<T, V>(bias, n.bias, own, c, 0.0f);
#pragma unroll
    for (int i = 0; i < V; ++i) s[g][i] = (s[g][i] - mean) * rstd * gain[i] + bias[i];
    store_elements<T, V>(static_cast<T*>(n.out) + r * n.columns, c, s[g]);
  }
}

template <int V>
__device__ __forceinline__ void store_sums(float* sums, int64_t part, int columns, const float (&own)[kGroups<V>][V]) {
  if (!sums) return;
#pragma unroll
  for (int g = 0; g < kGroups<V>; ++g) {
    const int c = column_of<V>(g);
    if (c < columns) store_elements<float, V>(sums + part * columns, c, own[g]);
  }
}

// One part of the rows: ds = dsum + rstd (g - avg(g) - xhat avg(g xhat)) with g = dout gain.
template <class T, int V>
__global__ void __launch_bounds__(kMostThreads<V>) backward_kernel(const Norm n) {
  const int64_t part = blockIdx.x, group = part / n.parts;
  const int64_t begin = group * n.group_rows + part % n.parts * n.size;
  const int64_t end = min(begin + n.size, (group + 1) * n.group_rows);
  const float scale = 1.0f / static_cast<float>(n.columns);
  // dout gain: every thread reads its own elements alone. In registers they would be too many.
  float* gradient = reinterpret_cast<float*>(shared_memory() + kSumBytes);
  float dgain[kGroups<V>][V] = {}, dbias[kGroups<V>][V] = {}, dresidual_bias[kGroups<V>][V] = {};
  for (int64_t r = begin; r < end; ++r) {
    const int64_t example = r / n.length, t = r % n.length, own_row = parameter_row(n, example);
    const Rows& x = n.x[t < n.first ? 0 : 1];
    const T* row = row_of<T>(x, example, t < n.first ? t : t - n.first);
    const float mean = n.mean[r], rstd = n.rstd[r];
    float normed[kGroups<V>][V], first = 0.0f, second = 0.0f;
#pragma unroll
    for (int g = 0; g < kGroups<V>; ++g) {
      const int c = column_of<V>(g);
      if (c >= n.columns) continue;
      float gain[V], incoming[V];
      load_elements<T, V>(normed[g], row, c, x.column, x.by_four);
      load_elements<T, V>(incoming, row_of<T>(n.dout, example, t), c, n.dout.column, n.dout.by_four);
      load_parameter<T, V>(gain, n.gain, own_row, c, 1.0f);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        normed[g][i] = (normed[g][i] - mean) * rstd;
        gain[i] = product(incoming[i], gain[i]);  // minus its own average it must be able to give 0
        first += gain[i];
        second += gain[i] * normed[g][i];
        dgain[g][i] += incoming[i] * normed[g][i];
        dbias[g][i] += incoming[i];
      }
      store_elements<float, V>(gradient, c, gain);
    }
    sum_over_block(first, second);
    if (!n.dx && !n.sums[2]) continue;
#pragma unroll
    for (int g = 0; g < kGroups<V>; ++g) {
      const int c = column_of<V>(g);
      if (c >= n.columns) continue;
      float ds[V], own[V];
      load_elements<float, V>(own, gradient, c, 1, true);
      if (n.dsum.data) load_elements<T, V>(ds, row_of<T>(n.dsum, example, t), c, n.dsum.column, n.dsum.by_four);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        own[i] = (own[i] - first * scale - normed[g][i] * (second * scale)) * rstd;
        ds[i] = n.dsum.data ? ds[i] + own[i] : own[i];
        dresidual_bias[g][i] += ds[i];
      }
      if (n.dx) store_elements<T, V>(static_cast<T*>(n.dx) + r * n.columns, c, ds);
    }
  }
  store_sums<V>(n.sums[0], part, n.columns, dgain);
  store_sums<V>(n.sums[1], part, n.columns, dbias);
  store_sums<V>(n.sums[2], part, n.columns, dresidual_bias);
}

// As few threads as hold a row, but no more than two groups each where there are enough of them.
template <int V>
dim3 threads_for(int columns) {
  const int groups = (columns + V - 1) / V, threads = (groups + 1) / 2;
  return dim3(static_cast<unsigned>(std::clamp((threads + 31) / 32 * 32, 32, kMostThreads<V>)));
}

template <class T, int V>
int start(bool is_forward, const Norm& n, int64_t blocks, void* stream) {
  return launch(is_forward ? forward_kernel<T, V> : backward_kernel<T, V>, dim3(static_cast<unsigned>(blocks)),
                threads_for<V>(n.columns), kSumBytes + (is_forward ? 0 : n.columns * 4), stream, n);
}

int start(Dtype dtype, bool is_forward, const Norm& n, int64_t blocks, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return n.columns % 4 == 0 ? start<T, 4>(is_forward, n, blocks, stream) : start<T, 1>(is_forward, n, blocks, stream);
  });
}

}  // namespace
}  // namespace mmk::norm

int mmk_norm_forward(mmk::Dtype dtype, const mmk::norm::Norm* norm, void* stream) {
  return mmk::norm::start(dtype, true, *norm, norm->rows, stream);
}

int mmk_norm_backward(mmk::Dtype dtype, const mmk::norm::Norm* norm, int64_t parts, void* stream) {
  return mmk::norm::start(dtype, false, *norm, parts, stream);
}
