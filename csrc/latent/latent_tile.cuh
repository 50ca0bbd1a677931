// What the kernels of the latent family share: the tile of rows that a block accumulates, products of shared tiles, the
// way of q, dout and x into shared memory (x becomes xhat there), and the choice of a tile that fits.
//
// Channels are ordered [position ; content] inside the kernels, so that the wide part starts at an even column.
#pragma once
#include "common/cuda_device.h"
#include "common/ptx.cuh"
#include "common/tile.cuh"
#include "latent/latent_cuda.h"

namespace mmk::latent {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes; an mma is two of them deep

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
// What counts blocks, heads or tiles: a grid holds them, and 64 bits are divided in a hundred instructions.
__host__ __device__ constexpr unsigned small(int64_t x) { return static_cast<unsigned>(x); }
__host__ __device__ inline int channels(const Problem& p) { return p.position + p.content; }
__host__ __device__ inline int padded(const Problem& p) { return round_up(channels(p), 16); }

// Where channel c of the kernels stands outside.
__device__ __forceinline__ int output_channel(const Problem& p, int c) {
  return c < p.position ? c + p.content : c - p.position;
}

// --- Who does what ---

// Eight warps as Groups x ColumnGroups. A warp accumulates 16 * Fragments rows by up to 16 * Pairs channels: of the
// 16-channel pairs of mma columns, every ColumnGroups-th one. The scores of a block of Columns columns are made by the
// first kScoreGroups warps of each group, for the rows that the warp accumulates.
template <int Groups, int Fragments, int Pairs, int Columns>
struct Tile {
  static constexpr int kFragments = Fragments, kPairs = Pairs, kColumns = Columns;
  static constexpr int kRows = 16 * Fragments * Groups;
  static constexpr int kColumnGroups = kWarps / Groups;
  static constexpr int kScoreGroups = kColumnGroups < Columns / 8 ? kColumnGroups : Columns / 8;
  static constexpr int kScores = Columns / kScoreGroups / 8;  // mma column fragments of a warp
  static constexpr int kChannels = 16 * Pairs * kColumnGroups;
  static constexpr int kResident = Pairs <= 2 ? 2 : 1;  // blocks of a multiprocessor that the registers must allow
};

// Where a thread stands. Accumulator element i of fragment (m, n): row m * 16 + g + 8 * (i / 2), column 2 * t + i % 2.
template <class Tile>
struct Thread {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int column_group = threadIdx.x / 32 % Tile::kColumnGroups;
  int first_row = threadIdx.x / 32 / Tile::kColumnGroups * 16 * Tile::kFragments;
  bool scores = column_group < Tile::kScoreGroups;
  int first_score = column_group * 8 * Tile::kScores;

  __device__ int row(int m, int half) const { return first_row + m * 16 + g + 8 * half; }
  __device__ int score(int n) const { return first_score + n * 8 + 2 * t; }
  __device__ int pair(int p) const { return column_group + p * Tile::kColumnGroups; }
};

// A block's part of the work: one tile of rows, the keys of one split, one example. Tiles of rows that read the same
// keys run side by side.
struct Share {
  int64_t batch, split, first_row, first_key, last_key;

