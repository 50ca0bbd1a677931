// Adapters with the norms and residuals around them, on tensor cores by mma.sync, for compute capability 8.0 and newer.
// A block owns a tile of rows of one adapter and walks channels and bottleneck in chunks of 128 bytes. Between products
// rows pass through shared memory, so that whatever is element by element is done by threads that have 16 bytes of a
// row ("pieces", eight to a chunk) and read and write memory in whole lines. mmkernels/ops/adapter/README.md has the
// derivation and the time model.
#include <climits>
#include <type_traits>

#include "adapter/adapter_device.cuh"
#include "common/dropout.h"
#include "common/tile.cuh"

namespace mmk::adapter {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kOwn = kMostTile * kPieces / kThreads;  // pieces of a chunk that a thread has at most
template <class T>
constexpr int kChunkBytesOf = kChunk<T> * kRowBytes;  // of a chunk of a weight

// Shared memory: facts of rows, sums, two stages (a weight's chunk and a chunk of rows), the bottleneck (backward: and
// its gradient), resident rows.
constexpr int kFacts = 8;
constexpr int kFactBytes = kMostTile * 8 * 4 + kFacts * kMostTile * 4, kSumBytes = kWarps * 64 * 4;

int64_t bytes_of(int chunk, int channels, int bottleneck, int tile, bool resident, bool backward) {
  const int64_t row_chunk = tile * kRowBytes, hidden = (bottleneck + chunk - 1) / chunk;
  const int64_t kept = resident ? (channels + chunk - 1) / chunk : 0;
  return kFactBytes + (backward ? kSumBytes : 0) + 2 * (chunk * kRowBytes + row_chunk) +
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
    offsets = numbers + kMostTile;
    facts = reinterpret_cast<float*>(numbers + 4 * kMostTile);
    sums = facts + kFacts * kMostTile;
    row_chunk = tile * kRowBytes;
    stage = kChunkBytesOf<T> + row_chunk;
    ring = shared + kFactBytes + (hidden_copies - 1) * kSumBytes;  // the forward has no sums
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
      offsets[kX * kMostTile + row] = m < 0 ? 0 : offset(d, d.x, m);
      offsets[kInput * kMostTile + row] = m < 0 || !d.input_residual.data ? 0 : offset(d, d.input_residual, m);
      offsets[kResidual * kMostTile + row] = m < 0 || !d.residual.data ? 0 : offset(d, d.residual, m);
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

  __device__ __forceinline__ float& fact(Fact which, int row) const { return facts[which * kMostTile + row]; }
  __device__ __forceinline__ int own_adapter() const { return known ? adapter : 0; }
  __device__ __forceinline__ int chunks(int size) const { return (size + kWidth - 1) / kWidth; }
  // Threads from here on have no piece; whole warps of them.
  __device__ __forceinline__ bool has(int own) const {
    return static_cast<int>(threadIdx.x) + own * kThreads < tile * kPieces;
  }
  __device__ __forceinline__ int row(int own) const { return (threadIdx.x + own * kThreads) / kPieces; }
  __device__ __forceinline__ int piece_column() const { return threadIdx.x % kPieces * V; }

  // body(own, row, m, c, valid) for every piece of chunk k that lies in a row, `own` known when it is unrolled.
  template <class Body>
  __device__ __forceinline__ void each_piece(int k, Body body) const {
    const int c = k * kWidth + piece_column(), valid = min(d.channels - c, V);
#pragma unroll
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
    load_piece<T, V>(to, static_cast<const T*>(data) + offsets[which * kMostTile + row] + c, valid, d.by_vector);
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
#pragma unroll
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

// --- The forward ---

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Adapter d) {
  const Block<T> block(d, 1);
  constexpr int V = Block<T>::V;
  const int chunks = block.chunks(d.channels);
  if (block.adapter > d.adapters + 1) return;
  float* statistics = d.statistics;
  const float columns = static_cast<float>(d.channels);
  if (d.resident || d.norm_weight.data) {
    Moments moments[kOwn];
    for (int k = 0; k < chunks; ++k) {
      if (d.resident) {
        block.fill_chunk(block.kept + k * block.row_chunk, k, kComputed,
                         [&](int own, int row, int64_t, int c, int valid, float (&s)[V]) {
                           block.load_s(s, row, c, valid);
                           if (d.norm_weight.data) moments[own].add(s, valid);
                         });
      } else {
        block.each_piece(k, [&](int own, int row, int64_t, int c, int valid) {
          float s[V];
          block.load_s(s, row, c, valid);
          moments[own].add(s, valid);
        });
      }
    }
    if (d.norm_weight.data) {
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        if (!block.has(own)) continue;
        moments[own].gather();
        const int row = block.row(own);
        const int64_t m = block.numbers[row];
        if (threadIdx.x % kPieces != 0 || m < 0) continue;
        const float rstd = 1.0f / sqrtf(moments[own].squares / columns + d.eps);
        statistics[m] = block.fact(kMean, row) = moments[own].mean;
        statistics[d.rows + m] = block.fact(kRstd, row) = rstd;
      }
      statistics += 2 * d.rows;
    }
    __syncthreads();
  }
  if (block.known) block.down(false);
  Moments moments[kOwn];
  const bool normed = d.out_weight.data;
  auto result = [&](int own, int row, int64_t m, int c, int valid, float (&y)[V]) {
    block.finish(y, row, c, valid);
    if (normed) {
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = to_float(from_float<T>(y[i]));
      moments[own].add(y, valid);
      if (d.resident) {
        store_elements<T, V>(block.at(block.kept + c / Block<T>::kWidth * block.row_chunk, row, c % Block<T>::kWidth),
                             0, y);
        return;
      }
    }
    block.store_dense(d.out, m, c, y, valid);
  };
  if (block.known) {
    block.template up<true>(block.hidden, d.w_up, result, [](int) {});
  } else {
    for (int k = 0; k < chunks; ++k) {
      block.each_piece(k, [&](int own, int row, int64_t m, int c, int valid) {
        float y[V] = {};
        result(own, row, m, c, valid, y);
      });
    }
  }
  if (!normed) return;
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    if (!block.has(own)) continue;
    moments[own].gather();
    moments[own].squares = 1.0f / sqrtf(moments[own].squares / columns + d.out_eps);
    const int64_t m = block.numbers[block.row(own)];
    if (threadIdx.x % kPieces != 0 || m < 0) continue;
    statistics[m] = moments[own].mean;
    statistics[d.rows + m] = moments[own].squares;
  }
  // Every thread reads what it has written itself.
  for (int k = 0; k < chunks; ++k) {
    block.each_piece(k, [&](int own, int row, int64_t m, int c, int valid) {
      float y[V];
      if (d.resident) {
        load_piece<T, V>(y, block.at(block.kept + k * block.row_chunk, row, c - k * Block<T>::kWidth), valid, true);
      } else {
        block.load_dense(y, d.out, m, c, valid);
      }
      block.normalise(y, moments[own].mean, moments[own].squares, d.out_weight, d.out_bias, c, valid);
      block.store_dense(d.out, m, c, y, valid);
    });
  }
}

