// softmax(scale q xhat^T) xhat with xhat = LayerNorm([x ; position]) made on the tile, and its gradient. README.md beside
// mmkernels/ops/latent has the derivation, the tiles and the time model.
//
// Every kernel keeps one accumulator of rows x channels in the registers of 8 warps (a `Tile`), walks over blocks of
// columns, makes a small matrix of scores per block (S^T for the gradient of x), puts it into shared memory and multiplies
// it with the same tile that the scores came from: keys and values are one array.
//
// Channels are ordered [position ; content] inside the kernels, so that the wide part starts at an even column.
#include "latent/latent_cuda.h"

#include "common/cuda_device.h"
#include "common/ptx.cuh"

namespace mmk::latent {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements of 16 bytes; an mma is two of them deep
template <class T>
constexpr int kDepth = 2 * kVector<T>;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int round_up(int a, int b) { return (a + b - 1) / b * b; }
__host__ __device__ inline int channels(const Problem& p) { return p.position + p.content; }
__host__ __device__ inline int padded(const Problem& p) { return round_up(channels(p), 16); }

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

// --- Matrix products on shared tiles ----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ptx::mma_16x8x16<T>(d, a, b0, b1);
}

// fp32 as two tf32 each: the product of the two remainders, below 2^-22 of the whole, is left out.
template <>
__device__ __forceinline__ void multiply<float>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto rest = [](uint32_t x, uint32_t high) {
    return ptx::to_tf32(__uint_as_float(x) - __uint_as_float(high));
  };
  uint32_t high[4], low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    high[i] = ptx::to_tf32(__uint_as_float(a[i]));
    low[i] = rest(a[i], high[i]);
  }
  const uint32_t high0 = ptx::to_tf32(__uint_as_float(b0)), high1 = ptx::to_tf32(__uint_as_float(b1));
  ptx::mma_16x8x8_tf32(d, low, high0, high1);
  ptx::mma_16x8x8_tf32(d, high, rest(b0, high0), rest(b1, high1));
  ptx::mma_16x8x8_tf32(d, high, high0, high1);
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&d)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = 0.0f;
    }
  }
}

// d += part; tensor cores cut fp32 sums off instead of rounding them, so fp32 results take only short sums from them.
template <int M, int N>
__device__ __forceinline__ void add(float (&d)[M][N][4], const float (&part)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] += part[m][n][i];
    }
  }
}

// d += a b^T over one step of channels; a: 16 * M rows, b: 8 * N rows, both at this lane's ldmatrix addresses.
template <class T, int M, int N>
__device__ __forceinline__ void multiply_step(float (&d)[M][N][4], const T* a, const T* b, int pitch) {
  uint32_t fa[M][4], fb[N][2];
#pragma unroll
  for (int m = 0; m < M; ++m) ptx::ldmatrix_x4(fa[m], a + m * 16 * pitch);
  if constexpr (N == 1) {
    ptx::ldmatrix_x2(fb[0], b);
  } else {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t two[4];
      ptx::ldmatrix_x4(two, b + n * 8 * pitch);
      fb[n][0] = two[0], fb[n][1] = two[1], fb[n + 1][0] = two[2], fb[n + 1][1] = two[3];
    }
  }
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) multiply<T>(d[m][n], fa[m], fb[n][0], fb[n][1]);
  }
}

// d = a b^T over `depth` channels.
template <class T, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[M][N][4], const T* a, const T* b, int pitch, int depth, int lane) {
  a += lane % 16 * pitch + lane / 16 * kVector<T>;
  b += (lane % 8 + (N > 1 ? lane / 16 * 8 : 0)) * pitch + lane / 8 % 2 * kVector<T>;
  clear(d);
  if constexpr (sizeof(T) == 2) {
#pragma unroll 2
    for (int k = 0; k < depth; k += kDepth<T>) multiply_step<T>(d, a + k, b + k, pitch);
  } else {
    for (int k = 0; k < depth; k += 2 * kDepth<T>) {
      float part[M][N][4];
      clear(part);
      multiply_step<T>(part, a + k, b + k, pitch);
      multiply_step<T>(part, a + k + kDepth<T>, b + k + kDepth<T>, pitch);
      add(d, part);
    }
  }
}

