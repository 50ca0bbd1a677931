// What the kernels of a tile of rows share: the tile, and products of it with chunks of the weights.
#pragma once
#include <type_traits>

#include "adapter/adapter_device.cuh"
#include "common/dropout.h"
#include "common/tile.cuh"

namespace mmk::adapter {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOwn = kMostTile * kPieces / kThreads;  // pieces of a chunk that a thread has at most
template <class T>
constexpr int kChunkBytesOf = kChunk<T> * kRowBytes;  // of a chunk of a weight

// Shared memory: facts of rows, sums, two stages (a weight's chunk and a chunk of rows), the bottleneck (backward: and
// its gradient), resident rows.
constexpr int kFacts = 8;
constexpr int kFactBytes = 4 * 8 + kFacts * 4;  // of a row
// Rows that have room for facts. In float32 every byte counts: a bottleneck of 1024 fits sm_80 then.
__host__ __device__ constexpr int fact_rows(int chunk, int tile) { return chunk == kChunk<float> ? tile : kMostTile; }
constexpr int kSumBytes = kWarps * 64 * 4;

inline int64_t bytes_of(int chunk, int channels, int bottleneck, int tile, bool resident, bool backward) {
  const int64_t row_chunk = tile * kRowBytes, hidden = (bottleneck + chunk - 1) / chunk;
  const int64_t kept = resident ? (channels + chunk - 1) / chunk : 0;
  return fact_rows(chunk, tile) * kFactBytes + (backward ? kSumBytes : 0) + 2 * (chunk * kRowBytes + row_chunk) +
         (hidden * (backward ? 2 : 1) + kept) * row_chunk;
}

// Mean and sum of squared deviations of the elements seen so far.
struct Moments {
  float count = 0.0f, mean = 0.0f, squares = 0.0f;

  __device__ __forceinline__ void merge(float other_count, float other_mean, float other_squares) {
    const float total = count + other_count, share = total > 0.0f ? other_count / total : 0.0f;
    const float delta = other_mean - mean;
    mean += delta * share;
    squares += other_squares + delta * delta * (count * share);
    count = total;
  }
  template <int V>
  __device__ __forceinline__ void add(const float (&x)[V], int valid) {
    float sum = 0.0f, deviations = 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) sum += x[i];  // what is not valid is 0
    const float own = valid == V ? sum * (1.0f / V) : valid > 0 ? sum / static_cast<float>(valid) : 0.0f;
#pragma unroll
    for (int i = 0; i < V; ++i) deviations += i < valid ? (x[i] - own) * (x[i] - own) : 0.0f;
    merge(static_cast<float>(max(valid, 0)), own, deviations);
  }
  // Over the eight lanes that share a row.
  __device__ __forceinline__ void gather() {
#pragma unroll
    for (int bits = 1; bits < kPieces; bits *= 2) {
      const float c = __shfl_xor_sync(0xffffffffu, count, bits), m = __shfl_xor_sync(0xffffffffu, mean, bits);
      const float s = __shfl_xor_sync(0xffffffffu, squares, bits);
      merge(c, m, s);
    }
  }
};

// A value for each piece that a thread has, in registers, read and written by a number known only at run time.
template <class Value>
struct PerPiece {
  Value values[kOwn] = {};

  __device__ __forceinline__ Value get(int own) const {
    Value value = values[0];
#pragma unroll
    for (int i = 1; i < kOwn; ++i)
      if (own == i) value = values[i];
    return value;
  }
  template <class Change>
  __device__ __forceinline__ void change(int own, Change change) {
    Value value = get(own);
    change(value);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (own == i) values[i] = value;
  }
};

// --- A block's tile of rows ---

enum Source { kX, kInput, kResidual, kDense, kComputed };  // of rows
enum Fact { kMean, kRstd, kGain, kLow, kHigh, kFirst, kSecond, kThird };

template <class T>
struct Block {
  static constexpr int kWidth = kChunk<T>, V = kWide<T>;
  const Adapter& d;
  int64_t* numbers;  // m, or -1
  int64_t* offsets;  // of x's, input_residual's and residual's rows
  float* facts;
  float* sums;
  unsigned char *ring, *hidden, *dhidden, *kept;
  int64_t begin;  // p of the first row
  int adapter, tile, row_chunk, stage;
  bool known;
  // The rows of this warp's fragment, and its share of a product's columns: every `across`-th sixteen.
  int lane, warp, first_row, across, share;

