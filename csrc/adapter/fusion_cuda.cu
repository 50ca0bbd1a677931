// AdapterFusion's attention: a block to a row, a thread to kPieces times 16 bytes of its columns. Outputs of adapters
// come kChunk at a time and are read once: their softmax is kept up as they come, and in the backward so are the sums
// of which the query's gradient is the difference. Rows of more columns than a block holds (kHeld is false) are read
// twice.
#include <cstring>
#include <type_traits>

#include "adapter/fusion_cuda.h"
#include "common/dropout.h"
#include "common/rows.cuh"

namespace mmk::adapter {
namespace {

constexpr int kMostThreads = 256;
constexpr int kPieces = 4;
constexpr int kChunk = 2;
constexpr int kTurn = kMostThreads / 32 * kChunk;  // floats of shared memory for the sums of a chunk
constexpr float kInfinity = __builtin_inff();

// As they are in memory: in registers they shall not take more.
template <class T, int V>
using Piece = Elements<T, V>;

template <class T>
__device__ __forceinline__ const T* row_of(const FusedRows& m, int64_t example, int64_t t) {
  return static_cast<const T*>(m.data) + example * m.example + t * m.row;
}

template <class T, int V>
__device__ __forceinline__ Piece<T, V> load_piece(const T* at) {
  return *reinterpret_cast<const Piece<T, V>*>(at);
}

// The first column of a thread's piece; pieces beyond the row's end are not touched.
template <int V>
__device__ __forceinline__ int column_of(int piece) {
  return static_cast<int>(piece * blockDim.x + threadIdx.x) * V;
}

// From here on its conversions are made again: carried from the scores to the sums they would take twice its registers.
template <class T, int V>
__device__ __forceinline__ void stay_raw(Piece<T, V>& u) {
#ifndef MMK_EMULATOR
  if constexpr (sizeof(u) == 16 && sizeof(T) < 4) {
    uint4 words;
    memcpy(&words, &u, sizeof(u));
    asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    memcpy(&u, &words, sizeof(u));
  }
#endif
}

template <class T, int V>
__device__ __forceinline__ void widen(float (&to)[V], const Piece<T, V>& u) {
  if constexpr (std::is_same_v<T, bf16> && V % 2 == 0) {  // an instruction each; element by element they take two
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      uint32_t both;
      memcpy(&both, &u.at[i], sizeof(both));
      to[i] = __uint_as_float(both << 16);
      to[i + 1] = __uint_as_float(both & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_float(u.at[i]);
  }
}

template <class T, int V>
__device__ __forceinline__ void add_dot(float& sum, const float (&x)[V], const Piece<T, V>& u) {
  float wide[V];
  widen(wide, u);
#pragma unroll
  for (int i = 0; i < V; ++i) sum += x[i] * wide[i];
}

template <class T, int V>
__device__ __forceinline__ void add(float (&y)[V], float factor, const Piece<T, V>& u) {
  float wide[V];
  widen(wide, u);
#pragma unroll
  for (int i = 0; i < V; ++i) y[i] += factor * wide[i];
}

// x . outputs of a chunk of adapters, over the block, in every thread; zero beyond the last adapter. `x` and `u`: what
// is held of a row and what is to be held of the outputs.
template <class T, int V, bool kHeld>
__device__ __forceinline__ void dots_of_chunk(float (&dots)[kChunk], Piece<T, V> (&u)[kChunk][kPieces],
                                              Piece<T, V> (&x)[kPieces], const T* x_row, const Fusion& f,
                                              const T* outputs, int first) {
#pragma unroll
  for (int k = 0; k < kChunk; ++k) dots[k] = 0.0f;
  outputs += first * f.outputs.adapter;
  if constexpr (kHeld) {
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (first + k >= f.adapters) continue;
#pragma unroll
      for (int g = 0; g < kPieces; ++g)
        if (column_of<V>(g) < f.channels) u[k][g] = load_piece<T, V>(outputs + k * f.outputs.adapter + column_of<V>(g));
    }
#pragma unroll
    for (int g = 0; g < kPieces; ++g) {
      if (column_of<V>(g) >= f.channels) continue;
      stay_raw(x[g]);
      float wide[V];
      widen(wide, x[g]);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if (first + k >= f.adapters) continue;
        add_dot(dots[k], wide, u[k][g]);
        stay_raw(u[k][g]);
      }
    }
  } else {
    for (int c = column_of<V>(0); c < f.channels; c += kMostThreads * V) {
      float wide[V];
      widen(wide, load_piece<T, V>(x_row + c));
#pragma unroll
      for (int k = 0; k < kChunk; ++k)
        if (first + k < f.adapters) add_dot(dots[k], wide, load_piece<T, V>(outputs + k * f.outputs.adapter + c));
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
  // Chunks take turns: nobody waits for those who still read the sums of the chunk before.
  float* sums = reinterpret_cast<float*>(shared_memory()) + first / kChunk % 2 * kTurn;
  if (lane % (32 / kChunk) == 0) sums[threadIdx.x / 32 * kChunk + lane / (32 / kChunk)] = dots[0];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kChunk; ++k) dots[k] = sums[k];
#pragma unroll 1
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

// What is one number for each adapter is written, and changed later, by a thread of the first warp.
__device__ __forceinline__ bool is_mine(int a) { return threadIdx.x == static_cast<unsigned>(a) % 32; }

template <class T, int V, bool kHeld>
__global__ void __launch_bounds__(kMostThreads) fusion_forward_kernel(const Fusion f) {
  const int64_t row = blockIdx.x, example = row / f.length, t = row % f.length;
  const T *query = row_of<T>(f.query, example, t), *outputs = row_of<T>(f.outputs, example, t);
  float* weights = f.weights + row * f.adapters;
  T* out = static_cast<T*>(f.out) + row * f.channels;
  Kept kept(f, row);
  const float offset = f.seed && f.offset.data ? to_float(*row_of<T>(f.offset, example, t)) : 0.0f;
  Piece<T, V> q[kPieces];
  float y[kPieces][V] = {}, most = -kInfinity, total = 0.0f;
  if constexpr (kHeld) {
#pragma unroll
    for (int g = 0; g < kPieces; ++g)
      if (column_of<V>(g) < f.channels) q[g] = load_piece<T, V>(query + column_of<V>(g));
  }
#pragma unroll 1
  for (int first = 0; first < f.adapters; first += kChunk) {
    float scores[kChunk];
    Piece<T, V> u[kChunk][kPieces];
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
    const float shift = top == -kInfinity ? 0.0f : top;
    if (most < top) {  // the same in all threads
      const float shrunk = expf(most - shift);
      total *= shrunk;
#pragma unroll
      for (int g = 0; g < kPieces; ++g) {
#pragma unroll
        for (int i = 0; i < V; ++i) y[g][i] *= shrunk;
      }
    }
    most = top;
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      if (first + k >= f.adapters) continue;
      const float p = expf(scores[k] - shift);
      total += p;
      if constexpr (kHeld) {
#pragma unroll
        for (int g = 0; g < kPieces; ++g)
          if (column_of<V>(g) < f.channels) add(y[g], p, u[k][g]);
      }
    }
  }
  const float share = 1.0f / total;
  for (int a = threadIdx.x; a < f.adapters && threadIdx.x < 32; a += 32)
    weights[a] = expf(weights[a] - (most == -kInfinity ? 0.0f : most)) * share;
  if constexpr (kHeld) {
#pragma unroll
    for (int g = 0; g < kPieces; ++g) {
      if (column_of<V>(g) >= f.channels) continue;
#pragma unroll
      for (int i = 0; i < V; ++i) y[g][i] *= share;
      store_elements<T, V>(out, column_of<V>(g), y[g]);
    }
  } else {
    __syncthreads();
    for (int c = column_of<V>(0); c < f.channels; c += kMostThreads * V) {
      float sum[V] = {};
      for (int a = 0; a < f.adapters; ++a) add(sum, weights[a], load_piece<T, V>(outputs + a * f.outputs.adapter + c));
      store_elements<T, V>(out, c, sum);
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
  const float* weights = f.weights + row * f.adapters;
  T *dquery = static_cast<T*>(f.dquery) + row * f.channels, *doutputs = static_cast<T*>(f.doutputs);
  doutputs += row * f.adapters * f.channels;
  float* ds = reinterpret_cast<float*>(shared_memory()) + 2 * kTurn;  // first dp
  float* shares = ds + f.adapters;                                    // kept p
  Kept kept(f, row);
  Piece<T, V> d[kPieces];
  float summed[kPieces][V] = {}, shared[kPieces][V] = {}, reference = 0.0f, mean = 0.0f, sum = 0.0f, share = 0.0f;
  if constexpr (kHeld) {
#pragma unroll
    for (int g = 0; g < kPieces; ++g)
      if (column_of<V>(g) < f.channels) d[g] = load_piece<T, V>(dout + column_of<V>(g));
  }
#pragma unroll 1
  for (int first = 0; first < f.adapters; first += kChunk) {
    float dp[kChunk], p[kChunk];
    Piece<T, V> u[kChunk][kPieces];
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
      if constexpr (kHeld) {
#pragma unroll
        for (int g = 0; g < kPieces; ++g) {
          if (column_of<V>(g) >= f.channels) continue;
          add(summed[g], dp[k], u[k][g]);
          add(shared[g], p[k], u[k][g]);
        }
      }
    }
  }
  for (int a = threadIdx.x; a < f.adapters && threadIdx.x < 32; a += 32) ds[a] = f.scale * shares[a] * (ds[a] - mean);
  if (f.doffset && threadIdx.x == 0) static_cast<T*>(f.doffset)[row] = from_float<T>(f.scale * (sum - mean * share));
  if constexpr (kHeld) {
    if (f.dquery) {
#pragma unroll
      for (int g = 0; g < kPieces; ++g) {
        if (column_of<V>(g) >= f.channels) continue;
#pragma unroll
        for (int i = 0; i < V; ++i) summed[g][i] = f.scale * (summed[g][i] - mean * shared[g][i]);
        store_elements<T, V>(dquery, column_of<V>(g), summed[g]);
      }
    }
    if (!f.doutputs) return;
  }
  __syncthreads();
  for (int c = column_of<V>(0); c < f.channels; c += static_cast<int>(blockDim.x) * V) {
    float incoming[V], asked[V], dq[V] = {};
    widen(incoming, load_piece<T, V>(dout + c));
    widen(asked, load_piece<T, V>(query + c));
#pragma unroll 1
    for (int a = 0; a < f.adapters; ++a) {
      const float of_score = ds[a];
      if (!kHeld && f.dquery) add(dq, of_score, load_piece<T, V>(outputs + a * f.outputs.adapter + c));
      if (!f.doutputs) continue;
      const float p = weights[a];
      float du[V];
#pragma unroll
      for (int i = 0; i < V; ++i) du[i] = p * incoming[i] + of_score * asked[i];
      store_elements<T, V>(doutputs + static_cast<int64_t>(a) * f.channels, c, du);
    }
    if (!kHeld && f.dquery) store_elements<T, V>(dquery, c, dq);
  }
}

template <class T, int V>
int start(bool is_forward, const Fusion& f, void* stream) {
  const int pieces = (f.channels + V - 1) / V, threads = (pieces + kPieces - 1) / kPieces;
  const bool held = threads <= kMostThreads;
  const auto kernel = is_forward ? (held ? fusion_forward_kernel<T, V, true> : fusion_forward_kernel<T, V, false>)
                                 : (held ? fusion_backward_kernel<T, V, true> : fusion_backward_kernel<T, V, false>);
  const dim3 block(static_cast<unsigned>(held ? (threads + 31) / 32 * 32 : kMostThreads));
  const size_t bytes = sizeof(float) * (2 * kTurn + (is_forward ? 0 : 2 * f.adapters));
  return launch(kernel, dim3(static_cast<unsigned>(f.rows)), block, bytes, stream, f);
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