// The b operands of a kDepth x 16 piece of a tile of rows.
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
template <class T, class Tile>
__device__ __forceinline__ void accumulate(float (&sum)[Tile::kFragments][2 * Tile::kPairs][4], const T* w, int w_pitch,
                                           const T* tile, int pitch, int pairs, const Thread<Tile>& at) {
  constexpr int M = Tile::kFragments;
  w += at.lane % 16 * w_pitch + at.lane / 16 * kVector<T>;
  auto load_weights = [&](uint32_t(&a)[M][4], int k) {
#pragma unroll
    for (int m = 0; m < M; ++m) ptx::ldmatrix_x4(a[m], w + m * 16 * w_pitch + k);
  };
  if constexpr (sizeof(T) == 2) {
#pragma unroll 1
    for (int k = 0; k < Tile::kColumns; k += kDepth<T>) {
      uint32_t a[M][4];
      load_weights(a, k);
#pragma unroll
      for (int p = 0; p < Tile::kPairs; ++p) {
        if (at.pair(p) < pairs) {
          uint32_t b[4];
          load_columns(b, tile + k * pitch + at.pair(p) * 16, pitch, at.lane);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            multiply<T>(sum[m][2 * p], a[m], b[0], b[1]);
            multiply<T>(sum[m][2 * p + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
  } else {
#pragma unroll
    for (int p = 0; p < Tile::kPairs; ++p) {
      if (at.pair(p) < pairs) {
        float part[M][2][4];
        clear(part);
        for (int k = 0; k < Tile::kColumns; k += kDepth<T>) {
          uint32_t a[M][4], b[4];
          load_weights(a, k);
          load_columns(b, tile + k * pitch + at.pair(p) * 16, pitch, at.lane);
#pragma unroll
          for (int m = 0; m < M; ++m) {
            multiply<T>(part[m][0], a[m], b[0], b[1]);
            multiply<T>(part[m][1], a[m], b[2], b[3]);
          }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[m][2 * p + i / 4][i % 4] += part[m][i / 4][i % 4];
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

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// --- From device memory to shared memory ------------------------------------------------------------------------------

// Rows of q or dout into a tile; rows past the end and the padding become zeros. cp.async, not yet committed.
template <class T>
__device__ void load_rows(const Problem& p, const Rows& rows, int64_t batch, int64_t first, T* tile, int count, int pitch) {
  const int chunks = padded(p) / kVector<T>, filled = static_cast<int>(ceil_div(channels(p), kVector<T>));
  const T* source = static_cast<const T*>(rows.data) + batch * rows.batch;
  for (int i = threadIdx.x; i < count * chunks; i += kThreads) {
    const int r = i / chunks, c = i % chunks;
    const bool inside = first + r < p.rows && c < filled;
    ptx::cp_async<16>(tile + r * pitch + c * kVector<T>,
                      inside ? source + (first + r) * rows.row + c * kVector<T> : source, inside ? 16 : 0);
  }
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

// Raw rows in shared memory, at the same distance from a multiple of 16 bytes as in device memory: then 16 bytes are copied
// at a time whatever the width. Dense rows follow one another there too.
template <class T>
__host__ __device__ int raw_pitch(int width) {
  return round_up(width * static_cast<int>(sizeof(T)), 16) + 16;
}

__device__ __forceinline__ int lead(const void* p) { return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16); }

template <class T>
__device__ void stage(const Part<T>& part, int rows, unsigned char* raw) {
  const int spans = part.dense() ? 1 : rows;
  const int bytes = (part.dense() ? rows : 1) * part.width * static_cast<int>(sizeof(T));
  const int chunks = (bytes + 30) / 16;  // as many as a span can touch
  for (int i = threadIdx.x; i < spans * chunks; i += kThreads) {
    const int r = i / chunks, c = i % chunks;
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

// xhat of Count keys into the tile, from their raw rows in shared memory (which may be the tile's own). `bias` becomes 0, or
// -inf for keys that nobody may see, whose xhat and rstd are zero.
template <class T, int Count>
__device__ void normalise(const Problem& p, int64_t batch, int64_t first, const T* table, const T* content, T* row, int r,
                          float* bias, float* rstds) {
  constexpr int kLanes = kThreads / Count;  // a row's, in one warp
  static_assert(kLanes >= 1 && kLanes <= 32);
  const int lane = threadIdx.x % kLanes, count = channels(p), position = p.position;
  const int64_t key = first + r;
  const bool visible = key < p.keys && (!p.mask || p.mask[batch * p.mask_batch + key * p.mask_key]);
  content -= position;
  auto value = [&](int c) { return to_float((c < position ? table : content)[c]); };
  auto row_sum = [](float x) {
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    return x;
  };

  float mean = 0.0f, rstd = 1.0f;
  if (p.eps >= 0.0f) {
    // Moments about a value close to the mean: about zero they would cancel where the mean is large. For 16-bit inputs the
    // first element is close enough (the error of the variance stays below C * 2^-24); fp32 takes a first pass.
    float shift = visible ? value(0) : 0.0f, sum = 0.0f, squares = 0.0f;
    if constexpr (sizeof(T) == 4) {
      for (int c = lane; visible && c < count; c += kLanes) sum += value(c);
      shift = row_sum(sum) / count;
      sum = 0.0f;
    }
#pragma unroll 4
    for (int c = lane; visible && c < count; c += kLanes) {
      const float d = value(c) - shift;
      sum += d;
      squares += d * d;
    }
    const float offset = row_sum(sum) / count;
    mean = shift + offset;
    rstd = 1.0f / sqrtf(fmaxf(row_sum(squares) / count - offset * offset, 0.0f) + p.eps);
  }
#pragma unroll 4
  for (int c = lane; c < padded(p); c += kLanes) {
    row[c] = from_float<T>(visible && c < count ? (value(c) - mean) * rstd : 0.0f);
  }
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
    if (raw_content && count > 0) {
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
    if (raw_content) {
      normalise<T, Count>(p, batch, first, staged_row(table, raw_table, r), staged_row(content, raw_content, r), row, r,
                          bias, rstd);
    } else {
      copy_part(table, count, tile, pitch);
      copy_part(content, count, tile + p.position, pitch);
      __syncthreads();
      normalise<T, Count>(p, batch, first, row, row + p.position, row, r, bias, rstd);
    }
    __syncthreads();
  }
};

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

// --- Forward ----------------------------------------------------------------------------------------------------------

template <class T, class Tile>
struct ForwardShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kColumns> keys;
  T *q, *weights;
  float* exchange;  // per row and score group
  int bytes;

  __host__ __device__ ForwardShared(const Problem& p, bool staged, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kColumns>(p, staged, arena);
    q = arena.take<T>(Tile::kRows * keys.pitch);
    weights = arena.take<T>(Tile::kRows * kWeightPitch);
    exchange = arena.take<float>(Tile::kRows * Tile::kScoreGroups);
    bytes = arena.used;
  }
};

// A block's part of the work: one tile of rows, the keys of one split, one example. Tiles of rows that read the same keys
// run side by side.
struct Share {
  int64_t batch, split, first_row, first_key, last_key;

  __device__ Share(const Problem& p, const Plan& plan, int rows, int columns) {
    const int64_t block = blockIdx.x;
    first_row = block % plan.row_tiles * rows;
    split = block / plan.row_tiles % plan.splits;
    batch = block / plan.row_tiles / plan.splits;
    const int64_t tiles = ceil_div(plan.key_tiles, plan.splits);
    first_key = split * tiles * columns;
    last_key = min(p.keys, first_key + tiles * columns);
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(Problem p, Plan plan, Forward f, bool staged) {
  using Shared = ForwardShared<T, Tile>;
  const Shared shared(p, staged, shared_memory());
  const Thread<Tile> at;
  const Share share(p, plan, Tile::kRows, Tile::kColumns);
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const bool active = share.first_row + at.first_row < p.rows;
  const float scale = p.scale * kLog2E;

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  float top[Tile::kFragments][2], total[Tile::kFragments][2];  // of a row; the total over this warp's columns
  clear(sum);
#pragma unroll
  for (int i = 0; i < 2 * Tile::kFragments; ++i) top[i / 2][i % 2] = -INFINITY, total[i / 2][i % 2] = 0.0f;

  load_rows<T>(p, p.q, share.batch, share.first_row, shared.q, Tile::kRows, pitch);
  shared.keys.fetch(p, share.batch, share.first_key);
  for (int64_t first = share.first_key; first < share.last_key; first += Tile::kColumns) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    shared.keys.make(p, share.batch, first);
    shared.keys.fetch(p, share.batch, min(first + Tile::kColumns, p.keys));

    float s[Tile::kFragments][Tile::kScores][4];
    if (active && at.scores) {
      multiply_rows<T>(s, shared.q + at.first_row * pitch, shared.keys.tile + at.first_score * pitch, pitch, padded(p),
                       at.lane);
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float best = -INFINITY;
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
              s[m][n][i] = s[m][n][i] * scale + shared.keys.bias[at.score(n) + i % 2];
              best = fmaxf(best, s[m][n][i]);
            }
          }
          best = quad_max(best);
          if (at.t == 0) shared.exchange[at.row(m, half) * Tile::kScoreGroups + at.column_group] = best;
        }
      }
    }
    __syncthreads();
    if (active) {
      bool changed = false;
      float decay[Tile::kFragments][2];
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float best = top[m][half];
#pragma unroll
          for (int i = 0; i < Tile::kScoreGroups; ++i) {
            best = fmaxf(best, shared.exchange[at.row(m, half) * Tile::kScoreGroups + i]);
          }
          const float zero = best == -INFINITY ? 0.0f : best;  // no key yet: -inf - -inf would be NaN
          decay[m][half] = ptx::exp2(top[m][half] - zero);
          changed |= best != top[m][half];
          top[m][half] = best;
          if (!at.scores) continue;
          total[m][half] *= decay[m][half];
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            const float w0 = ptx::exp2(s[m][n][2 * half] - zero), w1 = ptx::exp2(s[m][n][2 * half + 1] - zero);
            total[m][half] += w0 + w1;
            store_two(shared.weights + at.row(m, half) * Shared::kWeightPitch + at.score(n), w0, w1);
          }
        }
      }
      if (__any_sync(0xffffffffu, changed)) {
#pragma unroll
        for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
          for (int n = 0; n < 2 * Tile::kPairs; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[m][n][i] *= decay[m][i / 2];
          }
        }
      }
    }
    __syncthreads();
    if (active) {
      accumulate<T, Tile>(sum, shared.weights + at.first_row * Shared::kWeightPitch, Shared::kWeightPitch,
                          shared.keys.tile, pitch, pairs, at);
    }
  }

  // The row totals of the score groups, added in their order.
  ptx::cp_async_wait<0>();
  __syncthreads();
  if (at.scores) {
#pragma unroll
    for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float row_total = quad_sum(total[m][half]);
        if (at.t == 0) shared.exchange[at.row(m, half) * Tile::kScoreGroups + at.column_group] = row_total;
      }
    }
  }
  __syncthreads();
  const int count = channels(p);
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(m, half);
      if (row >= p.rows) continue;
      float row_total = 0.0f;
      for (int i = 0; i < Tile::kScoreGroups; ++i) {
        row_total += shared.exchange[at.row(m, half) * Tile::kScoreGroups + i];
      }
      const int64_t place = share.batch * p.rows + row, partial = share.split * p.batch * p.rows + place;
      const bool final = plan.splits == 1;
      const float factor = !final ? 1.0f : row_total > 0.0f ? 1.0f / row_total : 0.0f;
      if (at.column_group == 0 && at.t == 0) {
        if (final) {
          f.lse[place] = (top[m][half] + log2f(row_total)) * kLn2;
        } else {
          f.tops[partial] = top[m][half];
          f.tops[plan.splits * p.batch * p.rows + partial] = row_total;
        }
      }
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int c = at.pair(n / 2) * 16 + n % 2 * 8 + 2 * at.t + i;
          if (c >= count) continue;
          c = c < p.position ? c + p.content : c - p.position;
          const float value = sum[m][n][2 * half + i] * factor;
          if (final) {
            static_cast<T*>(f.out)[place * count + c] = from_float<T>(value);
          } else {
            f.sums[partial * count + c] = value;
          }
        }
      }
    }
  }
}