  __device__ __forceinline__ Block(const Adapter& d, int hidden_copies) : d(d), tile(d.tile) {
    unsigned char* shared = shared_memory();
    numbers = reinterpret_cast<int64_t*>(shared);
    offsets = numbers + facts_apart();
    facts = reinterpret_cast<float*>(numbers + 4 * facts_apart());
    sums = facts + kFacts * facts_apart();
    row_chunk = tile * kRowBytes;
    stage = kChunkBytesOf<T> + row_chunk;
    ring = shared + facts_apart() * kFactBytes + (hidden_copies - 1) * kSumBytes;  // the forward has no sums
    hidden = ring + 2 * stage;
    const int chunks = (d.bottleneck + kWidth - 1) / kWidth;
    dhidden = hidden + (hidden_copies - 1) * chunks * row_chunk;
    kept = hidden + hidden_copies * chunks * row_chunk;
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int fragments = tile / 16;
    across = kWarps / fragments;
    first_row = warp / across * 16, share = warp % across;

    int64_t end;
    if (d.mode == Mode::grouped) {
      const Piece piece = find(d.begins, d.adapters + 2, d.group_rows, tile, blockIdx.x);
      adapter = piece.group, begin = piece.begin, end = piece.end;
    } else if (d.mode == Mode::by_example) {
      const int64_t tiles = (d.group_rows + tile - 1) / tile, example = blockIdx.x / tiles;
      adapter = group_of(d.index[example], d.adapters);
      begin = example * d.group_rows + blockIdx.x % tiles * tile;
      end = min(begin + tile, (example + 1) * d.group_rows);
    } else {
      adapter = 0, begin = int64_t{blockIdx.x} * tile, end = min(begin + tile, d.rows);
    }
    known = adapter < d.adapters;
    for (int row = threadIdx.x; row < tile; row += kThreads) {
      const int64_t m = begin + row < end ? row_of(d, begin + row) : -1;
      numbers[row] = m;
      offsets[kX * facts_apart() + row] = m < 0 ? 0 : offset(d, d.x, m);
      offsets[kInput * facts_apart() + row] = m < 0 || !d.input_residual.data ? 0 : offset(d, d.input_residual, m);
      offsets[kResidual * facts_apart() + row] = m < 0 || !d.residual.data ? 0 : offset(d, d.residual, m);
      float gain = 0.0f;
      DropoutRow drop{};
      if (m >= 0) {
        gain = d.gate.data ? parameter<T>(d.gate, m / d.gate_rows) : 1.0f;
        if (d.seed) drop = dropout_row(static_cast<uint64_t>(*d.seed), static_cast<uint64_t>(m));
      }
      fact(kGain, row) = gain;
      fact(kLow, row) = __uint_as_float(drop.low), fact(kHigh, row) = __uint_as_float(drop.high);
      fact(kMean, row) = fact(kRstd, row) = 0.0f;
    }
    __syncthreads();
  }

  __device__ __forceinline__ int facts_apart() const { return fact_rows(kWidth, tile); }
  __device__ __forceinline__ float& fact(Fact which, int row) const { return facts[which * facts_apart() + row]; }
  __device__ __forceinline__ int own_adapter() const { return known ? adapter : 0; }
  __device__ __forceinline__ int chunks(int size) const { return (size + kWidth - 1) / kWidth; }
  // Threads from here on have no piece; whole warps of them.
  __device__ __forceinline__ bool has(int own) const {
    return static_cast<int>(threadIdx.x) + own * kThreads < tile * kPieces;
  }
  __device__ __forceinline__ int row(int own) const { return (threadIdx.x + own * kThreads) / kPieces; }
  __device__ __forceinline__ int piece_column() const { return threadIdx.x % kPieces * V; }

  // body(own, row, m, c, valid) for every piece of chunk k that lies in a row. Not unrolled: what a body stores may
  // alias what the next one loads, so that copies of it would only be much code.
  template <class Body>
  __device__ __forceinline__ void each_piece(int k, Body body) const {
    const int c = k * kWidth + piece_column(), valid = min(d.channels - c, V);
#pragma unroll 1
    for (int own = 0; own < kOwn; ++own) {
      if (!has(own)) continue;
      const int64_t m = numbers[row(own)];
      if (m >= 0 && valid > 0) body(own, row(own), m, c, valid);
    }
  }

