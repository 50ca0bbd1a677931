// What the kernels of adapters share: which rows a block has, activations, pieces of rows.
#pragma once
#include "adapter/adapter_cuda.h"
#include "common/gelu.cuh"
#include "common/rows.cuh"

namespace mmk::adapter {

constexpr int kPieces = 8;  // of 16 bytes, in a chunk
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));  // elements of a piece

// --- Which rows ---

struct Piece {
  int group;
  int64_t begin, end;
};

// Groups are cut into pieces of `size` rows. Every warp looks for itself. `groups` if there are not so many.
__device__ __forceinline__ Piece find(const int* begins, int groups, int64_t group_rows, int64_t size, int64_t piece) {
  constexpr unsigned kAll = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  int64_t before = 0;
  for (int base = 0; base < groups; base += 32) {
    const int g = base + lane;
    const int64_t first = g < groups ? begins[g] * group_rows : 0, last = g < groups ? begins[g + 1] * group_rows : 0;
    const int64_t own = (last - first + size - 1) / size;
    int64_t end = own;
    for (int d = 1; d < 32; d *= 2) {
      const int64_t other = __shfl_sync(kAll, end, (lane - d) & 31);
      if (lane >= d) end += other;
    }
    end += before;
    const unsigned found = __ballot_sync(kAll, piece >= end - own && piece < end);
    if (found) {
      int source = 0;
      while (!(found >> source & 1)) ++source;
      const int64_t begin = __shfl_sync(kAll, first + (piece - (end - own)) * size, source);
      return {base + source, begin, min(begin + size, __shfl_sync(kAll, last, source))};
    }
    before = __shfl_sync(kAll, end, 31);
  }
  return {groups, 0, 0};
}

__device__ __forceinline__ int group_of(int64_t number, int adapters) {
  return number >= 0 && number < adapters ? static_cast<int>(number) : number == -1 ? adapters : adapters + 1;
}

__device__ __forceinline__ int64_t row_of(const Adapter& d, int64_t p) {
  return d.mode == Mode::grouped ? d.order[p / d.group_rows] * d.group_rows + p % d.group_rows : p;
}

__device__ __forceinline__ int64_t offset(const Adapter& d, const RowTensor& t, int64_t m) {
  return m / d.length * t.example + m % d.length * t.row;
}

// --- Element by element ---

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

__device__ __forceinline__ float activated(float z, int activation) {
  switch (activation) {
    case 1:
      return z < 0.0f ? 0.0f : z;  // NaN stays
    case 2:
      return gelu<false>(z);
    case 3:
      return gelu<true>(z);
    case 4:
      return z * sigmoid(z);
    case 5:
      return z < 0.0f ? 0.01f * z : z;
    case 6: {
      const float e = expf(-2.0f * fabsf(z)), magnitude = (1.0f - e) / (1.0f + e);
      return z < 0.0f ? -magnitude : magnitude;
    }
  }
  return z;
}

__device__ __forceinline__ float slope(float z, int activation) {
  switch (activation) {
    case 1:
      return z > 0.0f ? 1.0f : z * 0.0f;
    case 2:
      return gelu_slope<false>(z);
    case 3:
      return gelu_slope<true>(z);
    case 4: {
      const float s = sigmoid(z);
      return s * (1.0f + z * (1.0f - s));
    }
    case 5:
      return z > 0.0f ? 1.0f : 0.01f;
    case 6: {
      const float e = expf(-2.0f * fabsf(z));
      return 4.0f * e / ((1.0f + e) * (1.0f + e));
    }
  }
  return 1.0f;
}

// Both, with what they share.
__device__ __forceinline__ void activate(float z, int activation, float& a, float& of_z) {
  if (activation == 2) {
    const float e = expf(z * z * -0.5f), probability = normal_probability(z, e);
    a = z * probability, of_z = probability + z * (e * kNormalDensity);
  } else {
    a = activated(z, activation), of_z = slope(z, activation);
  }
}

// V elements of which `valid` exist; zeros behind them.
template <class T, int V>
__device__ __forceinline__ void load_piece(float (&to)[V], const T* from, int valid, bool by_vector) {
  if (by_vector && valid == V) {
    constexpr int kPart = V < 16 / static_cast<int>(sizeof(T)) ? V : 16 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < V; i += kPart) {
      const auto part = *reinterpret_cast<const Elements<T, kPart>*>(from + i);
#pragma unroll
      for (int e = 0; e < kPart; ++e) to[i + e] = to_float(part.at[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = i < valid ? to_float(from[i]) : 0.0f;
  }
}

template <class T, int V>
__device__ __forceinline__ void store_piece(T* to, const float (&from)[V], int valid, bool by_vector) {
  if (by_vector && valid == V) {
    store_elements<T, V>(to, 0, from);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < valid) to[i] = from_float<T>(from[i]);
  }
}

template <class T, int V>
__device__ __forceinline__ void load_parameter(float (&to)[V], const Parameter& p, int64_t at, int valid,
                                               bool by_vector) {
  if (p.is_fp32) {
    load_piece<float, V>(to, static_cast<const float*>(p.data) + at, valid, by_vector);
  } else {
    load_piece<T, V>(to, static_cast<const T*>(p.data) + at, valid, by_vector);
  }
}

template <class T>
__device__ __forceinline__ float parameter(const Parameter& p, int64_t at) {
  return p.is_fp32 ? static_cast<const float*>(p.data)[at] : to_float(static_cast<const T*>(p.data)[at]);
}

// Over the eight lanes that share a row.
__device__ __forceinline__ float sum_of_row(float x) {
#pragma unroll
  for (int bits = 1; bits < kPieces; bits *= 2) x += __shfl_xor_sync(0xffffffffu, x, bits);
  return x;
}

}  // namespace mmk::adapter
