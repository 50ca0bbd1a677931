// AdapterFusion's attention: a block to a row, a thread to 16 bytes of its columns. Outputs of adapters come kChunk at
// a time and are read once: their softmax is kept up as they come, and in the backward so are the sums of which the
// query's gradient is the difference. Rows of more columns than a block holds (kHeld is false) are read twice.
#include "adapter/fusion_cuda.h"
#include "common/dropout.h"
#include "common/rows.cuh"

namespace mmk::adapter {
namespace {

constexpr int kMostThreads = 512;
constexpr int kChunk = 4;
constexpr int kTurn = kMostThreads / 32 * kChunk;  // floats of shared memory for the sums of a chunk
constexpr float kInfinity = __builtin_inff();

template <class T>
__device__ __forceinline__ const T* row_of(const FusedRows& m, int64_t example, int64_t t) {
  return static_cast<const T*>(m.data) + example * m.example + t * m.row;
}

// As they are in memory: in registers they shall not take more.
template <class T, int V>
__device__ __forceinline__ Elements<T, V> load_output(const Fusion& f, const T* outputs, int a, int c) {
  return *reinterpret_cast<const Elements<T, V>*>(outputs + a * f.outputs.adapter + c);
}

// From here on its conversions are made again: carried from the scores to the sums they would take twice its registers.
template <class T, int V>
__device__ __forceinline__ void stay_raw(Elements<T, V>& u) {
#ifndef MMK_EMULATOR
  if constexpr (sizeof(u) == 16 && sizeof(T) < 4) {
    uint4& words = reinterpret_cast<uint4&>(u);
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
  }
#endif
}

template <class T, int V>
__device__ __forceinline__ float dot(const float (&x)[V], const Elements<T, V>& u) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < V; ++i) sum += x[i] * to_float(u.at[i]);
  return sum;
}

template <class T, int V>
__device__ __forceinline__ void add(float (&y)[V], float factor, const Elements<T, V>& u) {
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] += factor * to_float(u.at[i]);
}

// x . outputs of a chunk of adapters, over the block, in every thread; zero beyond the last adapter. `held`: what has
// been loaded. `turn` alternates between chunks: nobody waits for those who still read the sums of the chunk before.
template <class T, int V, bool kHeld>
__device__ __forceinline__ void dots_of_chunk(float (&dots)[kChunk], Elements<T, V> (&held)[kChunk],
                                              const float (&x)[V], const T* x_row, const Fusion& f, const T* outputs,
                                              int first) {
  const int own = static_cast<int>(threadIdx.x) * V;
#pragma unroll
  for (int k = 0; k < kChunk; ++k) dots[k] = 0.0f;
  if constexpr (kHeld) {
    if (own < f.channels) {
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (first + k < f.adapters) held[k] = load_output<T, V>(f, outputs, first + k, own);
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (first + k < f.adapters) dots[k] = dot(x, held[k]);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) stay_raw(held[k]);
    }
  } else {
    for (int c = own; c < f.channels; c += kMostThreads * V) {
      float part[V];
      load_elements<T, V>(part, x_row, c, 1, true);
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (first + k < f.adapters) dots[k] += dot(part, load_output<T, V>(f, outputs, first + k, c));
    }
  }
  // By halves: a lane gives half of its sums away and gets those of the other half.
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int bit = 16;
#pragma unroll
  for (int count = kChunk / 2; count; count /= 2, bit /= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float mine = lane & bit ? dots[i + count] : dots[i], other = lane & bit ? dots[i] : dots[i + count];
      dots[i] = mine + __shfl_xor_sync(0xffffffffu, other, bit);
    }
  }
#pragma unroll
  for (; bit; bit /= 2) dots[0] += __shfl_xor_sync(0xffffffffu, dots[0], bit);
  float* sums = reinterpret_cast<float*>(shared_memory()) + first / kChunk % 2 * kTurn;
  if (lane % (32 / kChunk) == 0) sums[threadIdx.x / 32 * kChunk + lane / (32 / kChunk)] = dots[0];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kChunk; ++k) dots[k] = sums[k];
  for (int w = 1; w < warps; ++w) {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) dots[k] += sums[w * kChunk + k];
  }
}

// Which scores of a row are not dropped, for 32 adapters at a time: each lane looks at one.
struct Kept {
  DropoutRow words;
  unsigned bits = ~0u;