// --- The backward ---

template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const __grid_constant__ Adapter d) {
  const Block<T> block(d, 2);
  constexpr int V = Block<T>::V, kWidth = Block<T>::kWidth;
  using Sums = typename Block<T>::Sums;
  const int chunks = block.chunks(d.channels);
  const float columns = static_cast<float>(d.channels);
  const float* statistics = d.statistics;
  // A block beyond the last tile has no rows; it writes zeros into sums.
  for (int row = threadIdx.x; row < block.tile; row += kThreads) {
    const int64_t m = block.numbers[row];
    const float* found = statistics;
    if (d.norm_weight.data) {
      if (m >= 0) block.fact(kMean, row) = found[m], block.fact(kRstd, row) = found[d.rows + m];
      found += 2 * d.rows;
    }
    block.fact(kFirst, row) = block.fact(kSecond, row) = block.fact(kThird, row) = 0.0f;
    if (d.out_weight.data && m >= 0) block.fact(kFirst, row) = found[m], block.fact(kSecond, row) = found[d.rows + m];
  }
  __syncthreads();

  // The bottleneck, and the slope of the activation.
  block.down(true);

  // The result again, for the averages that its norm's gradient subtracts; normalised it waits in dy.
  float average[kOwn] = {}, average_normed[kOwn] = {};
  if (d.out_weight.data) {
    float dgain[V], dbias[V];
    auto clear = [&] {
#pragma unroll
      for (int i = 0; i < V; ++i) dgain[i] = dbias[i] = 0.0f;
    };
    clear();
    block.template up<true>(
        block.hidden, d.w_up,
        [&](int own, int row, int64_t m, int c, int valid, float (&y)[V]) {
          block.finish(y, row, c, valid);
          float incoming[V], gain[V];
          block.load_dense(incoming, d.dout, m, c, valid);
          block.load_vector(gain, d.out_weight, c, valid);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            y[i] = (y[i] - block.fact(kFirst, row)) * block.fact(kSecond, row);
            dgain[i] += incoming[i] * y[i];
            dbias[i] += incoming[i];
            average[own] += product(incoming[i], gain[i]);
            average_normed[own] += incoming[i] * gain[i] * y[i];
          }
          block.store_dense(d.dy, m, c, y, valid);
        },
        [&](int n) {
          if (!d.out_sums) return;
          block.store_column_sums(d.out_sums + int64_t{blockIdx.x} * d.channels, n, dgain);
          block.store_column_sums(d.out_sums + (int64_t{gridDim.x} + blockIdx.x) * d.channels, n, dbias);
          clear();
        });
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!block.has(own)) continue;
      average[own] = sum_of_row(average[own]) / columns;
      average_normed[own] = sum_of_row(average_normed[own]) / columns;
    }
  }

  // Through the up projection and the activation.
  const void* dy = d.out_weight.data ? d.dy : d.dout;
  float of_bias[kOwn] = {};
  const int half_rows[2] = {block.first_row + block.lane / 4, block.first_row + block.lane / 4 + 8};
  float* of_rows = block.sums;  // (across, rows): of dgate
  __syncthreads();              // the sums of columns have been read
  if (threadIdx.x < kMostTile) of_rows[threadIdx.x] = 0.0f;
  block.template products<false>(
      d.bottleneck, d.channels,
      [&](unsigned char* to, int n, int k) {
        block.fill_weight(to, d.w_up, d.channels, d.bottleneck, k, n);
        const bool of_gate = d.dgate && d.b_up.data && block.known && n == 0;
        const bool copied = !d.out_weight.data && !of_gate && !d.scale.data && !d.seed;
        block.fill_chunk(to + kChunkBytesOf<T>, k, copied ? kDense : kComputed,
                         [&](int own, int row, int64_t m, int c, int valid, float (&dl)[V]) {
                           float other[V];
                           block.load_dense(dl, dy, m, c, valid);
                           if (d.out_weight.data && n == 0) {
                             float gain[V];
                             block.load_dense(other, d.dout, m, c, valid);
                             block.load_vector(gain, d.out_weight, c, valid);
#pragma unroll
                             for (int i = 0; i < V; ++i)
                               dl[i] = (product(other[i], gain[i]) - average[own] - dl[i] * average_normed[own]) *
                                       block.fact(kSecond, row);
                             block.store_dense(d.dy, m, c, dl, valid);
                           }
                           if (d.scale.data) {
                             block.load_scale(other, c, valid);
#pragma unroll
                             for (int i = 0; i < V; ++i) dl[i] *= other[i];
                           }
#pragma unroll
                           for (int i = 0; i < V; ++i) {
                             if (d.seed) dl[i] = block.survives(row, c + i) ? dl[i] * d.gain : 0.0f;
                             if (i >= valid) dl[i] = 0.0f;
                           }
                           if (of_gate) {
                             block.load_vector(other, d.b_up, int64_t{block.adapter} * d.channels + c, valid);
#pragma unroll
                             for (int i = 0; i < V; ++i) of_bias[own] += dl[i] * other[i] * d.factor;
                           }
                         });
      },
      [&](unsigned char* from, int, int step) { return block.plain(from + kChunkBytesOf<T>, step); },
      [&](unsigned char*, int n, Sums& sums) {
        float total[2] = {};
        block.each_element([&](int j, int i, int row, int column) {
          const float da = block.known ? sums[j][i] * d.factor : 0.0f;
          T* a = block.at(block.hidden + n * block.row_chunk, row, column);
          T* dz = block.at(block.dhidden + n * block.row_chunk, row, column);
          if (block.known) total[i / 2] += da * to_float(*a);
          *dz = from_float<T>(block.known ? da * block.fact(kGain, row) * to_float(*dz) : 0.0f);
        });
        if (d.dgate) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(total[half]);
            if (block.lane % 4 == 0) of_rows[block.share * block.tile + half_rows[half]] += sum;
          }
        }
      });
  __syncthreads();
  if (d.dgate) {
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!block.has(own)) continue;
      float sum = sum_of_row(of_bias[own]);
      const int64_t m = block.numbers[block.row(own)];
      if (threadIdx.x % kPieces != 0 || m < 0) continue;
      for (int w = 0; w < block.across; ++w) sum += of_rows[w * block.tile + block.row(own)];
      d.dgate[m] = sum;
    }
  }
  // For the gradients of the weights.
  for (int n = 0; n < block.chunks(d.bottleneck); ++n) {
    const int j = n * kWidth + block.piece_column(), valid = min(d.bottleneck - j, V);
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      if (!block.has(own) || block.numbers[block.row(own)] < 0 || valid <= 0) continue;
      const int64_t to = (block.begin + block.row(own)) * d.bottleneck + j;
      const bool by_vector = d.bottleneck % V == 0;
      float values[V];
      load_piece<T, V>(values, block.at(block.hidden + n * block.row_chunk, block.row(own), j - n * kWidth), V, true);
      store_piece<T, V>(static_cast<T*>(d.hidden) + to, values, valid, by_vector);
      load_piece<T, V>(values, block.at(block.dhidden + n * block.row_chunk, block.row(own), j - n * kWidth), V, true);
      store_piece<T, V>(static_cast<T*>(d.dhidden) + to, values, valid, by_vector);
    }
  }
  if (!d.dx && !d.dinput && !d.norm_sums) return;

  // Through the down projection and the first norm; before its averages are known the gradient waits in dx or dinput.
  float dgain[V], dbias[V];
  auto clear = [&] {
#pragma unroll
    for (int i = 0; i < V; ++i) dgain[i] = dbias[i] = 0.0f;
  };
  clear();