  __device__ Share(const Problem& p, const Plan& plan, int rows, int columns) {
    const unsigned block = blockIdx.x / small(plan.row_tiles);
    first_row = static_cast<int64_t>(blockIdx.x % small(plan.row_tiles)) * rows;
    split = block % small(plan.splits);
    batch = block / small(plan.splits);
    const int64_t tiles = ceil_div(plan.key_tiles, plan.splits);
    first_key = split * tiles * columns;
    last_key = min(p.keys, first_key + tiles * columns);
  }
};

// --- Matrix products on shared tiles ---

template <int M, int N>
__device__ __forceinline__ void clear(float (&d)[M][N][4]) {
#pragma unroll
  for (int i = 0; i < M * N * 4; ++i) d[i / 4 / N][i / 4 % N][i % 4] = 0.0f;
}

// d = a b^T over `depth` channels; a: 16 * M rows, b: 8 * N rows of `pitch` elements. WithSmall: see multiply.
template <class T, bool WithSmall = false, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[M][N][4], const T* a, const T* b, int pitch, int depth) {
  const int lane = threadIdx.x % 32, row_bytes = pitch * static_cast<int>(sizeof(T));
  b += (lane % 8 + (N > 1 ? lane / 16 * 8 : 0)) * pitch + lane / 8 % 2 * kVector<T>;
  clear(d);
#pragma unroll 2
  for (int k = 0; k < depth; k += 2 * kVector<T>) {
    uint32_t fb[N][2];
    if constexpr (N == 1) {
      ptx::ldmatrix_x2(fb[0], b + k);
    } else {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        uint32_t two[4];
        ptx::ldmatrix_x4(two, b + n * 8 * pitch + k);
        fb[n][0] = two[0], fb[n][1] = two[1], fb[n + 1][0] = two[2], fb[n + 1][1] = two[3];
      }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const Operand<T> fa = load_left<T>(a + m * 16 * pitch + k, row_bytes);
#pragma unroll
      for (int n = 0; n < N; ++n) multiply<T, WithSmall>(d[m][n], fa, fb[n][0], fb[n][1]);
    }
  }
}

// The b operands of a 2 * kVector x 16 piece of a tile of rows.
template <class T>
__device__ __forceinline__ void load_columns(uint32_t (&b)[4], const T* tile, int pitch, int lane) {
  if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(b, tile + lane % 16 * pitch + lane / 16 * 8);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      b[i] = __float_as_uint(tile[(lane % 4 + i % 2 * 4) * pitch + lane / 4 + i / 2 * 8]);
    }
  }
}

// sum += w tile over the block's columns; w: this warp's rows of weights, tile: a row of channels for each column.
template <class T, class Tile, bool WithSmall = false>
__device__ __forceinline__ void accumulate(float (&sum)[Tile::kFragments][2 * Tile::kPairs][4], const T* w, int w_pitch,
                                           const T* tile, int pitch, int pairs, const Thread<Tile>& at) {
#pragma unroll 1
  for (int k = 0; k < Tile::kColumns; k += 2 * kVector<T>) {
    Operand<T> a[Tile::kFragments];
#pragma unroll
    for (int m = 0; m < Tile::kFragments; ++m) {
      a[m] = load_left<T>(w + m * 16 * w_pitch + k, w_pitch * static_cast<int>(sizeof(T)));
    }
#pragma unroll
    for (int p = 0; p < Tile::kPairs; ++p) {
      if (at.pair(p) < pairs) {
        uint32_t b[4];
        load_columns(b, tile + k * pitch + at.pair(p) * 16, pitch, at.lane);
#pragma unroll
        for (int m = 0; m < Tile::kFragments; ++m) {
          multiply<T, WithSmall>(sum[m][2 * p], a[m], b[0], b[1]);
          multiply<T, WithSmall>(sum[m][2 * p + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void store_two(T* to, float first, float second) {
  if constexpr (sizeof(T) == 2) {
    *reinterpret_cast<uint32_t*>(to) = pack<T>(first, second);
  } else {
    *reinterpret_cast<float2*>(to) = make_float2(first, second);
  }
}

// Hands out the accumulator, act(m, half, channel, value), which is lost. Registers have no index: the columns move up
// to the first pair's place one pair after another, so that this stays a loop with the code of one pair and not of all.
template <class Tile, class Act>
__device__ __forceinline__ void drain(float (&sum)[Tile::kFragments][2 * Tile::kPairs][4], const Thread<Tile>& at,
                                      Act act) {
#pragma unroll 1
  for (int pair = 0; pair < Tile::kPairs; ++pair) {
#pragma unroll
    for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int half = i / 4, n = i / 2 % 2;
        act(m, half, at.pair(pair) * 16 + n * 8 + 2 * at.t + i % 2, sum[m][n][2 * half + i % 2]);
      }
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs - 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] = sum[m][n + 2][i];
      }
    }
  }
}

// --- Online softmax ---

// Scores become scale * score + bias; the highest of this warp's columns goes to `exchange` for each of its rows.
template <class Tile>
__device__ __forceinline__ void scale_scores(float (&s)[Tile::kFragments][Tile::kScores][4], float scale,
                                             const float* bias, float* exchange, const Thread<Tile>& at) {
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = -INFINITY;
#pragma unroll
      for (int n = 0; n < Tile::kScores; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[m][n][i] = s[m][n][i] * scale + bias[at.score(n) + i % 2];
          best = fmaxf(best, s[m][n][i]);
        }
      }
      best = quad_max(best);
      if (at.t == 0) exchange[at.row(m, half) * Tile::kScoreGroups + at.column_group] = best;
    }
  }
}

