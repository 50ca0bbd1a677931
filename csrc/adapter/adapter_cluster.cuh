// What the kernels of adapters by clusters share: which rows a cluster has, and both weights' channels of a block.
#pragma once
#include <climits>
#include <type_traits>

#include "adapter/adapter_device.cuh"
#include "common/hopper.cuh"
#include "common/tile.cuh"

#if defined(MMK_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define MMK_CLUSTERS
#endif

namespace mmk::adapter {

constexpr int kCluster = 4, kMostHidden = 64, kChannels = 64;  // channels of a chunk
constexpr int kMostChunks = 4;                                 // of a block

// Chunks of channels of a block; the bottleneck in whole sixteens.
__host__ __device__ __forceinline__ int chunks_of(const Adapter& d) {
  return (d.channels + kChannels * kCluster - 1) / (kChannels * kCluster);
}
__host__ __device__ __forceinline__ int wide_of(const Adapter& d) {
  return d.bottleneck <= 32 ? 32 : (d.bottleneck + 15) / 16 * 16;
}

// Of sizes, strides and options.
inline bool served_by_clusters(Dtype dtype, const Adapter& d) {
  return mmk_capability() >= 9 && dtype != Dtype::fp32 && d.by_vector && d.bottleneck <= kMostHidden &&
         d.channels <= kChannels * kCluster * kMostChunks && d.rows <= INT_MAX && !d.seed && !d.gate.data &&
         !d.scale.data && (d.skip & 4) == 0 && reinterpret_cast<uint64_t>(d.w_down) % 16 == 0;
}

#ifdef MMK_CLUSTERS

template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, bf16>)
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  const auto elements = *reinterpret_cast<const Elements<T, 2>*>(&pair);
  return make_float2(to_float(elements.at[0]), to_float(elements.at[1]));
}
// The sum of two pairs, rounded once.
template <class T>
__device__ __forceinline__ uint32_t add_pair(uint32_t a, uint32_t b) {
  return ptx::fma_pair<T>(a, pack<T>(1.0f, 1.0f), b);
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int bits = 1; bits < 32; bits *= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}

// Of Mode::few, in shared memory: the groups of items; the parts of a group at its first item, 0 at the others; items
// in their order; the part that was looked for.
struct Few {
  int groups[kFewItems], parts[kFewItems];
  int begin, end, group;
  uint8_t order[kFewItems];
};

// A cluster's part of the rows, all of one adapter, which is one of the bank (known), none (A) or no number of one.
struct Part {
  int64_t begin;
  int rows, adapter;
  bool known;

  // By all threads of a block. What grouped finds by another launch: a thread has an item and counts the others.
  __device__ __forceinline__ Part(const Adapter& d, Few& few) {
    const int of_item = static_cast<int>(d.group_rows), count = static_cast<int>(d.rows) / of_item;
    const int size = static_cast<int>(d.part), wanted = static_cast<int>(number());
    for (int i = threadIdx.x; i < count; i += blockDim.x) few.groups[i] = group_of(d.index[i], d.adapters);
    if (threadIdx.x == 0) few.begin = few.end = 0, few.group = d.adapters + 2;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int own = few.groups[i];
      int before = 0, same = 0, earlier = 0;
      for (int j = 0; j < count; ++j) {
        before += few.groups[j] < own, same += few.groups[j] == own;
        earlier += few.groups[j] == own && j < i;
      }
      few.order[before + earlier] = static_cast<uint8_t>(i);
      few.parts[i] = earlier ? 0 : (same * of_item + size - 1) / size;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      if (few.parts[i] == 0) continue;
      const int own = few.groups[i];
      int before = 0, same = 0, first = 0;
      for (int j = 0; j < count; ++j) {
        before += few.groups[j] < own, same += few.groups[j] == own;
        first += few.groups[j] < own ? few.parts[j] : 0;
      }
      if (wanted < first || wanted >= first + few.parts[i]) continue;
      few.begin = before * of_item + (wanted - first) * size;
      few.end = min(few.begin + size, (before + same) * of_item), few.group = own;
    }
    __syncthreads();
    begin = few.begin, rows = few.end - few.begin, adapter = few.group, known = adapter < d.adapters;
  }

  __device__ __forceinline__ explicit Part(const Adapter& d) {
    const int64_t part = number();
    if (d.mode == Mode::grouped) {
      const Piece piece = find(d.begins, d.adapters + 2, d.group_rows, d.part, part);
      adapter = piece.group, begin = piece.begin, rows = static_cast<int>(piece.end - begin);
    } else if (d.mode == Mode::by_example) {
      const int64_t parts = (d.group_rows + d.part - 1) / d.part, example = part / parts, first = part % parts * d.part;
      adapter = group_of(d.index[example], d.adapters);
      begin = example * d.group_rows + first, rows = static_cast<int>(min(d.part, d.group_rows - first));
    } else {
      adapter = 0, begin = part * d.part, rows = static_cast<int>(min(d.part, d.rows - begin));
    }
    known = adapter < d.adapters;
  }
  static __device__ __forceinline__ int64_t number() { return blockIdx.x / kCluster; }
};