#pragma unroll
  for (int own = 0; own < kOwn; ++own) average[own] = average_normed[own] = 0.0f;
  void* waiting = d.dx ? d.dx : d.dinput;
  auto store = [&](int64_t m, int c, const float (&ds)[V], int valid) {
    float own[V] = {}, value[V];
    if (d.skip & 3) block.load_dense(own, dy, m, c, valid);
    if (d.dx) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = d.skip & 1 ? ds[i] + own[i] : ds[i];
      block.store_dense(d.dx, m, c, value, valid);
    }
    if (d.dinput) {
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = d.skip & 2 ? ds[i] + own[i] : ds[i];
      block.store_dense(d.dinput, m, c, value, valid);
    }
  };
  block.template up<false>(
      block.dhidden, d.w_down,
      [&](int own, int row, int64_t m, int c, int valid, float (&ds)[V]) {
        if (d.skip & 4) {
          float incoming[V];
          block.load_dense(incoming, dy, m, c, valid);
#pragma unroll
          for (int i = 0; i < V; ++i) ds[i] += incoming[i];
        }
        if (!d.norm_weight.data) {
          store(m, c, ds, valid);
          return;
        }
        float s[V], gain[V];
        block.load_s(s, row, c, valid);
        block.load_vector(gain, d.norm_weight, c, valid);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float normed = (s[i] - block.fact(kMean, row)) * block.fact(kRstd, row);
          if (i >= valid) ds[i] = 0.0f;
          dgain[i] += ds[i] * normed;
          dbias[i] += ds[i];
          ds[i] = product(ds[i], gain[i]);
          average[own] += ds[i];
          average_normed[own] += ds[i] * normed;
        }
        if (waiting) block.store_dense(waiting, m, c, ds, valid);
      },
      [&](int n) {
        if (!d.norm_sums) return;
        block.store_column_sums(d.norm_sums + int64_t{blockIdx.x} * d.channels, n, dgain);
        block.store_column_sums(d.norm_sums + (int64_t{gridDim.x} + blockIdx.x) * d.channels, n, dbias);
        clear();
      });
  if (!d.norm_weight.data || !waiting) return;
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    if (!block.has(own)) continue;
    average[own] = sum_of_row(average[own]) / columns;
    average_normed[own] = sum_of_row(average_normed[own]) / columns;
  }
  for (int k = 0; k < chunks; ++k) {
    block.each_piece(k, [&](int own, int row, int64_t m, int c, int valid) {
      float s[V], ds[V];
      block.load_s(s, row, c, valid);
      block.load_dense(ds, waiting, m, c, valid);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float normed = (s[i] - block.fact(kMean, row)) * block.fact(kRstd, row);
        ds[i] = (ds[i] - average[own] - normed * average_normed[own]) * block.fact(kRstd, row);
      }
      store(m, c, ds, valid);
    });
  }
}