// The highest score of a row so far.
template <class Tile>
__device__ __forceinline__ float highest(float top, const float* exchange, int row, const Thread<Tile>&) {
#pragma unroll
  for (int i = 0; i < Tile::kScoreGroups; ++i) top = fmaxf(top, exchange[row * Tile::kScoreGroups + i]);
  return top;
}

template <int M, int N>
__device__ __forceinline__ void shrink(float (&sum)[M][N][4], const float (&decay)[M][2]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[m][n][i] *= decay[m][i / 2];
    }
  }
}

// Sums over this warp's columns, for the score groups to be added in their order.
template <class Tile>
__device__ __forceinline__ void publish_sums(const float (&sums)[Tile::kFragments][2], float* exchange,
                                             const Thread<Tile>& at) {
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(sums[m][half]);
      if (at.t == 0) exchange[at.row(m, half) * Tile::kScoreGroups + at.column_group] = sum;
    }
  }
}

// --- Dropout ---

// What a weight of row `row` (counted over batch and rows) and of key `key` of the problem is multiplied by.
__device__ __forceinline__ float keep_factor(const Problem& p, DropoutRow row, int64_t key) {
  return dropout_bits(row, p.first_key + static_cast<uint32_t>(key)) < p.drop_below ? 0.0f : p.keep_scale;
}

// --- The gradient of a score ---

// P from the saved log-sum-exp. A row without keys has lse -inf: +inf instead makes its weights zero.
__device__ __forceinline__ float shift_of(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

// dS = P (dP - delta); where P is zero nothing of dP counts, not even NaN.
__device__ __forceinline__ float score_gradient(float weight, float dweight, float delta) {
  return weight > 0.0f ? weight * (dweight - delta) : 0.0f;
}

// --- From device memory to shared memory ---

// The places of this thread where the block's threads take a matrix of `columns` columns one after another: with a
// division for all of them and not for each.
struct Walk {
  int columns, rows_on, columns_on, row, column;

  __device__ explicit Walk(int columns, int thread = threadIdx.x, int threads = kThreads)
      : columns(columns),
        rows_on(threads / columns),
        columns_on(threads % columns),
        row(thread / columns),
        column(thread % columns) {}

  __device__ void next() {
    row += rows_on;
    column += columns_on;
    if (column >= columns) column -= columns, ++row;
  }
};

// `count` rows of `width` elements, `stride` apart, in pieces of `Bytes`, to which they are aligned; rows that are not
// `inside` and the padding become zeros. cp.async, not yet committed.
template <class T, int Bytes, class Inside>
__device__ void copy_rows(const T* source, int64_t stride, int width, T* tile, int count, int pitch, Inside inside) {
  constexpr int kPiece = Bytes / static_cast<int>(sizeof(T));
  const int pieces = round_up(width, 16) / kPiece;
  Walk at(pieces);
#pragma unroll 1
  for (; at.row < count; at.next()) {
    const int r = at.row, c = at.column * kPiece;
    const int valid = inside(r) ? min(max(width - c, 0), kPiece) * static_cast<int>(sizeof(T)) : 0;
    const T* from = valid ? source + r * stride + c : source;
    if constexpr (Bytes >= 4) {
      ptx::cp_async<Bytes>(tile + r * pitch + c, from, valid);
    } else {
      tile[r * pitch + c] = valid ? *from : from_float<T>(0.0f);
    }
  }
}

// Rows of q or dout into a tile; rows past the end and the padding become zeros. cp.async, not yet committed.
template <class T>
__device__ void load_rows(const Problem& p, const QueryRows& rows, int64_t batch, int64_t first, T* tile, int count,
                          int pitch) {
  const T* source = static_cast<const T*>(rows.data) + batch * rows.batch + first * rows.row;
  copy_rows<T, 16>(source, rows.row, channels(p), tile, count, pitch, [&](int r) { return first + r < p.rows; });
}

// One of the two parts of the keys' rows, [key][channel].
template <class T>
struct Part {
  const T* data;
  int64_t key, channel;
  int width;

  __device__ const T* row(int r) const { return data + r * key; }
  __device__ bool dense() const { return key == width; }
};

template <class T>
__device__ Part<T> table_part(const Problem& p, int64_t first) {
  return {static_cast<const T*>(p.table) + first * p.table_key, p.table_key, p.table_channel, p.position};
}

template <class T>
__device__ Part<T> content_part(const Problem& p, int64_t batch, int64_t first) {
  return {static_cast<const T*>(p.x) + batch * p.x_batch + first * p.x_key, p.x_key, p.x_channel, p.content};
}

// Raw rows in shared memory, at the same distance from a multiple of 16 bytes as in device memory: then 16 bytes are
// copied at a time whatever the width. Dense rows follow one another there too.
template <class T>
__host__ __device__ int raw_pitch(int width) {
  return round_up(width * static_cast<int>(sizeof(T)), 16) + 16;
}

__device__ __forceinline__ int lead(const void* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); }