// One warp a row: the splits in their order.
template <class T>
__global__ void merge_kernel(Problem p, int64_t splits, Forward f) {
  const int64_t rows = p.batch * p.rows, row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  const int count = channels(p);
  if (row >= rows) return;
  float top = -INFINITY, total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) top = fmaxf(top, f.tops[s * rows + row]);
  const float zero = top == -INFINITY ? 0.0f : top;
  for (int64_t s = 0; s < splits; ++s) {
    total += f.tops[(splits + s) * rows + row] * ptx::exp2(f.tops[s * rows + row] - zero);
  }
  const float factor = total > 0.0f ? 1.0f / total : 0.0f;
  for (int c = threadIdx.x % 32; c < count; c += 32) {
    float value = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      value += f.sums[(s * rows + row) * count + c] * ptx::exp2(f.tops[s * rows + row] - zero);
    }
    static_cast<T*>(f.out)[row * count + c] = from_float<T>(value * factor);
  }
  if (threadIdx.x % 32 == 0) f.lse[row] = (top + log2f(total)) * kLn2;
}

// --- Backward: queries ------------------------------------------------------------------------------------------------

// P from the saved log-sum-exp. A row without keys has lse -inf: +inf instead makes its weights zero.
__device__ __forceinline__ float shift_of(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2E; }