// --- The gradients of the weights ---

constexpr int kPartRows = 64;

// One part of an adapter's rows, a chunk of channels and one of the bottleneck: warps 0 to 3 make dz^T u, 4 to 7 dl^T
// a.
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 1 : 2) weight_kernel(const __grid_constant__ Adapter d) {
  constexpr int kWidth = kChunk<T>, V = kWide<T>, kTile = kPartRows * kRowBytes;
  const int channel_chunks = (d.channels + kWidth - 1) / kWidth;
  const int hidden_chunks = (d.bottleneck + kWidth - 1) / kWidth;
  const int first_c = blockIdx.x % channel_chunks * kWidth;
  const int first_j = blockIdx.x / channel_chunks % hidden_chunks * kWidth;
  const int64_t part = blockIdx.x / (channel_chunks * hidden_chunks);
  int64_t begin = part * d.part, end = min(begin + d.part, d.rows);
  if (d.mode == Mode::grouped) {
    const Piece piece = find(d.begins, d.adapters, d.group_rows, d.part, part);
    if (piece.group >= d.adapters) return;
    begin = piece.begin, end = piece.end;
  }
  unsigned char* shared = shared_memory();
  unsigned char *dz_tile = shared, *u_tile = shared + kTile, *dl_tile = shared + 2 * kTile,
                *a_tile = shared + 3 * kTile;
  auto* sums = reinterpret_cast<float*>(shared + 4 * kTile);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = threadIdx.x % kPieces * V;
  const int c = first_c + column, j = first_j + column;
  const int valid_c = max(min(d.channels - c, V), 0), valid_j = max(min(d.bottleneck - j, V), 0);
  const bool want_down = d.down_parts || d.bias_parts, want_up = d.up_parts || d.dl_parts;
  const bool by_vector = d.bottleneck % V == 0;
  const float* mean = d.statistics;
  auto* rows_m = reinterpret_cast<int64_t*>(sums + kWarps * kWidth);  // and offsets of x and input_residual
  auto* gains = reinterpret_cast<float*>(rows_m + 3 * kPartRows);     // and the words of dropout
  float dz_sum[V] = {}, dl_sum[V] = {}, acc[kWidth / 8][4] = {};
#pragma unroll 1
  for (int64_t first = begin; first < end; first += kPartRows) {
    __syncthreads();
    if (const int row = threadIdx.x; row < kPartRows && first + row < end) {
      const int64_t m = rows_m[row] = row_of(d, first + row);
      rows_m[kPartRows + row] = offset(d, d.x, m);
      rows_m[2 * kPartRows + row] = d.input_residual.data ? offset(d, d.input_residual, m) : 0;
      gains[row] = (d.gate.data ? parameter<T>(d.gate, m / d.gate_rows) : 1.0f) * d.factor;
      if (d.seed) {
        const DropoutRow drop = dropout_row(static_cast<uint64_t>(*d.seed), static_cast<uint64_t>(m));
        gains[kPartRows + row] = __uint_as_float(drop.low), gains[2 * kPartRows + row] = __uint_as_float(drop.high);
      }
    }
    __syncthreads();
#pragma unroll
    for (int own = 0; own < kPartRows * kPieces / kThreads; ++own) {
      const int row = (threadIdx.x + own * kThreads) / kPieces,
                at = row * kRowBytes + column * static_cast<int>(sizeof(T));
      const int64_t p = first + row;
      float dz[V] = {}, u[V] = {}, dl[V] = {}, a[V] = {};
      if (p < end) {
        const int64_t m = rows_m[row];
        if (want_down && valid_j > 0)
          load_piece<T, V>(dz, static_cast<const T*>(d.dhidden) + p * d.bottleneck + j, valid_j, by_vector);
        if (d.down_parts && valid_c > 0) {
          load_piece<T, V>(u, static_cast<const T*>(d.x.data) + rows_m[kPartRows + row] + c, valid_c, d.by_vector);
          if (d.input_residual.data) {
            float other[V];
            load_piece<T, V>(other, static_cast<const T*>(d.input_residual.data) + rows_m[2 * kPartRows + row] + c,
                             valid_c, d.by_vector);
#pragma unroll
            for (int i = 0; i < V; ++i) u[i] = to_float(from_float<T>(u[i] + other[i]));
          }
          if (d.norm_weight.data) {
            float gain[V], bias[V] = {};
            load_parameter<T, V>(gain, d.norm_weight, c, valid_c, d.by_vector);
            if (d.norm_bias.data) load_parameter<T, V>(bias, d.norm_bias, c, valid_c, d.by_vector);
#pragma unroll
            for (int i = 0; i < V; ++i)
              u[i] = i < valid_c ? (u[i] - mean[m]) * mean[d.rows + m] * gain[i] + bias[i] : 0.0f;
          }
        }
        if (want_up && valid_c > 0) {
          load_piece<T, V>(dl, static_cast<const T*>(d.dy) + m * d.channels + c, valid_c, d.by_vector);
          const float gain = gains[row];
#pragma unroll
          for (int i = 0; i < V; ++i) dl[i] *= gain;
          if (d.seed) {
            const DropoutRow drop{__float_as_uint(gains[kPartRows + row]), __float_as_uint(gains[2 * kPartRows + row])};
#pragma unroll
            for (int i = 0; i < V; ++i)
              dl[i] = dropout_bits(drop, static_cast<uint32_t>(c + i)) >= d.threshold ? dl[i] * d.gain : 0.0f;
          }
        }
        if (d.up_parts && valid_j > 0)
          load_piece<T, V>(a, static_cast<const T*>(d.hidden) + p * d.bottleneck + j, valid_j, by_vector);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) dz_sum[i] += dz[i], dl_sum[i] += dl[i];
      store_elements<T, V>(reinterpret_cast<T*>(dz_tile + at), 0, dz);
      store_elements<T, V>(reinterpret_cast<T*>(u_tile + at), 0, u);
      store_elements<T, V>(reinterpret_cast<T*>(dl_tile + at), 0, dl);
      store_elements<T, V>(reinterpret_cast<T*>(a_tile + at), 0, a);
    }
    __syncthreads();
    const int fragment = warp % 4;
    if (fragment * 16 >= kWidth || (warp < 4 ? !d.down_parts : !d.up_parts)) continue;
    const unsigned char *left = warp < 4 ? dz_tile : dl_tile, *right = warp < 4 ? u_tile : a_tile;
#pragma unroll
    for (int step = 0; step < kPartRows / kStep<T>; ++step) {
      const Operand<T> operand = load_left_turned<T>(left, kRowBytes, fragment * 16, step);
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 2) {
        uint32_t b[4];
        load_right<T, false>(b, right, kRowBytes, n * 8, step);
        multiply<T, true>(acc[n], operand, b[0], b[1]);
        multiply<T, true>(acc[n + 1], operand, b[2], b[3]);
      }
    }
  }
  float* out = warp < 4 ? d.down_parts : d.up_parts;
  const int rows = warp < 4 ? d.bottleneck : d.channels, columns = warp < 4 ? d.channels : d.bottleneck;
  const int first_row = warp < 4 ? first_j : first_c, first_column = warp < 4 ? first_c : first_j;
  if (out && warp % 4 * 16 < kWidth) {
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + warp % 4 * 16 + lane / 4 + i / 2 * 8;
        const int at = first_column + n * 8 + lane % 4 * 2 + i % 2;
        if (row < rows && at < columns) out[part * rows * columns + int64_t{row} * columns + at] = acc[n][i];
      }
    }
  }
  auto store_sums = [&](float* to, const float (&own)[V], int first, int size) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float total = own[i] + __shfl_xor_sync(0xffffffffu, own[i], 8);
      total += __shfl_xor_sync(0xffffffffu, total, 16);
      if (lane < kPieces) sums[warp * kWidth + lane * V + i] = total;
    }
    __syncthreads();
    const int at = threadIdx.x;
    if (at >= kWidth || first + at >= size) return;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kWidth + at];
    to[part * size + first + at] = sum;
  };
  if (d.bias_parts && first_c == 0) store_sums(d.bias_parts, dz_sum, first_j, d.bottleneck);
  if (d.dl_parts && first_j == 0) store_sums(d.dl_parts, dl_sum, first_c, d.channels);
}