template <class T>
__device__ void stage(const Part<T>& part, int rows, unsigned char* raw, int thread = threadIdx.x,
                      int threads = kThreads) {
  const int spans = part.dense() ? 1 : rows;
  const int bytes = (part.dense() ? rows : 1) * part.width * static_cast<int>(sizeof(T));
  const int chunks = (bytes + 30) / 16;  // as many as a span can touch
  Walk at(chunks, thread, threads);
#pragma unroll 1
  for (; at.row < spans; at.next()) {
    const int r = at.row, c = at.column;
    const char* source = reinterpret_cast<const char*>(part.row(r));
    unsigned char* to = raw + r * raw_pitch<T>(part.width) + c * 16;
    const int from = c * 16 - lead(source);
    if (from >= 0 && from + 16 <= bytes) {
      ptx::cp_async<16>(to, source + from);
    } else {
      for (int b = max(from, 0); b < min(from + 16, bytes); b += sizeof(T)) {
        *reinterpret_cast<T*>(to + (b - from)) = *reinterpret_cast<const T*>(source + b);
      }
    }
  }
}

template <class T>
__device__ const T* staged_row(const Part<T>& part, const unsigned char* raw, int r) {
  if (part.dense()) return reinterpret_cast<const T*>(raw + lead(part.data)) + r * part.width;
  return reinterpret_cast<const T*>(raw + r * raw_pitch<T>(part.width) + lead(part.row(r)));
}

// Element by element, straight into the tile: for any strides, and where nothing is left for a second copy.
template <class T>
__device__ void copy_part(const Part<T>& part, int rows, T* tile, int pitch) {
  for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
#pragma unroll 4
    for (int c = threadIdx.x % 32; c < part.width; c += 32) tile[r * pitch + c] = part.row(r)[c * part.channel];
  }
}

__device__ __forceinline__ int rows_left(int64_t total, int64_t first, int count) {
  return static_cast<int>(total - first < count ? total - first : count);
}