  __device__ __forceinline__ T* at(unsigned char* chunk, int row, int column) const {
    return reinterpret_cast<T*>(chunk + row * kRowBytes) + column;
  }

  // --- Rows ---

  __device__ __forceinline__ void load_rows(float (&to)[V], Source which, int row, int c, int valid) const {
    const void* data = which == kX ? d.x.data : which == kInput ? d.input_residual.data : d.residual.data;
    load_piece<T, V>(to, static_cast<const T*>(data) + offsets[which * facts_apart() + row] + c, valid, d.by_vector);
  }
  __device__ __forceinline__ void load_dense(float (&to)[V], const void* t, int64_t m, int c, int valid) const {
    load_piece<T, V>(to, static_cast<const T*>(t) + m * d.channels + c, valid, d.by_vector);
  }
  __device__ __forceinline__ void store_dense(void* t, int64_t m, int c, const float (&from)[V], int valid) const {
    store_piece<T, V>(static_cast<T*>(t) + m * d.channels + c, from, valid, d.by_vector);
  }
  __device__ __forceinline__ void load_vector(float (&to)[V], const Parameter& p, int64_t at, int valid) const {
    load_parameter<T, V>(to, p, at, valid, d.by_vector);
  }

  // s, as a sum of tensors of T is.
  __device__ __forceinline__ void load_s(float (&s)[V], int row, int c, int valid) const {
    load_rows(s, kX, row, c, valid);
    if (!d.input_residual.data) return;
    float other[V];
    load_rows(other, kInput, row, c, valid);
#pragma unroll
    for (int i = 0; i < V; ++i) s[i] = to_float(from_float<T>(s[i] + other[i]));
  }

  __device__ __forceinline__ void normalise(float (&s)[V], float mean, float rstd, const Parameter& weight,
                                            const Parameter& bias, int c, int valid) const {
    float w[V], b[V] = {};
    load_vector(w, weight, c, valid);
    if (bias.data) load_vector(b, bias, c, valid);
#pragma unroll
    for (int i = 0; i < V; ++i) s[i] = (s[i] - mean) * rstd * w[i] + b[i];
  }

  // A chunk of s, or of dense rows, into shared memory; zeros where there is nothing.
  template <class Fill>
  __device__ __forceinline__ void fill_chunk(unsigned char* chunk, int k, Source source, Fill fill) const {
    const int c = k * kWidth + piece_column(), valid = max(min(d.channels - c, V), 0);
#pragma unroll 1
    for (int own = 0; own < kOwn; ++own) {
      if (!has(own)) continue;
      const int64_t m = numbers[row(own)];
      T* to = at(chunk, row(own), piece_column());
      if (source != kComputed && d.by_vector) {
        const bool inside = m >= 0 && valid > 0;
        const T* from = static_cast<const T*>(source == kX ? d.x.data : d.dout);
        if (inside) from += (source == kX ? offsets[row(own)] : m * d.channels) + c;
        ptx::cp_async<16>(to, from, inside ? 16 : 0);
      } else {
        float values[V] = {};
        if (m >= 0 && valid > 0) fill(own, row(own), m, c, valid, values);
        store_elements<T, V>(to, 0, values);
      }
    }
  }
  // s, from where it is nearest.
  __device__ __forceinline__ void load_sum(float (&s)[V], int row, int c, int valid) const {
    if (d.resident) {
      load_piece<T, V>(s, at(kept + c / kWidth * row_chunk, row, c % kWidth), valid, true);
    } else {
      load_s(s, row, c, valid);
    }
  }
  __device__ __forceinline__ void fill_weight(unsigned char* to, const void* weight, int rows, int columns, int n,
                                              int k) const {
    const int64_t first = int64_t{own_adapter()} * rows * columns;
    const int64_t stride = int64_t{columns} * static_cast<int64_t>(sizeof(T));
    const char* data = static_cast<const char*>(weight) + first * static_cast<int64_t>(sizeof(T));
    const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(stride);
    const int aligned = bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
    load_chunk<T>(to, Rows{data, stride, rows, columns, nullptr, 0, aligned}, n * kWidth, kWidth, k * kWidth);
  }

  // --- Products ---

  using Sums = float[kWidth / 8][4];