// Vectors of a block: of the bottleneck, (kMostHidden), and of its channels, (kMostChunks * kChannels).
struct ClusterVectors {
  float* hidden_sums;           // two of them
  float *down_bias, *down_sum;  // W_down times the norm's bias and the bias; W_down times the norm's gain, summed
  float *up_bias, *out_gain;    // times factor
};

// A block's quarter of both weights, by all its threads: `down(j, i)` and `up(i, j)` say where row j of W_down and row
// i of W_up lie, i counted from `first_channel`. W_down is multiplied by the norm's gain, so that it is a product of
// normalised rows. Ends with barriers of the cluster, after the sums over all channels.
template <class T, int Wide, class Down, class Up>
__device__ __forceinline__ void load_quarter(const Adapter& d, const Part& part, int first_channel, int chunks,
                                             const ClusterVectors& to, Down down, Up up) {
  constexpr int V = kWide<T>;
  const int threads = blockDim.x, lane = threadIdx.x % 32;
  const bool known = part.known, normed = d.norm_weight.data;
  const int64_t own = known ? int64_t{part.adapter} * d.bottleneck * d.channels : 0;
  const T *w_down = static_cast<const T*>(d.w_down) + own, *w_up = static_cast<const T*>(d.w_up) + own;
  for (int i = threadIdx.x; i < chunks * Wide * kPieces; i += threads) {
    const int j = i / kPieces % Wide, channel = i / kPieces / Wide * kChannels + i % kPieces * V;
    const int c = first_channel + channel;
    float w[V] = {};
    if (known && j < d.bottleneck && c < d.channels) {
      load_piece<T, V>(w, w_down + int64_t{j} * d.channels + c, V, true);
      if (normed) {
        float gain[V];
        load_parameter<T, V>(gain, d.norm_weight, c, V, true);
#pragma unroll
        for (int e = 0; e < V; ++e) w[e] *= gain[e];
      }
    }
    store_elements<T, V>(down(j, channel), 0, w);
  }
  const bool whole = d.bottleneck % V == 0 && reinterpret_cast<uint64_t>(w_up) % 16 == 0;
  constexpr int kAcross = Wide / V;
  for (int i = threadIdx.x; i < chunks * kChannels * kAcross; i += threads) {
    const int channel = i / kAcross, j = i % kAcross * V, c = first_channel + channel;
    float w[V] = {};
    if (known && c < d.channels && j < d.bottleneck)
      load_piece<T, V>(w, w_up + int64_t{c} * d.bottleneck + j, d.bottleneck - j >= V ? V : d.bottleneck - j, whole);
    store_elements<T, V>(up(channel, j), 0, w);
  }
  const float without = known || part.adapter == d.adapters ? 0.0f : NAN;
  for (int i = threadIdx.x; i < chunks * kChannels; i += threads) {
    const int c = first_channel + i;
    const bool inside = c < d.channels;
    to.up_bias[i] = known && inside && d.b_up.data
                        ? parameter<T>(d.b_up, int64_t{part.adapter} * d.channels + c) * d.factor
                        : without;
    to.out_gain[i] = inside && d.out_weight.data ? parameter<T>(d.out_weight, c) : 0.0f;
  }
  __syncthreads();
  // Sums over channels, of this quarter: of W_down times the norm's bias, and of W_down as it lies here.
  for (int j = threadIdx.x / 32; j < Wide; j += threads / 32) {
    float of_bias = 0.0f, of_weight = 0.0f;
    for (int i = lane; normed && i < chunks * kChannels; i += 32) {
      const int c = first_channel + i;
      if (!known || j >= d.bottleneck || c >= d.channels) continue;
      of_weight += to_float(*down(j, i));
      if (d.norm_bias.data) of_bias += to_float(w_down[int64_t{j} * d.channels + c]) * parameter<T>(d.norm_bias, c);
    }
    of_bias = sum_of_warp(of_bias), of_weight = sum_of_warp(of_weight);
    if (lane == 0) to.hidden_sums[j] = of_bias, to.hidden_sums[kMostHidden + j] = of_weight;
  }
  ptx::cluster_sync();
  if (const int j = threadIdx.x; j < Wide) {
    const bool has_bias = known && d.b_down.data && j < d.bottleneck;
    float bias = has_bias ? parameter<T>(d.b_down, int64_t{part.adapter} * d.bottleneck + j) : 0.0f, weight = 0.0f;
#pragma unroll
    for (int r = 0; r < kCluster; ++r) {
      const float* other = ptx::of_rank(to.hidden_sums, r);
      bias += other[j], weight += other[kMostHidden + j];
    }
    to.down_bias[j] = bias, to.down_sum[j] = weight;
  }
}

#endif

}  // namespace mmk::adapter