// xhat of key `first + r` into its row of the tile, from its raw parts in shared memory (which may be that very row).
// `bias` becomes 0, or -inf for keys that nobody may see, whose xhat and rstd are zero.
template <class T, int Count>
__device__ void normalise(const Problem& p, int64_t batch, int64_t first, const T* table, const T* content, T* row,
                          int r, float* bias, float* rstds) {
  constexpr int kLanes = kThreads / Count;  // a row's, in one warp
  static_assert(kLanes >= 1 && kLanes <= 32);
  const int lane = threadIdx.x % kLanes, count = channels(p);
  const int64_t key = first + r;
  const bool visible = key < p.keys && (!p.mask || p.mask[batch * p.mask_batch + key * p.mask_key]);
  auto row_sum = [](float x) {
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    return x;
  };
  // This lane's share of a part, two elements at a time; `otherwise` stands for the one past an odd end.
  auto each = [&](const T* part, int width, float otherwise, auto act) {
#pragma unroll 4
    for (int c = 2 * lane; visible && c < width; c += 2 * kLanes) {
      act(c, to_float(part[c]), c + 1 < width ? to_float(part[c + 1]) : otherwise);
    }
  };

  float mean = 0.0f, rstd = 1.0f;
  if (p.eps >= 0.0f) {
    // Moments about a value close to the mean: about zero they would cancel where the mean is large. For 16-bit inputs
    // the first element is close enough (the error of the variance stays below C * 2^-24); fp32 takes a first pass.
    float shift = visible ? to_float(p.position ? table[0] : content[0]) : 0.0f, sum = 0.0f, squares = 0.0f;
    if constexpr (sizeof(T) == 4) {
      auto add = [&](int, float x, float y) { sum += x + y; };
      each(table, p.position, 0.0f, add);
      each(content, p.content, 0.0f, add);
      shift = row_sum(sum) / count;
      sum = 0.0f;
    }
    auto add = [&](int, float x, float y) {
      x -= shift;
      y -= shift;
      sum += x + y;
      squares += x * x + y * y;
    };
    each(table, p.position, shift, add);
    each(content, p.content, shift, add);
    const float offset = row_sum(sum) / count;
    mean = shift + offset;
    rstd = 1.0f / sqrtf(fmaxf(row_sum(squares) / count - offset * offset, 0.0f) + p.eps);
  }
  auto write = [&](T* to, int width) {
    return [=](int c, float x, float y) {
      x = (x - mean) * rstd;
      y = (y - mean) * rstd;
      if (c + 1 < width && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) return store_two(to + c, x, y);
      to[c] = from_float<T>(x);
      if (c + 1 < width) to[c + 1] = from_float<T>(y);
    };
  };
  each(table, p.position, 0.0f, write(row, p.position));
  each(content, p.content, 0.0f, write(row + p.position, p.content));
  for (int c = (visible ? count : 0) + lane; c < padded(p); c += kLanes) row[c] = from_float<T>(0.0f);
  if (lane == 0) {
    bias[r] = visible ? 0.0f : -INFINITY;
    rstds[r] = visible ? rstd : 0.0f;
  }
}

// The keys of one block of columns, on their way from device memory to xhat.
template <class T, int Count>
struct KeyTile {
  T* tile;
  float *bias, *rstd;
  unsigned char *raw_table, *raw_content;  // null: no copy runs ahead
  int pitch;

  __device__ void fetch(const Problem& p, int64_t batch, int64_t first) const {
    const int count = rows_left(p.keys, first, Count);
    if (raw_content) {
      if (p.position) stage(table_part<T>(p, first), count, raw_table);
      if (p.content) stage(content_part<T>(p, batch, first), count, raw_content);
    }
    ptx::cp_async_commit();
  }

  // Everything that was fetched has arrived and nobody reads the tile any more: for all threads together.
  __device__ void make(const Problem& p, int64_t batch, int64_t first) const {
    const int r = threadIdx.x / (kThreads / Count), count = rows_left(p.keys, first, Count);
    const Part<T> table = table_part<T>(p, first), content = content_part<T>(p, batch, first);
    T* row = tile + r * pitch;
    const T *from_table = row, *from_content = row + p.position;
    if (raw_content) {
      from_table = staged_row(table, raw_table, r);
      from_content = staged_row(content, raw_content, r);
    } else {
      copy_part(table, count, tile, pitch);
      copy_part(content, count, tile + p.position, pitch);
      __syncthreads();
    }
    normalise<T, Count>(p, batch, first, from_table, from_content, row, r, bias, rstd);
    __syncthreads();
  }
};