  // body(block of 8 columns, i, row, column) of this thread's elements of a product's chunk.
  template <class Body>
  __device__ __forceinline__ void each_element(Body body) const {
#pragma unroll
    for (int j = 0; j < kWidth / 8; ++j) {
      if (j / 2 % across != share) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) body(j, i, first_row + lane / 4 + i / 2 * 8, j * 8 + lane % 4 * 2 + i % 2);
    }
  }

  // For every chunk n of columns: the sum over chunks k of left(k) right, in two stages. `load(stage, n, k)` starts the
  // copies of both, `left(stage, k, step)` gives a k-step of this warp's rows, `done(stage, n, sums)` comes at the end
  // of a sum. By rows: right is (n, k) in shared memory, else (k, n).
  template <bool ByRows, class Load, class Left, class Done>
  __device__ __forceinline__ void products(int columns, int depth, Load load, Left left, Done done) const {
    const int depth_chunks = chunks(depth), steps = chunks(columns) * depth_chunks;
    Sums acc;
    auto clear = [&] {
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][i] = 0.0f;
    };
    clear();
    __syncthreads();
    load(ring, 0, 0);
    ptx::cp_async_commit();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const int n = step / depth_chunks, k = step % depth_chunks;
      unsigned char* here = ring + step % 2 * stage;
      if (step + 1 < steps) load(ring + (step + 1) % 2 * stage, (step + 1) / depth_chunks, (step + 1) % depth_chunks);
      ptx::cp_async_commit();
      const int valid = min(depth - k * kWidth, kWidth);