struct Parts {
  int64_t first, end;
};

// The parts of an adapter. Every warp looks for itself.
__device__ __forceinline__ Parts parts_of(const Adapter& d, int adapter) {
  if (d.mode != Mode::grouped) return {0, (d.rows + d.part - 1) / d.part};
  int64_t before = 0, own = 0;
  for (int g = threadIdx.x % 32; g <= adapter; g += 32) {
    const int64_t rows = (d.begins[g + 1] - d.begins[g]) * d.group_rows, parts = (rows + d.part - 1) / d.part;
    (g == adapter ? own : before) += parts;
  }
  for (int bits = 16; bits; bits /= 2) {
    before += __shfl_xor_sync(0xffffffffu, before, bits);
    own += __shfl_xor_sync(0xffffffffu, own, bits);
  }
  return {before, before + own};
}

// out[adapter] = the sum of its parts of `size` numbers, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    part_sum_kernel(const __grid_constant__ Adapter d, const float* parts, T* out, int64_t size, int64_t blocks) {
  const int adapter = static_cast<int>(blockIdx.x / blocks);
  const Parts own = parts_of(d, adapter);
  const int64_t i = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.0f;
  for (int64_t p = own.first; p < own.end; ++p) sum += parts[p * size + i];
  out[adapter * size + i] = from_float<T>(sum);
}