// The gradient of xhat in the accumulators becomes the gradient of x in the tile, where xhat stands now:
// dx = rstd (g - mean(g) - xhat mean(g xhat)). `exchange`: per row and column group.
template <class T, class Tile>
__device__ void normalise_backward(const Problem& p, const float (&g)[Tile::kFragments][2 * Tile::kPairs][4],
                                   const KeyTile<T, Tile::kRows>& keys, float2* exchange, const Thread<Tile>& at) {
  const int pairs = padded(p) / 16, pitch = keys.pitch;
  auto place = [&](int m, int half, int n) {
    return keys.tile + at.row(m, half) * pitch + at.pair(n / 2) * 16 + n % 2 * 8 + 2 * at.t;
  };
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f, product = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
        if (at.pair(n / 2) < pairs) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum += g[m][n][2 * half + i];
            product += g[m][n][2 * half + i] * to_float(place(m, half, n)[i]);
          }
        }
      }
      sum = quad_sum(sum);
      product = quad_sum(product);
      if (at.t == 0) exchange[at.row(m, half) * Tile::kColumnGroups + at.column_group] = make_float2(sum, product);
    }
  }
  __syncthreads();
  const float share = p.eps >= 0.0f ? 1.0f / channels(p) : 0.0f;
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f, product = 0.0f;
      for (int i = 0; i < Tile::kColumnGroups; ++i) {
        const float2 part = exchange[at.row(m, half) * Tile::kColumnGroups + i];
        sum += part.x;
        product += part.y;
      }
      sum *= share;
      product *= share;
      const float rstd = keys.rstd[at.row(m, half)];
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
        if (at.pair(n / 2) < pairs) {
          float dx[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float change = g[m][n][2 * half + i] - sum - to_float(place(m, half, n)[i]) * product;
            dx[i] = rstd > 0.0f ? rstd * change : 0.0f;
          }
          store_two(place(m, half, n), dx[0], dx[1]);
        }
      }
    }
  }
}

// The gradient of x in the tile goes to device memory, that of the position as a sum over the examples so far.
template <class T, int Count>
__device__ void store_gradient(const Problem& p, const Backward& b, const KeyTile<T, Count>& keys, int64_t batch,
                               int64_t first, bool last) {
  const int lane = threadIdx.x % 32, count = rows_left(p.keys, first, Count);
  for (int r = threadIdx.x / 32; r < count; r += kWarps) {
    const int64_t key = first + r;
    const T* row = keys.tile + r * keys.pitch;
    if (b.dtable) {
      for (int c = lane; c < p.position; c += 32) {
        const int64_t i = key * p.position + c;
        const float value = to_float(row[c]) + (batch > 0 ? b.table_sums[i] : 0.0f);
        if (last) {
          static_cast<T*>(b.dtable)[i] = from_float<T>(value);
        } else {
          b.table_sums[i] = value;
        }
      }
    }
    if (b.dx) {
      T* dx = static_cast<T*>(b.dx) + (batch * p.keys + key) * p.content;
      for (int c = lane; c < p.content; c += 32) dx[c] = row[p.position + c];
    }
  }
}

// to = the sum of `parts` matrices of `elements` elements, in their order.
template <class T>
__global__ void reduce_kernel(const float* partial, int64_t parts, int64_t elements, T* to) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= elements) return;
  float value = 0.0f;
  for (int64_t part = 0; part < parts; ++part) value += partial[part * elements + i];
  to[i] = from_float<T>(value);
}

// Hands out shared memory; with a null base it only counts.
struct Arena {
  unsigned char* base;
  int used = 0;