  __device__ __forceinline__ Kept(const Fusion& f, int64_t row) {
    if (f.seed) words = dropout_row(static_cast<uint64_t>(*f.seed), static_cast<uint64_t>(row));
  }
  // Of the chunk that begins at `first`.
  __device__ __forceinline__ unsigned chunk(const Fusion& f, int first) {
    if (f.seed && first % 32 == 0)
      bits = __ballot_sync(0xffffffffu, dropout_bits(words, first + threadIdx.x % 32) >= f.threshold);
    return bits >> first % 32;
  }
};

__device__ __forceinline__ bool is_mine(int a) { return threadIdx.x == static_cast<unsigned>(a) % blockDim.x; }

template <class T, int V, bool kHeld>
__global__ void __launch_bounds__(kMostThreads) fusion_forward_kernel(const Fusion f) {
  const int64_t row = blockIdx.x, example = row / f.length, t = row % f.length;
  const T *query = row_of<T>(f.query, example, t), *outputs = row_of<T>(f.outputs, example, t);
  const int own = static_cast<int>(threadIdx.x) * V;
  const bool inside = own < f.channels;
  float* weights = f.weights + row * f.adapters;
  T* out = static_cast<T*>(f.out) + row * f.channels;
  Kept kept(f, row);
  const float offset = f.seed && f.offset.data ? to_float(*row_of<T>(f.offset, example, t)) : 0.0f;
  float q[V], y[V] = {}, most = -kInfinity, total = 0.0f;
  if (kHeld && inside) load_elements<T, V>(q, query, own, 1, true);
#pragma unroll 1
  for (int first = 0; first < f.adapters; first += kChunk) {
    float scores[kChunk];
    Elements<T, V> u[kChunk];
    dots_of_chunk<T, V, kHeld>(scores, u, q, query, f, outputs, first);
    const unsigned bits = kept.chunk(f, first);
    float top = most;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (first + k >= f.adapters) continue;
      if (f.seed) scores[k] = bits >> k & 1 ? (scores[k] + offset) * f.gain : 0.0f;
      scores[k] *= f.scale;
      if (is_mine(first + k)) weights[first + k] = scores[k];
      top = fmaxf(top, scores[k]);
    }
    const float shift = top == -kInfinity ? 0.0f : top, shrunk = expf(most - shift);
    total *= shrunk;
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] *= shrunk;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (first + k >= f.adapters) continue;
      const float p = expf(scores[k] - shift);
      total += p;
      if (kHeld && inside) add(y, p, u[k]);
    }
    most = top;
  }
  // What each thread has written itself.
  for (int a = threadIdx.x; a < f.adapters; a += blockDim.x)
    weights[a] = expf(weights[a] - (most == -kInfinity ? 0.0f : most)) / total;
  if constexpr (kHeld) {
    if (!inside) return;
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] /= total;
    store_elements<T, V>(out, own, y);
  } else {
    __syncthreads();
    for (int c = own; c < f.channels; c += kMostThreads * V) {
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = 0.0f;
      for (int a = 0; a < f.adapters; ++a) add(y, weights[a], load_output<T, V>(f, outputs, a, c));
      store_elements<T, V>(out, c, y);
    }
  }
}