// dS = P (dP - delta); where P is zero nothing of dP counts, not even NaN.
__device__ __forceinline__ float score_gradient(float weight, float dweight, float delta) {
  return weight > 0.0f ? weight * (dweight - delta) : 0.0f;
}

template <class T, class Tile>
struct BackwardQShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kColumns> keys;
  T *q, *dout, *dscores;
  int bytes;

  __host__ __device__ BackwardQShared(const Problem& p, bool staged, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kColumns>(p, staged, arena);
    q = arena.take<T>(Tile::kRows * keys.pitch);
    dout = arena.take<T>(Tile::kRows * keys.pitch);
    dscores = arena.take<T>(Tile::kRows * kWeightPitch);
    bytes = arena.used;
  }
};

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 1) backward_q_kernel(Problem p, Plan plan, Backward b, bool staged) {
  using Shared = BackwardQShared<T, Tile>;
  const Shared shared(p, staged, shared_memory());
  const Thread<Tile> at;
  const Share share(p, plan, Tile::kRows, Tile::kColumns);
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const bool active = share.first_row + at.first_row < p.rows;
  const float scale = p.scale * kLog2E;

  float sum[Tile::kFragments][2 * Tile::kPairs][4];
  float shift[Tile::kFragments][2], delta[Tile::kFragments][2];
  clear(sum);
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(m, half);
      const bool inside = row < p.rows;
      shift[m][half] = inside ? shift_of(b.lse[share.batch * p.rows + row]) : INFINITY;
      delta[m][half] = inside ? b.delta[share.batch * p.rows + row] : 0.0f;
    }
  }

  load_rows<T>(p, p.q, share.batch, share.first_row, shared.q, Tile::kRows, pitch);
  load_rows<T>(p, b.dout, share.batch, share.first_row, shared.dout, Tile::kRows, pitch);
  shared.keys.fetch(p, share.batch, share.first_key);
  for (int64_t first = share.first_key; first < share.last_key; first += Tile::kColumns) {
    ptx::cp_async_wait<0>();
    __syncthreads();
    shared.keys.make(p, share.batch, first);
    shared.keys.fetch(p, share.batch, min(first + Tile::kColumns, p.keys));
    if (active && at.scores) {
      float s[Tile::kFragments][Tile::kScores][4], dp[Tile::kFragments][Tile::kScores][4];
      const T* keys = shared.keys.tile + at.first_score * pitch;
      multiply_rows<T>(s, shared.q + at.first_row * pitch, keys, pitch, padded(p), at.lane);
      multiply_rows<T>(dp, shared.dout + at.first_row * pitch, keys, pitch, padded(p), at.lane);
#pragma unroll
      for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < Tile::kScores; ++n) {
            float ds[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float weight =
                  ptx::exp2(s[m][n][2 * half + i] * scale + shared.keys.bias[at.score(n) + i] - shift[m][half]);
              ds[i] = score_gradient(weight, dp[m][n][2 * half + i], delta[m][half]);
            }
            store_two(shared.dscores + at.row(m, half) * Shared::kWeightPitch + at.score(n), ds[0], ds[1]);
          }
        }
      }
    }
    __syncthreads();
    if (active) {
      accumulate<T, Tile>(sum, shared.dscores + at.first_row * Shared::kWeightPitch, Shared::kWeightPitch,
                          shared.keys.tile, pitch, pairs, at);
    }
  }
  ptx::cp_async_wait<0>();

  const int count = channels(p);