  template <class U>
  __host__ __device__ U* take(int count) {
    unsigned char* p = base + used;
    used += round_up(count * static_cast<int>(sizeof(U)), 16);
    return reinterpret_cast<U*>(p);
  }
};

template <class T>
__host__ __device__ int tile_pitch(const Problem& p) {
  return padded(p) + kVector<T>;  // an odd number of 16 bytes: ldmatrix meets no bank twice
}

template <class T, int Count>
__host__ __device__ KeyTile<T, Count> take_keys(const Problem& p, bool staged, Arena& arena) {
  KeyTile<T, Count> keys{};
  keys.pitch = tile_pitch<T>(p);
  keys.tile = arena.take<T>(Count * keys.pitch);
  keys.bias = arena.take<float>(Count);
  keys.rstd = arena.take<float>(Count);
  if (staged) {
    keys.raw_table = arena.take<unsigned char>(p.position ? Count * raw_pitch<T>(p.position) : 0);
    keys.raw_content = arena.take<unsigned char>(p.content ? Count * raw_pitch<T>(p.content) : 0);
  }
  return keys;
}

// --- Which tile ---

struct Device {
  int multiprocessors, shared;  // the shared memory that a block may ask for
};

Device this_device() { return {mmk_multiprocessors(), mmk_shared_memory()}; }

// A kernel instance that fits: what the launchers start and the planner describes.
template <class... Parameters>
struct Choice {
  void (*kernel)(Parameters...) = nullptr;
  int rows = 1, columns = 1, bytes = 0;
  bool flag = false;  // staged, or doubled buffers
};

// When to try the larger use of shared memory: not at all, with every tile before any goes without, or tile by tile.
enum class Flag { never, first, each };

// The first tile in the order given that fits, `width` channels in its accumulators. `rows` is what the tile's rows
// cover: tiles of which half or more would be empty are left to smaller ones.
template <class T, template <class, class> class Shared, class... Tiles, class P, class Kernels, class Choice>
void first_fit(const P& p, int width, const Device& device, int64_t rows, Flag when, Kernels kernels, Choice& choice) {
  auto attempt = [&](auto tile, bool flag) {
    using Tile = decltype(tile);
    const int bytes = Shared<T, Tile>(p, flag, nullptr).bytes;
    const bool too_tall = Tile::kRows > 32 && 2 * rows <= Tile::kRows;
    if (choice.kernel || too_tall || width > Tile::kChannels || bytes > device.shared) return;
    choice = {kernels(tile), Tile::kRows, Tile::kColumns, bytes, flag};
  };
  auto both = [&](auto tile) {
    if (when == Flag::each) attempt(tile, true);
    attempt(tile, false);
  };
  if (when == Flag::first) (attempt(Tiles{}, true), ...);
  (both(Tiles{}), ...);
}

// The raw copies that run ahead need rows without gaps between their channels.
inline bool dense_channels(const Problem& p) {
  return (p.content <= 1 || p.x_channel == 1) && (p.position <= 1 || p.table_channel == 1);
}

inline Flag staging(const Problem& p) { return dense_channels(p) ? Flag::first : Flag::never; }

template <class Choice>
int resident_blocks(const Choice& choice) {
#ifdef MMK_EMULATOR
  return 1;
#else
  int blocks = 0;
  cudaFuncSetAttribute(choice.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, choice.bytes);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, choice.kernel, kThreads, choice.bytes);
  return blocks > 0 ? blocks : 1;
#endif
}

// What the binding needs to know of a choice.
template <class Choice>
int describe(const Choice& choice, const Device& device, int64_t row_tiles, int64_t key_tiles, Plan* plan) {
  if (!choice.kernel) return -1;
  *plan = {row_tiles, key_tiles, static_cast<int64_t>(device.multiprocessors) * resident_blocks(choice), 1, false};
  return 0;
}

template <class F>
int with_type(Type type, F&& f) {
  if (type == Type::float32) return f(float{});
  return type == Type::bfloat16 ? f(bf16{}) : f(fp16{});
}

}  // namespace
}  // namespace mmk::latent