// With P and q the sums of an adapter's parts of dl^T a and of dl: scale P, scale q, <P_c, W_up_c> + q b_up. A warp has
// a channel.
template <class T>
__global__ void __launch_bounds__(kThreads) up_sum_kernel(const __grid_constant__ Adapter d) {
  const int blocks = (d.channels + kWarps - 1) / kWarps, adapter = blockIdx.x / blocks, lane = threadIdx.x % 32;
  const Parts own = parts_of(d, adapter);
  const int c = blockIdx.x % blocks * kWarps + threadIdx.x / 32;
  if (c >= d.channels) return;
  const bool used = own.first < own.end;  // whatever an adapter without rows holds, its gradients are 0
  const int64_t at = int64_t{adapter} * d.channels + c;
  const float scale =
      d.scale.data && used ? parameter<T>(d.scale, adapter * d.scale_adapter + c * d.scale_channel) : 1.0f;
  float of_scale = 0.0f;
  if (d.up_parts) {
    for (int j = lane; j < d.bottleneck; j += 32) {
      float sum = 0.0f;
      for (int64_t p = own.first; p < own.end; ++p) sum += d.up_parts[(p * d.channels + c) * d.bottleneck + j];
      if (d.dw_up) static_cast<T*>(d.dw_up)[at * d.bottleneck + j] = from_float<T>(sum * scale);
      if (d.dscale && used) of_scale += sum * to_float(static_cast<const T*>(d.w_up)[at * d.bottleneck + j]);
    }
  }
  for (int bits = 16; bits; bits /= 2) of_scale += __shfl_xor_sync(0xffffffffu, of_scale, bits);
  if (lane != 0 || !d.dl_parts) return;
  float sum = 0.0f;
  for (int64_t p = own.first; p < own.end; ++p) sum += d.dl_parts[p * d.channels + c];
  if (d.db_up) d.db_up[at] = sum * scale;
  if (d.dscale) d.dscale[at] = of_scale + (d.b_up.data && used ? sum * parameter<T>(d.b_up, at) : 0.0f);
}