#pragma unroll
      for (int s = 0; s < kChunkBytes / 32; ++s) {
        if (s * kStep<T> >= valid) continue;
        const Operand<T> a = left(here, k, s);
#pragma unroll
        for (int j = 0; j < kWidth / 8; j += 2) {
          if (j / 2 % across != share) continue;
          uint32_t b[4];
          load_right<T, ByRows>(b, here, kRowBytes, j * 8, s);
          multiply<T, true>(acc[j], a, b[0], b[1]);
          multiply<T, true>(acc[j + 1], a, b[2], b[3]);
        }
      }
      if (k == depth_chunks - 1) {
        done(here, n, acc);
        clear();
      }
    }
  }

  // A k-step of this warp's rows in shared memory.
  __device__ __forceinline__ Operand<T> plain(const unsigned char* chunk, int step) const {
    return load_left<T>(chunk + first_row * kRowBytes + step * 32);
  }

  // The bottleneck into `hidden` and, where wanted, the slope of the activation into `dhidden`.
  __device__ __forceinline__ void down(bool with_slope) const {
    const bool in_place = d.resident && !d.norm_weight.data;
    products<true>(
        d.bottleneck, d.channels,
        [&](unsigned char* to, int n, int k) {
          fill_weight(to, d.w_down, d.bottleneck, d.channels, n, k);
          if (in_place) return;
          unsigned char* rows = to + kChunkBytesOf<T>;
          const bool copied = !d.norm_weight.data && !d.input_residual.data;
          fill_chunk(rows, k, copied ? kX : kComputed, [&](int, int row, int64_t, int c, int valid, float (&u)[V]) {
            load_sum(u, row, c, valid);
            if (d.norm_weight.data)
              normalise(u, fact(kMean, row), fact(kRstd, row), d.norm_weight, d.norm_bias, c, valid);
          });
        },
        [&](unsigned char* from, int k, int step) {
          return plain(in_place ? kept + k * row_chunk : from + kChunkBytesOf<T>, step);
        },
        [&](unsigned char*, int n, Sums& sums) {
          each_element([&](int j, int i, int row, int column) {
            const int own = n * kWidth + column;
            float z = sums[j][i];  // rounded with its bias, or it could change its sign
            if (d.b_down.data && own < d.bottleneck)
              z += parameter<T>(d.b_down, int64_t{own_adapter()} * d.bottleneck + own);
            *at(hidden + n * row_chunk, row, column) = from_float<T>(z);
          });
        });
    __syncthreads();
    // One element after another: there are few, and this is much code.
#pragma unroll 1
    for (int i = threadIdx.x; i < chunks(d.bottleneck) * kWidth * tile; i += kThreads) {
      const int column = i % kWidth, row = i / kWidth % tile, n = i / kWidth / tile;
      T* a = at(hidden + n * row_chunk, row, column);
      const float z = to_float(*a);
      *a = from_float<T>(activated(z, d.activation));
      if (with_slope) *at(dhidden + n * row_chunk, row, column) = from_float<T>(slope(z, d.activation));
    }
  }

  // hidden (rows, R) times columns of a weight, chunk after chunk through shared memory to `each(own, row, m, c, valid,
  // values)`. ByRows: weight is (C, R), else (R, C). `after(n)` comes when a chunk is through.
  template <bool ByRows, class Each, class After>
  __device__ __forceinline__ void up(unsigned char* left, const void* weight, Each each, After after) const {
    products<ByRows>(
        d.channels, d.bottleneck,
        [&](unsigned char* to, int n, int k) {
          if constexpr (ByRows) {
            fill_weight(to, weight, d.channels, d.bottleneck, n, k);
          } else {
            fill_weight(to, weight, d.bottleneck, d.channels, k, n);
          }
        },
        [&](unsigned char*, int k, int step) { return plain(left + k * row_chunk, step); },
        [&](unsigned char* from, int n, Sums& sums) {
          unsigned char* chunk = from + kChunkBytesOf<T>;
          each_element([&](int j, int i, int row, int column) { *at(chunk, row, column) = from_float<T>(sums[j][i]); });
          __syncthreads();
          each_piece(n, [&](int own, int row, int64_t m, int c, int valid) {
            float values[V];
            load_piece<T, V>(values, at(chunk, row, c - n * kWidth), valid, true);
            if (!known) {
#pragma unroll
              for (int i = 0; i < V; ++i) values[i] = 0.0f;
            }
            each(own, row, m, c, valid, values);
          });
          after(n);
        });
  }

  __device__ __forceinline__ void load_scale(float (&to)[V], int c, int valid) const {
    const int64_t at = own_adapter() * d.scale_adapter;
    if (d.scale_channel) {
      load_vector(to, d.scale, at + c, valid);
    } else {
      const float scale = parameter<T>(d.scale, at);
#pragma unroll
      for (int i = 0; i < V; ++i) to[i] = scale;
    }
  }

  __device__ __forceinline__ bool survives(int row, int c) const {
    const DropoutRow drop{__float_as_uint(fact(kLow, row)), __float_as_uint(fact(kHigh, row))};
    return dropout_bits(drop, static_cast<uint32_t>(c)) >= d.threshold;
  }

  // y from a W_up^T, both of a piece.
  __device__ __forceinline__ void finish(float (&y)[V], int row, int c, int valid) const {
    float other[V];
    if (!known) {
      const float without = adapter == d.adapters ? 0.0f : NAN;
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = without;
    } else {
      if (d.b_up.data) {
        load_vector(other, d.b_up, int64_t{adapter} * d.channels + c, valid);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] += other[i];
      }
      if (d.scale.data) {
        load_scale(other, c, valid);
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] *= other[i];
      }
      const float gain = fact(kGain, row) * d.factor;
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] *= gain;
      if (d.seed) {
#pragma unroll
        for (int i = 0; i < V; ++i) y[i] = survives(row, c + i) ? y[i] * d.gain : 0.0f;
      }
    }
    auto add = [&] {
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] += other[i];
    };
    if (d.residual.data) {
      load_rows(other, kResidual, row, c, valid);
      add();
    }
    const int rows = d.skip & 3;
    if (rows == 3 || (rows == 1 && !d.input_residual.data)) {
      load_sum(other, row, c, valid);
      add();
    } else if (rows == 1) {
      load_rows(other, kX, row, c, valid);
      add();
    } else if (rows == 2) {
      load_rows(other, kInput, row, c, valid);
      add();
    }
    if (d.skip & 4) {
      load_sum(other, row, c, valid);
      normalise(other, fact(kMean, row), fact(kRstd, row), d.norm_weight, d.norm_bias, c, valid);
      add();
    }
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = i < valid ? y[i] : 0.0f;
  }

  // Sums over the tile's rows of what threads have for their column, in an order that never changes.
  __device__ __forceinline__ void store_column_sums(float* to, int k, const float (&own)[V]) const {
    float total[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      total[i] = own[i] + __shfl_xor_sync(0xffffffffu, own[i], 8);
      total[i] += __shfl_xor_sync(0xffffffffu, total[i], 16);
    }
    __syncthreads();
    if (lane < kPieces) {
#pragma unroll
      for (int i = 0; i < V; ++i) sums[warp * kWidth + lane * V + i] = total[i];
    }
    __syncthreads();
    const int c = threadIdx.x;
    if (c >= kWidth || k * kWidth + c >= d.channels) return;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kWidth + c];
    to[k * kWidth + c] = sum;
  }
};

}  // namespace mmk::adapter