#pragma unroll
  for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = share.first_row + at.row(m, half);
      if (row >= p.rows) continue;
      const int64_t place = share.batch * p.rows + row, partial = share.split * p.batch * p.rows + place;
#pragma unroll
      for (int n = 0; n < 2 * Tile::kPairs; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          int c = at.pair(n / 2) * 16 + n % 2 * 8 + 2 * at.t + i;
          if (c >= count) continue;
          c = c < p.position ? c + p.content : c - p.position;
          const float value = sum[m][n][2 * half + i] * p.scale;
          if (b.partial_dq) {
            b.partial_dq[partial * count + c] = value;
          } else {
            static_cast<T*>(b.dq)[place * count + c] = from_float<T>(value);
          }
        }
      }
    }
  }
}

// dq = the sum of `parts` matrices of `elements` elements, in their order.
template <class T>
__global__ void reduce_kernel(const float* partial, int64_t parts, int64_t elements, T* dq) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= elements) return;
  float value = 0.0f;
  for (int64_t part = 0; part < parts; ++part) value += partial[part * elements + i];
  dq[i] = from_float<T>(value);
}

// --- Backward: input --------------------------------------------------------------------------------------------------

// The accumulator holds the gradient of a tile of xhat; its columns are blocks of query rows.
template <class T, class Tile>
struct BackwardXShared {
  static constexpr int kWeightPitch = Tile::kColumns + kVector<T>;
  KeyTile<T, Tile::kRows> keys;
  T *q, *dout, *weights, *dscores;  // q, dout, shift and delta twice where the buffers are doubled
  float *shift, *delta;
  float2* exchange;  // per key and column group
  int bytes;

  __host__ __device__ BackwardXShared(const Problem& p, bool doubled, unsigned char* base) {
    Arena arena{base};
    keys = take_keys<T, Tile::kRows>(p, false, arena);
    const int columns = Tile::kColumns * (doubled ? 2 : 1);
    q = arena.take<T>(columns * keys.pitch);
    dout = arena.take<T>(columns * keys.pitch);
    shift = arena.take<float>(columns);
    delta = arena.take<float>(columns);
    weights = arena.take<T>(Tile::kRows * kWeightPitch);
    dscores = arena.take<T>(Tile::kRows * kWeightPitch);
    exchange = arena.take<float2>(Tile::kRows * Tile::kColumnGroups);
    bytes = arena.used;
  }

  __device__ void fetch(const Problem& p, const Backward& b, int64_t batch, int64_t first, int buffer) const {
    const int start = buffer * Tile::kColumns;
    load_rows<T>(p, p.q, batch, first, q + start * keys.pitch, Tile::kColumns, keys.pitch);
    load_rows<T>(p, b.dout, batch, first, dout + start * keys.pitch, Tile::kColumns, keys.pitch);
    for (int i = threadIdx.x; i < Tile::kColumns; i += kThreads) {
      const bool inside = first + i < p.rows;
      shift[start + i] = inside ? shift_of(b.lse[batch * p.rows + first + i]) : INFINITY;
      delta[start + i] = inside ? b.delta[batch * p.rows + first + i] : 0.0f;
    }
    ptx::cp_async_commit();
  }
};