// One group a block: where it begins, and its items in their order.
__global__ void __launch_bounds__(kThreads)
    group_kernel(const int64_t* index, int count, int adapters, int* begins, int* order) {
  auto* warps = reinterpret_cast<int*>(shared_memory());
  const int group = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int before = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) before += group_of(index[i], adapters) < group;
  for (int bits = 16; bits; bits /= 2) before += __shfl_xor_sync(0xffffffffu, before, bits);
  if (lane == 0) warps[warp] = before;
  __syncthreads();
  int place = 0;
  for (int w = 0; w < kWarps; ++w) place += warps[w];
  if (threadIdx.x == 0) begins[group] = place, begins[adapters + 2] = count;
  for (int first = 0; first < count; first += kThreads) {
    const int i = first + threadIdx.x;
    const bool own = i < count && group_of(index[i], adapters) == group;
    const unsigned found = __ballot_sync(0xffffffffu, own);
    int here = 0, all = 0;
    for (int l = 0; l < 32; ++l) here += l < lane ? found >> l & 1 : 0, all += found >> l & 1;
    __syncthreads();
    if (lane == 0) warps[warp] = all;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) here += warps[w];
    }
    if (own) order[place + here] = i;
    for (int w = 0; w < kWarps; ++w) place += warps[w];
  }
}