// With dp_a = dout . u_a and kept_a (0 where the score is dropped): ds_a = scale kept_a p_a (dp_a - sum p dp),
// dquery = sum ds_a u_a, du_a = p_a dout + ds_a query, doffset = sum ds_a. While the outputs come sum p dp is not
// known: dp is counted from what the first chunk gives for it, and sum kept p dp u and sum kept p u are added up.
template <class T, int V, bool kHeld>
__global__ void __launch_bounds__(kMostThreads) fusion_backward_kernel(const Fusion f) {
  const int64_t row = blockIdx.x, example = row / f.length, t = row % f.length;
  const T *query = row_of<T>(f.query, example, t), *outputs = row_of<T>(f.outputs, example, t);
  const T* dout = row_of<T>(f.dout, example, t);
  const int own = static_cast<int>(threadIdx.x) * V;
  const bool inside = own < f.channels;
  const float* weights = f.weights + row * f.adapters;
  T *dquery = static_cast<T*>(f.dquery) + row * f.channels, *doutputs = static_cast<T*>(f.doutputs);
  doutputs += row * f.adapters * f.channels;
  float* ds = reinterpret_cast<float*>(shared_memory()) + 2 * kTurn;  // first dp
  float* shares = ds + f.adapters;                                    // kept p
  Kept kept(f, row);
  float d[V], summed[V] = {}, shared[V] = {}, reference = 0.0f, mean = 0.0f, sum = 0.0f, share = 0.0f;
  if (kHeld && inside) load_elements<T, V>(d, dout, own, 1, true);
#pragma unroll 1
  for (int first = 0; first < f.adapters; first += kChunk) {
    float dp[kChunk], p[kChunk];
    Elements<T, V> u[kChunk];
#pragma unroll
    for (int k = 0; k < kChunk; ++k) p[k] = first + k < f.adapters ? weights[first + k] : 0.0f;
    dots_of_chunk<T, V, kHeld>(dp, u, d, dout, f, outputs, first);
    const unsigned bits = kept.chunk(f, first);
    if (first == 0) {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) reference += p[k] * dp[k];
    }
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (first + k >= f.adapters) continue;
      dp[k] -= reference;
      mean += p[k] * dp[k];
      if (f.seed) p[k] *= bits >> k & 1 ? f.gain : 0.0f;
      if (is_mine(first + k)) ds[first + k] = dp[k], shares[first + k] = p[k];
      dp[k] *= p[k];
      sum += dp[k];
      share += p[k];
      if (!kHeld || !inside) continue;
      add(summed, dp[k], u[k]);
      add(shared, p[k], u[k]);
    }
  }
  for (int a = threadIdx.x; a < f.adapters; a += blockDim.x) ds[a] = f.scale * shares[a] * (ds[a] - mean);
  if (f.doffset && threadIdx.x == 0) static_cast<T*>(f.doffset)[row] = from_float<T>(f.scale * (sum - mean * share));
  if constexpr (kHeld) {
    if (f.dquery && inside) {
#pragma unroll
      for (int i = 0; i < V; ++i) summed[i] = f.scale * (summed[i] - mean * shared[i]);
      store_elements<T, V>(dquery, own, summed);
    }
    if (!f.doutputs) return;
  }
  __syncthreads();
  for (int c = own; c < f.channels; c += kMostThreads * V) {
    float q[V];
    if (!kHeld) load_elements<T, V>(d, dout, c, 1, true);
    if (f.doutputs) load_elements<T, V>(q, query, c, 1, true);
#pragma unroll 1
    for (int a = 0; a < f.adapters; ++a) {
      const float of_score = ds[a];
      if (!kHeld && f.dquery) add(summed, of_score, load_output<T, V>(f, outputs, a, c));
      if (!f.doutputs) continue;
      const float p = weights[a];
      float du[V];
#pragma unroll
      for (int i = 0; i < V; ++i) du[i] = p * d[i] + of_score * q[i];
      store_elements<T, V>(doutputs + static_cast<int64_t>(a) * f.channels, c, du);
    }
    if (kHeld || !f.dquery) continue;
    store_elements<T, V>(dquery, c, summed);
#pragma unroll
    for (int i = 0; i < V; ++i) summed[i] = 0.0f;
  }
}

template <class T, int V>
int start(bool is_forward, const Fusion& f, void* stream) {
  const int pieces = (f.channels + V - 1) / V;
  const bool held = pieces <= kMostThreads;
  const auto kernel = is_forward ? (held ? fusion_forward_kernel<T, V, true> : fusion_forward_kernel<T, V, false>)
                                 : (held ? fusion_backward_kernel<T, V, true> : fusion_backward_kernel<T, V, false>);
  const int threads = held ? (pieces + 31) / 32 * 32 : kMostThreads;
  const size_t bytes = sizeof(float) * (2 * kTurn + (is_forward ? 0 : 2 * f.adapters));
  return launch(kernel, dim3(static_cast<unsigned>(f.rows)), dim3(static_cast<unsigned>(threads)), bytes, stream, f);
}

int start(Dtype dtype, bool is_forward, const Fusion& f, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kVector = 16 / sizeof(T);
    return f.channels % kVector == 0 ? start<T, kVector>(is_forward, f, stream) : start<T, 1>(is_forward, f, stream);
  });
}

}  // namespace
}  // namespace mmk::adapter

int mmk_adapter_fusion_forward(mmk::Dtype dtype, const mmk::adapter::Fusion* fusion, void* stream) {
  return mmk::adapter::start(dtype, true, *fusion, stream);
}

int mmk_adapter_fusion_backward(mmk::Dtype dtype, const mmk::adapter::Fusion* fusion, void* stream) {
  return mmk::adapter::start(dtype, false, *fusion, stream);
}