// The gradient of xhat in the accumulators becomes the gradient of x in the tile, where xhat stands now:
// dx = rstd (g - mean(g) - xhat mean(g xhat)).
template <class T, class Tile>
__device__ void normalise_backward(const Problem& p, const float (&g)[Tile::kFragments][2 * Tile::kPairs][4],
                                   const BackwardXShared<T, Tile>& shared, const Thread<Tile>& at) {
  const int pairs = padded(p) / 16, pitch = shared.keys.pitch;
  auto place = [&](int m, int half, int n) {
    return shared.keys.tile + at.row(m, half) * pitch + at.pair(n / 2) * 16 + n % 2 * 8 + 2 * at.t;
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
      if (at.t == 0) shared.exchange[at.row(m, half) * Tile::kColumnGroups + at.column_group] = make_float2(sum, product);
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
        const float2 part = shared.exchange[at.row(m, half) * Tile::kColumnGroups + i];
        sum += part.x;
        product += part.y;
      }
      sum *= share;
      product *= share;
      const float rstd = shared.keys.rstd[at.row(m, half)];
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

template <class T, class Tile>
__global__ void __launch_bounds__(kThreads, 1) backward_x_kernel(Problem p, Plan plan, Backward b, bool doubled) {
  using Shared = BackwardXShared<T, Tile>;
  const Shared shared(p, doubled, shared_memory());
  const Thread<Tile> at;
  const int pitch = shared.keys.pitch, pairs = padded(p) / 16;
  const int64_t first_key = blockIdx.x % plan.key_tiles * Tile::kRows;
  // The position's gradient is a sum over the examples: its block takes them one after another.
  const int64_t first_batch = b.dtable ? 0 : blockIdx.x / plan.key_tiles;
  const int64_t last_batch = b.dtable ? p.batch : first_batch + 1;
  const float scale = p.scale * kLog2E;

  for (int64_t batch = first_batch; batch < last_batch; ++batch) {
    float sum[Tile::kFragments][2 * Tile::kPairs][4];
    clear(sum);
    shared.fetch(p, b, batch, 0, 0);
    shared.keys.make(p, batch, first_key);
    int buffer = 0;
    for (int64_t first = 0; first < p.rows; first += Tile::kColumns) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      const bool more = first + Tile::kColumns < p.rows;
      const int start = buffer * Tile::kColumns;
      if (doubled && more) shared.fetch(p, b, batch, first + Tile::kColumns, buffer ^ 1);
      if (at.scores) {
        float s[Tile::kFragments][Tile::kScores][4], dp[Tile::kFragments][Tile::kScores][4];
        const T* keys = shared.keys.tile + at.first_row * pitch;
        multiply_rows<T>(s, keys, shared.q + (start + at.first_score) * pitch, pitch, padded(p), at.lane);
        multiply_rows<T>(dp, keys, shared.dout + (start + at.first_score) * pitch, pitch, padded(p), at.lane);
#pragma unroll
        for (int m = 0; m < Tile::kFragments; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = at.row(m, half);
            const float bias = shared.keys.bias[row];
#pragma unroll
            for (int n = 0; n < Tile::kScores; ++n) {
              float w[2], ds[2];
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int column = at.score(n) + i;
                w[i] = ptx::exp2(s[m][n][2 * half + i] * scale + bias - shared.shift[start + column]);
                ds[i] = p.scale * score_gradient(w[i], dp[m][n][2 * half + i], shared.delta[start + column]);
              }
              store_two(shared.weights + row * Shared::kWeightPitch + at.score(n), w[0], w[1]);
              store_two(shared.dscores + row * Shared::kWeightPitch + at.score(n), ds[0], ds[1]);
            }
          }
        }
      }
      __syncthreads();
      const int rows = at.first_row * Shared::kWeightPitch;
      accumulate<T, Tile>(sum, shared.weights + rows, Shared::kWeightPitch, shared.dout + start * pitch, pitch, pairs, at);
      accumulate<T, Tile>(sum, shared.dscores + rows, Shared::kWeightPitch, shared.q + start * pitch, pitch, pairs, at);
      if (doubled) {
        buffer ^= 1;
      } else if (more) {
        __syncthreads();
        shared.fetch(p, b, batch, first + Tile::kColumns, 0);
      }
    }
    normalise_backward<T, Tile>(p, sum, shared, at);
    __syncthreads();

    const int last = rows_left(p.keys, first_key, Tile::kRows);
    for (int r = threadIdx.x / 32; r < last; r += kWarps) {
      const int64_t key = first_key + r;
      const T* row = shared.keys.tile + r * pitch;
      if (b.dtable) {
        for (int c = at.lane; c < p.position; c += 32) {
          const int64_t i = key * p.position + c;
          const float value = to_float(row[c]) + (batch > 0 ? b.table_sums[i] : 0.0f);
          if (batch + 1 < last_batch) b.table_sums[i] = value;
          if (batch + 1 == last_batch) static_cast<T*>(b.dtable)[i] = from_float<T>(value);
        }
      }
      if (b.dx) {
        T* dx = static_cast<T*>(b.dx) + (batch * p.keys + key) * p.content;
        for (int c = at.lane; c < p.content; c += 32) dx[c] = row[p.position + c];
      }
    }
    __syncthreads();
  }
}