template <class T>
int start_weights(const Adapter& d, void* stream) {
  constexpr int kWidth = kChunk<T>;
  const int64_t tiles = int64_t{(d.channels + kWidth - 1) / kWidth} * ((d.bottleneck + kWidth - 1) / kWidth);
  const int64_t blocks = d.parts * tiles;
  if (blocks > INT_MAX) return 1;
  return launch(weight_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                4 * kPartRows * kRowBytes + kWarps * kWidth * 4 + kPartRows * (3 * 8 + 3 * 4), stream, d);
}

template <class T>
int start_sums(const Adapter& d, void* stream) {
  int code = 0;
  auto sum = [&](const float* parts, auto* out, int64_t size) {
    const int64_t of_adapter = (size + kThreads - 1) / kThreads, all = of_adapter * d.adapters;
    if (code || !parts) return;
    if (all > INT_MAX) code = 1;
    if (!code)
      code = launch(part_sum_kernel<std::remove_reference_t<decltype(*out)>>, dim3(static_cast<unsigned>(all)),
                    dim3(kThreads), 0, stream, d, parts, out, size, of_adapter);
  };
  sum(d.down_parts, static_cast<T*>(d.dw_down), int64_t{d.bottleneck} * d.channels);
  sum(d.bias_parts, d.db_down, d.bottleneck);
  const int64_t up = int64_t{(d.channels + kWarps - 1) / kWarps} * d.adapters;
  if (code || (!d.up_parts && !d.dl_parts)) return code;
  return up > INT_MAX ? 1 : launch(up_sum_kernel<T>, dim3(static_cast<unsigned>(up)), dim3(kThreads), 0, stream, d);
}

}  // namespace

int64_t shared_bytes(Dtype dtype, int channels, int bottleneck, int tile, bool resident, bool backward) {
  return bytes_of(dtype == Dtype::fp32 ? kChunk<float> : kChunk<bf16>, channels, bottleneck, tile, resident, backward);
}

}  // namespace mmk::adapter

int mmk_adapter_forward(mmk::Dtype dtype, const mmk::adapter::Adapter* d, int64_t tiles, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) {
    const int64_t bytes = mmk::adapter::shared_bytes(dtype, d->channels, d->bottleneck, d->tile, d->resident, false);
    return mmk::launch(mmk::adapter::forward_kernel<decltype(zero)>, dim3(static_cast<unsigned>(tiles)),
                       dim3(mmk::adapter::kThreads), bytes, stream, *d);
  });
}

int mmk_adapter_backward(mmk::Dtype dtype, const mmk::adapter::Adapter* d, int64_t tiles, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) {
    const int64_t bytes = mmk::adapter::shared_bytes(dtype, d->channels, d->bottleneck, d->tile, false, true);
    return mmk::launch(mmk::adapter::backward_kernel<decltype(zero)>, dim3(static_cast<unsigned>(tiles)),
                       dim3(mmk::adapter::kThreads), bytes, stream, *d);
  });
}

int mmk_adapter_weights(mmk::Dtype dtype, const mmk::adapter::Adapter* d, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) { return mmk::adapter::start_weights<decltype(zero)>(*d, stream); });
}

int mmk_adapter_sums(mmk::Dtype dtype, const mmk::adapter::Adapter* d, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) { return mmk::adapter::start_sums<decltype(zero)>(*d, stream); });
}

int mmk_adapter_group(const int64_t* index, int64_t count, int adapters, int* begins, int* order, void* stream) {
  return mmk::launch(mmk::adapter::group_kernel, dim3(static_cast<unsigned>(adapters + 2)),
                     dim3(mmk::adapter::kThreads), mmk::adapter::kWarps * 4, stream, index, static_cast<int>(count),
                     adapters, begins, order);
}
