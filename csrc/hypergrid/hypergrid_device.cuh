// What the kernels of mma.sync and of wgmma share: a(x), what becomes of a sum before it is stored, and the walk over
// the rows of gates.
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

// The gradient of x[m, n] from that of a(x)[m, n]; x only counts where there is an activation.
__device__ __forceinline__ float through_activation(const Epilogue& e, float sum, float x, int64_t m, int64_t n) {
  if (e.activation) sum *= activation_slope(x, e.activation);
  if (e.seed) {
    const DropoutRow row = dropout_row(static_cast<uint64_t>(*e.seed), static_cast<uint64_t>(m));
    sum = dropout_bits(row, static_cast<uint32_t>(n)) >= e.threshold ? sum * e.gain : 0.0f;
  }
  return sum;
}

// Element (m, n) of the result from its sum.
template <class T>
__device__ __forceinline__ float finished(const Epilogue& e, float sum, int64_t m, int64_t n) {
  if (e.bias) sum += to_float(static_cast<const T*>(e.bias)[n]);
  const float x = e.activation ? to_float(static_cast<const T*>(e.x)[m * e.x_row + n]) : 0.0f;
  return through_activation(e, sum, x, m, n);
}

constexpr int kSegmentRows = 64;  // that lengths of segments are multiples of, except where a gate's rows end

// The segments of a block, a stage of rows at a time: a gate's rows, or some of them.
struct Walk {
  int segment, end, begin_row = 0, end_row = 0, depth, chunk = 0;

  __device__ __forceinline__ Walk(const WeightGradient& d, int split, int depth)
      : segment(split * d.split_segments), end(min(segment + d.split_segments, d.segments)), depth(depth) {
    find(d);
  }

  __device__ __forceinline__ void find(const WeightGradient& d) {
    if (segment >= end) return;
    const int gate = segment / d.chunks, first = static_cast<int>(d.begins[gate]);
    const int last = static_cast<int>(d.begins[gate + 1]), rows = (last - first + d.chunks - 1) / d.chunks;
    const int size = (rows + kSegmentRows - 1) / kSegmentRows * kSegmentRows;
    begin_row = min(first + segment % d.chunks * size, last);
    end_row = min(begin_row + size, last);
  }

  __device__ __forceinline__ bool done() const { return segment >= end; }
  __device__ __forceinline__ int rows() const {  // of this stage; 0 or less where a segment has none
    return min(end_row - begin_row - chunk * depth, depth);
  }
  __device__ __forceinline__ bool last_of_segment() const { return end_row - begin_row <= (chunk + 1) * depth; }

  __device__ __forceinline__ void advance(const WeightGradient& d) {
    if (!last_of_segment()) {
      ++chunk;
    } else {
      next_segment(d);
    }
  }

  __device__ __forceinline__ void next_segment(const WeightGradient& d) {
    chunk = 0;
    ++segment;
    find(d);
  }
};

}  // namespace mmk::hypergrid