// --- Small kernels of N rows ------------------------------------------------------------------------------------------

template <class T>
__global__ void pack_kernel(Problem p, Strided source, int64_t rows, T* packed, int64_t pitch) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= rows) return;
  const T* from = static_cast<const T*>(source.data) + row / p.rows * source.batch + row % p.rows * source.row;
  for (int64_t c = threadIdx.x % 32; c < pitch; c += 32) {
    const int64_t channel = c < p.position ? c + p.content : c - p.position;
    packed[row * pitch + c] = c < channels(p) ? from[channel * source.channel] : from_float<T>(0.0f);
  }
}

template <class T>
__global__ void delta_kernel(Problem p, Strided dout, Strided out, const float* dlse, int64_t dlse_batch, int64_t dlse_row,
                             float* delta) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (row >= p.batch * p.rows) return;
  const int64_t b = row / p.rows, r = row % p.rows;
  const T* g = static_cast<const T*>(dout.data) + b * dout.batch + r * dout.row;
  const T* o = static_cast<const T*>(out.data) + b * out.batch + r * out.row;
  float sum = 0.0f;
  for (int c = threadIdx.x % 32; c < channels(p); c += 32) sum += to_float(g[c * dout.channel]) * to_float(o[c * out.channel]);
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  if (threadIdx.x % 32 == 0) delta[row] = sum - (dlse ? dlse[b * dlse_batch + r * dlse_row] : 0.0f);
}

// --- Which tile -------------------------------------------------------------------------------------------------------

struct Device {
  int multiprocessors, shared;  // the shared memory that a block may ask for
};

Device this_device() { return {mmk_multiprocessors(), mmk_shared_memory()}; }

// A kernel instance that fits: what the launchers start and the planner describes.
template <class... Parameters>
struct Choice {
  void (*kernel)(Parameters...) = nullptr;
  int rows, columns, bytes;
  bool flag;  // staged, or doubled buffers
};

// Tries the tiles in the order given, each first with the larger use of shared memory.
template <class T, template <class, class> class Shared, class... Tiles, class Kernels, class Choice>
void first_fit(const Problem& p, const Device& device, bool may_flag, Kernels kernels, Choice& choice) {
  auto attempt = [&](auto tile, bool flag) {
    using Tile = decltype(tile);
    const int bytes = Shared<T, Tile>(p, flag, nullptr).bytes;
    if (choice.kernel || padded(p) > Tile::kChannels || bytes > device.shared) return;
    choice = {kernels(tile), Tile::kRows, Tile::kColumns, bytes, flag};
  };
  if (may_flag) (attempt(Tiles{}, true), ...);
  (attempt(Tiles{}, false), ...);
}

// The raw copies that run ahead need rows without gaps between their channels.
bool stageable(const Problem& p) {
  return (p.content <= 1 || p.x_channel == 1) && (p.position <= 1 || p.table_channel == 1);
}

using ForwardChoice = Choice<Problem, Plan, Forward, bool>;
using BackwardChoice = Choice<Problem, Plan, Backward, bool>;

template <class T>
ForwardChoice choose_forward(const Problem& p, const Device& device) {
  ForwardChoice choice;
  auto kernels = [](auto tile) { return &forward_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, ForwardShared, Tile<4, 2, 2, 64>, Tile<4, 2, 9, 64>, Tile<2, 2, 9, 64>, Tile<2, 2, 9, 32>,
              Tile<1, 2, 8, 32>, Tile<1, 2, 8, 16>>(p, device, stageable(p), kernels, choice);
  } else {
    first_fit<T, ForwardShared, Tile<4, 1, 9, 32>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 16>, Tile<1, 1, 8, 8>>(
        p, device, stageable(p), kernels, choice);
  }
  return choice;
}

template <class T>
BackwardChoice choose_backward_q(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &backward_q_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, BackwardQShared, Tile<2, 2, 5, 64>, Tile<2, 2, 9, 32>, Tile<1, 2, 8, 32>, Tile<1, 2, 8, 16>,
              Tile<1, 1, 8, 16>>(p, device, stageable(p), kernels, choice);
  } else {
    first_fit<T, BackwardQShared, Tile<2, 1, 5, 32>, Tile<1, 1, 8, 16>, Tile<1, 1, 8, 8>>(p, device, stageable(p),
                                                                                           kernels, choice);
  }
  return choice;
}

template <class T>
BackwardChoice choose_backward_x(const Problem& p, const Device& device) {
  BackwardChoice choice;
  auto kernels = [](auto tile) { return &backward_x_kernel<T, decltype(tile)>; };
  if constexpr (sizeof(T) == 2) {
    first_fit<T, BackwardXShared, Tile<4, 2, 9, 32>, Tile<2, 2, 9, 32>, Tile<1, 2, 8, 32>, Tile<1, 2, 8, 16>>(
        p, device, true, kernels, choice);
  } else {
    first_fit<T, BackwardXShared, Tile<4, 1, 9, 16>, Tile<2, 1, 9, 16>, Tile<1, 1, 8, 16>, Tile<1, 1, 8, 8>>(
        p, device, true, kernels, choice);
  }
  return choice;
}

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

template <class F>
int with_type(Type type, F&& f) {
  if (type == Type::float32) return f(float{});
  return type == Type::bfloat16 ? f(bf16{}) : f(fp16{});
}

}  // namespace
}  // namespace mmk::latent

using namespace mmk::latent;

extern "C" int mmk_latent_plan(const Problem* p, Kernel kernel, Plan* plan) {
  const Device device = this_device();
  auto describe = [&](const auto& choice) {
    if (!choice.kernel) return -1;
    const bool keys_are_rows = kernel == Kernel::backward_x;
    plan->row_tiles = ceil_div(p->rows, keys_are_rows ? choice.columns : choice.rows);
    plan->key_tiles = ceil_div(p->keys, keys_are_rows ? choice.rows : choice.columns);
    plan->slots = static_cast<int64_t>(device.multiprocessors) * resident_blocks(choice);
    plan->splits = 1;
    return 0;
  };
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    if (kernel == Kernel::forward) return describe(choose_forward<T>(*p, device));
    return describe(kernel == Kernel::backward_q ? choose_backward_q<T>(*p, device) : choose_backward_x<T>(*p, device));
  });
}

extern "C" int mmk_latent_fwd(const Problem* p, const Plan* plan, const Forward* f, void* stream) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_forward<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * p->batch));
    const int error = mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan, *f, choice.flag);
    if (error || plan->splits == 1) return error;
    const dim3 rows(static_cast<unsigned>(ceil_div(p->batch * p->rows, kWarps)));
    return mmk::launch(merge_kernel<T>, rows, dim3(kThreads), 0, stream, *p, plan->splits, *f);
  });
}

extern "C" int mmk_latent_bwd_q(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_backward_q<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->row_tiles * plan->splits * p->batch));
    const int error = mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan, *b, choice.flag);
    if (error || !b->partial_dq) return error;
    const int64_t elements = b->dq_batch * p->rows * channels(*p), parts = plan->splits * (p->batch / b->dq_batch);
    const dim3 blocks(static_cast<unsigned>(ceil_div(elements, kThreads)));
    return mmk::launch(reduce_kernel<T>, blocks, dim3(kThreads), 0, stream, b->partial_dq, parts, elements,
                       static_cast<T*>(b->dq));
  });
}

extern "C" int mmk_latent_bwd_x(const Problem* p, const Plan* plan, const Backward* b, void* stream) {
  const Device device = this_device();
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const auto choice = choose_backward_x<T>(*p, device);
    const dim3 grid(static_cast<unsigned>(plan->key_tiles * (b->dtable ? 1 : p->batch)));
    return mmk::launch(choice.kernel, grid, dim3(kThreads), choice.bytes, stream, *p, *plan, *b, choice.flag);
  });
}

extern "C" int mmk_latent_pack(const Problem* p, const Strided* source, int64_t batch, void* packed, int64_t pitch,
                               void* stream) {
  const int64_t rows = batch * p->rows;
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 blocks(static_cast<unsigned>(ceil_div(rows, kWarps)));
    return mmk::launch(pack_kernel<T>, blocks, dim3(kThreads), 0, stream, *p, *source, rows, static_cast<T*>(packed), pitch);
  });
}

extern "C" int mmk_latent_delta(const Problem* p, const Strided* dout, const Strided* out, const float* dlse,
                                int64_t dlse_batch, int64_t dlse_row, float* delta, void* stream) {
  return with_type(p->type, [&](auto zero) {
    using T = decltype(zero);
    const dim3 blocks(static_cast<unsigned>(ceil_div(p->batch * p->rows, kWarps)));
    return mmk::launch(delta_kernel<T>, blocks, dim3(kThreads), 0, stream, *p, *dout, *out, dlse, dlse_batch, dlse_row,
                       delta);
  });
}
