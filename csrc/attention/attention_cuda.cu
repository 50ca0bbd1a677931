// Attention on tensor cores with mma.sync (sm_80 and newer). attention_cuda.h says which pass is which.
#include "attention/attention_cuda.h"
#include "common/dropout.h"
#include "common/ptx.cuh"
#include "common/tile.cuh"

namespace mmk::attention {
namespace {

// The problem of this block. `block` becomes its number among those of the problem.
__device__ __forceinline__ const Problem& problem_of(const Pass& pass, int& block) {
  int i = pass.count - 1;
  block = static_cast<int>(blockIdx.x);
  while (block < pass.first_block[i]) --i;
  block -= pass.first_block[i];
  return pass.problem[i];
}

// One tile of the score matrix: its batch and head, its first row and column, and the side that its rows are of.
struct Place {
  int64_t batch, head;
  int row, column;
  Side row_side;
};

template <class T>
__device__ __forceinline__ const T* matrix_at(const Segment& s, int64_t batch, int64_t head) {
  return static_cast<const T*>(s.data) + batch * s.batch + head * s.head;
}

// Where a row of a matrix in two segments begins; null where its segment has no memory.
template <class T>
__device__ __forceinline__ const T* row_at(const Segment (&segments)[2], int boundary, int64_t batch, int64_t head,
                                           int row) {
  const bool second = row >= boundary;
  const Segment& s = segments[second];
  return s.data ? matrix_at<T>(s, batch, head) + (second ? row - boundary : row) * s.row : nullptr;
}

// `count` rows of a chunk of a matrix, from those of one or both of its segments.
template <class T>
__device__ __forceinline__ void load_rows(unsigned char* tile, const Pass& pass, const Problem& p, int side, int role,
                                          const Place& at, int first_row, int count, int first_column, int columns) {
  const int boundary = p.boundary[side], last_row = first_row + count;
#pragma unroll 1
  for (int i = first_row >= boundary; i == 0 || (i == 1 && last_row > boundary); ++i) {
    const int begin = i ? boundary : 0, from = max(first_row, begin), to = i ? last_row : min(last_row, boundary);
    const uint8_t* visible = nullptr;
    int64_t visible_stride = 1;
    if (side == kKeys && p.key_mask[i].data) {
      visible = p.key_mask[i].data + at.batch * p.key_mask[i].batch;
      visible_stride = p.key_mask[i].key;
    } else if (side == kQueries && p.answered) {
      visible = p.answered + (at.batch * pass.heads + at.head) * p.length[kQueries] + begin;
    }
    const Segment& s = p.matrix[side][role][i];
    const Rows rows = {reinterpret_cast<const char*>(matrix_at<T>(s, at.batch, at.head)),
                       s.row * static_cast<int>(sizeof(T)),
                       i ? p.length[side] - boundary : min(p.length[side], boundary),
                       columns,
                       visible,
                       visible_stride,
                       pass.copy_bytes[side][role]};
    load_chunk<T>(tile + (from - first_row) * kRowBytes, rows, from - begin, to - from, first_column);
  }
}

// Where entry i of block j of this lane's accumulator stands.
__device__ __forceinline__ int entry_row(const Place& at, int i) {
  return at.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 * 8;
}
__device__ __forceinline__ int entry_column(const Place& at, int j, int i) {
  return at.column + j * 8 + threadIdx.x % 4 * 2 + i % 2;
}

// Calls use(load(row of the side), j, i) for every entry, with one load for the entries that share it. Unroll: Blocks,
// where `use` takes entries out of registers, which have no index; fewer keep the code small.
template <int Blocks, int Unroll = Blocks, class Load, class Use>
__device__ __forceinline__ void by(Side side, const Place& at, Load load, Use use) {
  if (at.row_side == side) {
    const auto first = load(entry_row(at, 0)), second = load(entry_row(at, 2));
#pragma unroll Unroll
    for (int j = 0; j < Blocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) use(i < 2 ? first : second, j, i);
    }
  } else {
#pragma unroll Unroll
    for (int j = 0; j < Blocks; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto loaded = load(entry_column(at, j, i));
        use(loaded, j, i);
        use(loaded, j, i + 2);
      }
    }
  }
}

// Bit 4 j + i: entry i of block j has a query and a key, which is not masked.
template <int Blocks>
__device__ __forceinline__ uint32_t visible_bits(const Problem& p, const Place& at) {
  static_assert(Blocks * 4 <= 32);
  const int boundary = p.boundary[kKeys];
  const KeyMask first = p.key_mask[0], second = p.key_mask[1];
  const uint8_t* const first_mask = first.data ? first.data + at.batch * first.batch : nullptr;
  const uint8_t* const second_mask = second.data ? second.data + at.batch * second.batch : nullptr;
  uint32_t bits = 0;
  by<Blocks, 4>(
      kKeys, at,
      [&](int m) {
        const uint8_t* mask = m < boundary ? first_mask : second_mask;
        const int64_t offset = m < boundary ? m * first.key : (m - boundary) * second.key;
        return m < p.length[kKeys] && (!mask || mask[offset]);
      },
      [&](bool visible, int j, int i) { bits |= static_cast<uint32_t>(visible) << (4 * j + i); });
  by<Blocks, 4>(
      kQueries, at, [&](int n) { return n >= p.length[kQueries]; },
      [&](bool outside, int j, int i) { bits &= ~(static_cast<uint32_t>(outside) << (4 * j + i)); });
  return bits;
}

// Calls use(place, entry) for the entries of a tile that lie in diagonal blocks of the bias: their place in (N, C). Few
// tiles touch the diagonal: a loop over the blocks of 8 columns, which take turns at the first one's registers.
template <int Blocks, class Use>
__device__ __forceinline__ void for_block_entries(float (&s)[Blocks][4], const Pass& pass, const Problem& p,
                                                  const Place& at, Use use) {
  const int rows_here = static_cast<int>(blockDim.x) / 2, width = pass.bias_width;
  const bool keys_first = at.row_side == kKeys;
  const int n_begin = keys_first ? at.column : at.row, n_end = n_begin + (keys_first ? Blocks * 8 : rows_here);
  const int m_begin = keys_first ? at.row : at.column, m_end = m_begin + (keys_first ? rows_here : Blocks * 8);
  if (m_end <= n_begin / width * width || m_begin >= ((n_end - 1) / width + 1) * width) return;
#pragma unroll 1
  for (int j = 0; j < Blocks; ++j) {
    float turned[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = entry_row(at, i), column = entry_column(at, j, i);
      const int n = keys_first ? column : row, m = keys_first ? row : column, first = n / width * width;
      if (m >= first && m - first < width && n < p.length[kQueries] && m < p.length[kKeys])
        use(static_cast<int64_t>(n) * width + (m - first), s[0][i]);
      turned[i] = s[0][i];
    }
#pragma unroll
    for (int i = 4; i < 4 * Blocks; ++i) s[i / 4 - 1][i % 4] = s[i / 4][i % 4];
#pragma unroll
    for (int i = 0; i < 4; ++i) s[Blocks - 1][i] = turned[i];
  }
}

// s * scale + bias; -inf where there is no key, no query, or a masked key.
template <class T, int Blocks>
__device__ __forceinline__ void finish_scores(float (&s)[Blocks][4], const Pass& pass, const Problem& p,
                                              const Place& at) {
  const int rows_here = static_cast<int>(blockDim.x) / 2;
  const bool whole = at.row + rows_here <= p.length[at.row_side] && at.column + Blocks * 8 <= p.length[!at.row_side];
  if (pass.bias_blocks) {  // first, so that what may not be attended becomes -inf after all
    const int64_t group = pass.bias_index ? pass.bias_index[at.batch] : at.batch;
    const float* blocks = pass.bias_blocks + group * p.length[kQueries] * pass.bias_width;
#pragma unroll
    for (int j = 0; j < Blocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= pass.scale;
    }
    for_block_entries(s, pass, p, at, [&](int64_t place, float& entry) { entry += blocks[place]; });
  }
  const float scale = pass.bias_blocks ? 1.0f : pass.scale;
  if (whole && !p.key_mask[0].data && !p.key_mask[1].data && !pass.bias) {
#pragma unroll
    for (int j = 0; j < Blocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= scale;
    }
    return;
  }
  const uint32_t visible = visible_bits<Blocks>(p, at);
  const int64_t bias_start = at.batch * pass.bias_strides[0] + at.head * pass.bias_strides[1];
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x = -INFINITY;
      if (visible >> (4 * j + i) & 1) {
        x = s[j][i] * scale;
        if (pass.bias) {
          const int row = entry_row(at, i), column = entry_column(at, j, i);
          const int n = at.row_side == kKeys ? column : row, m = at.row_side == kKeys ? row : column;
          const int64_t index = bias_start + n * pass.bias_strides[2] + m * pass.bias_strides[3];
          x += pass.bias_is_fp32 ? static_cast<const float*>(pass.bias)[index]
                                 : to_float(static_cast<const T*>(pass.bias)[index]);
        }
      }
      s[j][i] = x;
    }
  }
}

// Bit 4 j + i: entry i of block j survives dropout.
template <int Blocks>
__device__ __forceinline__ uint32_t keep_bits(const Pass& pass, const Problem& p, const Place& at) {
  static_assert(Blocks * 4 <= 32);
  const uint64_t seed = static_cast<uint64_t>(*pass.seed) + p.seed_offset;
  const uint64_t first = static_cast<uint64_t>(at.batch * pass.heads + at.head) * p.length[kQueries];
  uint32_t keep = 0;
  by<Blocks, 1>(
      kQueries, at, [&](int n) { return dropout_row(seed, first + n); },
      [&](DropoutRow row, int j, int i) {
        const int m = at.row_side == kKeys ? entry_row(at, i) : entry_column(at, j, i);
        keep |= static_cast<uint32_t>(dropout_bits(row, m) >= pass.drop_below) << (4 * j + i);
      });
  return keep;
}

// Where a row of the result begins; null where nobody wants it.
template <class T>
__device__ __forceinline__ T* result_at(Side row_side, const Problem& p, int64_t batch, int64_t head, int row) {
  return const_cast<T*>(row_at<T>(p.out, p.boundary[row_side], batch, head, row));
}

template <int Blocks>
__device__ __forceinline__ void drop(float (&s)[Blocks][4], uint32_t keep) {
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = keep >> (4 * j + i) & 1 ? s[j][i] : 0.0f;
  }
}

// The lane's entries of the result, into its two rows; those that are null are left out.
template <class Out, int Blocks>
__device__ __forceinline__ void store_rows(Out* const (&out)[2], const float (&d)[Blocks][4], const float (&factor)[2],
                                           const Pass& pass, int first_column) {
  const int columns = min(pass.tile_width, pass.width - first_column);
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = entry_column({}, j, i);
      if (out[i / 2] && column < columns) out[i / 2][first_column + column] = from_float<Out>(d[j][i] * factor[i / 2]);
    }
  }
}

// The gradient of the bias: entries of `d`, summed over the rows where the bias has only one.
template <int Blocks>
__device__ __forceinline__ void store_bias(unsigned char* shared, const float (&d)[Blocks][4], const Place& home,
                                           const Pass& pass, float* partial, int64_t split) {
  constexpr int kColumns = Blocks * 8, kWidth = kColumns + 1;
  const int rows_here = blockDim.x / 2;
  auto* tile = reinterpret_cast<float*>(shared);  // rows_here x kColumns, its rows kWidth apart
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[entry_row({}, i) * kWidth + entry_column({}, j, i)] = d[j][i];
  }
  __syncthreads();
  if (pass.bias_sizes[2] == 1) {
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x) {
      float total = 0.0f;
      for (int r = 0; r < rows_here; ++r) total += tile[r * kWidth + c];
      tile[c] = total;
    }
    __syncthreads();
  }
  const int64_t matrix = (split * pass.bias_sizes[0] + home.batch) * pass.bias_sizes[1] + home.head;
  for (int i = threadIdx.x; i < rows_here * kColumns; i += blockDim.x) {
    const int64_t row = home.row + i / kColumns, column = home.column + i % kColumns;
    if (row < pass.bias_sizes[2] && column < pass.bias_sizes[3]) {
      partial[(matrix * pass.bias_sizes[2] + row) * pass.bias_sizes[3] + column] =
          tile[i / kColumns * kWidth + i % kColumns];
    }
  }
}

template <class T, Mode mode, int Blocks>
__global__ void __launch_bounds__(kThreads<mode>, 1) attention_kernel(const __grid_constant__ Pass pass) {
  constexpr int kColumns = kColumnTile<mode, Blocks, sizeof(T)>, kTileBlocks = kColumns / 8;
  constexpr int kSteps = kChunkBytes / 32;
  const int warp = threadIdx.x / 32, rows_here = blockDim.x / 2;
  const int a_chunks = (pass.a_dim + kChunk<T> - 1) / kChunk<T>, b_chunks = (pass.b_dim + kChunk<T> - 1) / kChunk<T>;
  const int value_chunks = mode == Mode::bias ? 0 : (pass.tile_width + kChunk<T> - 1) / kChunk<T>;

  // The piece of work of this block. Neighbouring blocks share columns, which then come from the L2 cache.
  int piece;
  const Problem& p = problem_of(pass, piece);
  auto digit = [&](int64_t base) {
    const int d = piece % static_cast<int>(base);
    piece /= static_cast<int>(base);
    return d;
  };
  Place home;
  home.row_side = mode == Mode::backward ? pass.row_side : kQueries;
  int first_value = 0;
  int64_t split;
  if constexpr (mode == Mode::bias) {
    home.column = digit(p.column_tiles) * kColumns;
    home.row = pass.bias_sizes[2] == 1 ? 0 : digit(p.row_tiles) * rows_here;
    home.head = digit(pass.bias_sizes[1]);
    home.batch = digit(pass.bias_sizes[0]);
    split = piece;
  } else {
    home.row = digit(p.row_tiles) * rows_here;
    home.column = 0;
    first_value = digit(pass.value_tiles) * pass.tile_width;
    split = digit(p.splits);
    home.head = digit(pass.heads);
    home.batch = piece;
  }
  const int64_t first_item = split * p.items_per_split, last_item = min(first_item + p.items_per_split, p.items);
  auto place = [&](int64_t item) {
    Place at = home;
    if constexpr (mode == Mode::bias) {
      auto next = [&](int64_t count) {
        const int64_t d = item % count;
        item /= count;
        return d;
      };
      if (pass.bias_sizes[2] == 1) at.row = static_cast<int>(next(p.row_tiles)) * rows_here;
      if (pass.bias_sizes[1] == 1) at.head = next(pass.heads);
      if (pass.bias_sizes[0] == 1) at.batch = item;
    } else {
      at.column = static_cast<int>(item) * kColumns;
    }
    return at;
  };

  // Shared memory: the resident rows, chunk after chunk; then the stages of the pipeline, each one chunk of a column
  // tile, followed by the same chunk of the rows where these are not resident.
  unsigned char* const resident = shared_memory();
  unsigned char* const stages = resident + (pass.resident ? (a_chunks + b_chunks) * rows_here * kRowBytes : 0);
  const int stage_bytes = (kColumns + (pass.resident ? 0 : rows_here)) * kRowBytes;

  int64_t fetched_item = first_item;
  int fetched_chunk = 0, fetch_stage = 0, use_stage = 0;
  auto fetch = [&] {
    if (fetched_item < last_item) {
      unsigned char* stage = stages + fetch_stage * stage_bytes;
      const Place at = place(fetched_item);
      const bool is_a = fetched_chunk < a_chunks, is_value = fetched_chunk >= a_chunks + b_chunks;
      const int column = (fetched_chunk - (is_a ? 0 : is_value ? a_chunks + b_chunks : a_chunks)) * kChunk<T>;
      const int limit = is_a ? pass.a_dim : is_value ? min(pass.width, first_value + pass.tile_width) : pass.b_dim;
#pragma unroll 1
      for (int part = 0; part < (pass.resident || is_value ? 1 : 2); ++part) {
        load_rows<T>(stage + part * kColumns * kRowBytes, pass, p, part ? home.row_side : !home.row_side,
                     is_value ? pass.values : !is_a, at, part ? at.row : at.column, part ? rows_here : kColumns,
                     column + (is_value ? first_value : 0), limit);
      }
      if (++fetched_chunk == a_chunks + b_chunks + value_chunks) fetched_chunk = 0, ++fetched_item;
    }
    ptx::cp_async_commit();
    fetch_stage = fetch_stage + 1 == kStages ? 0 : fetch_stage + 1;
  };
  // The next chunk of the walk. After the barrier the stage that was used last is free, and is filled again.
  auto next_stage = [&]() -> const unsigned char* {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
    const unsigned char* stage = stages + use_stage * stage_bytes;
    use_stage = use_stage + 1 == kStages ? 0 : use_stage + 1;
    fetch();
    return stage;
  };
  auto dot = [&](float (&d)[kTileBlocks][4], int resident_chunk, int chunks, int dim) {
    for (int c = 0; c < chunks; ++c) {
      const unsigned char* stage = next_stage();
      const unsigned char* rows =
          pass.resident ? resident + (resident_chunk + c) * rows_here * kRowBytes : stage + kColumns * kRowBytes;
      const int steps = min(kSteps, (dim - c * kChunk<T> + kStep<T> - 1) / kStep<T>);
      multiply_rows<T, kColumns>(d, rows + warp * 16 * kRowBytes, stage, steps);
    }
  };

  if (pass.resident) {
    for (int c = 0; c < a_chunks + b_chunks; ++c) {
      const bool is_a = c < a_chunks;
      load_rows<T>(resident + c * rows_here * kRowBytes, pass, p, home.row_side, !is_a, home, home.row, rows_here,
                   (is_a ? c : c - a_chunks) * kChunk<T>, is_a ? pass.a_dim : pass.b_dim);
    }
  }
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch();

  float sum[mode == Mode::bias ? kTileBlocks : Blocks][4] = {};
  OnlineSoftmax softmax;
  for (int64_t item = first_item; item < last_item; ++item) {
    const Place at = place(item);
    float s[kTileBlocks][4] = {};
    dot(s, 0, a_chunks, pass.a_dim);
    finish_scores<T>(s, pass, p, at);
    const uint32_t keep = pass.seed ? keep_bits<kTileBlocks>(pass, p, at) : 0xffffffffu;
    if constexpr (mode == Mode::forward) {
      float rescale[2];
      softmax.update(s, rescale);
#pragma unroll
      for (int j = 0; j < Blocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[j][i] *= rescale[i / 2];
      }
      if (pass.seed) drop(s, keep);
    } else {
      const int64_t first_query = (at.batch * pass.heads + at.head) * p.length[kQueries];
      by<kTileBlocks>(
          kQueries, at,
          [&](int n) {  // a query without keys, or none: subtracting +inf makes its weights 0
            const float lse = n < p.length[kQueries] ? p.lse[first_query + n] : -INFINITY;
            return lse == -INFINITY ? INFINITY : lse;
          },
          [&](float lse, int j, int i) { s[j][i] = ptx::exp2((s[j][i] - lse) * kLog2e); });
      if (pass.b_dim) {
        float gradient[kTileBlocks][4] = {};
        dot(gradient, a_chunks, b_chunks, pass.b_dim);
        if (pass.seed) drop(gradient, keep);
        by<kTileBlocks>(
            kQueries, at, [&](int n) { return n < p.length[kQueries] ? p.delta[first_query + n] : 0.0f; },
            [&](float delta, int j, int i) { s[j][i] *= gradient[j][i] * pass.keep_scale - delta; });
        if (pass.dbias_blocks && first_value == 0) {
          float* to = pass.dbias_blocks + first_query * pass.bias_width;
          for_block_entries(s, pass, p, at, [&](int64_t place, float entry) { to[place] = entry; });
        }
      } else if (pass.seed) {
        drop(s, keep);
      }
    }
    if constexpr (mode == Mode::bias) {
#pragma unroll
      for (int j = 0; j < kTileBlocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[j][i] += s[j][i];
      }
    } else {
      Weights<T, kColumns> weights;
      weights.set(s);
      for (int c = 0; c < value_chunks; ++c) {
        const unsigned char* stage = next_stage();
#pragma unroll
        for (int known = 0; known * kChunk<T> < Blocks * 8; ++known) {  // registers cannot be indexed by c
          if (known == c) {
            multiply_values<T, kColumns>(sum, weights, stage, known * kChunk<T> / 8, pass.tile_width / 8);
          }
        }
      }
    }
  }

  ptx::cp_async_wait<0>();
  if constexpr (mode == Mode::bias) {
    __syncthreads();
    store_bias(shared_memory(), sum, home, pass, p.partial, split);
  } else {
    const int rows = p.length[home.row_side];
    const int64_t matrix = home.batch * pass.heads + home.head, of_split = split * pass.batch * pass.heads + matrix;
    float factor[2] = {pass.out_scale, pass.out_scale};
    if constexpr (mode == Mode::forward) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = quad_sum(softmax.sum[r]);
        factor[r] = total == 0.0f ? 0.0f : pass.out_scale / total;
        const int row = entry_row(home, 2 * r);
        if (first_value == 0 && row < rows && threadIdx.x % 4 == 0) {
          const float lse = total == 0.0f ? -INFINITY : softmax.top[r] + logf(total);
          (p.splits > 1 ? p.partial_lse + of_split * rows : p.lse + matrix * rows)[row] = lse;
        }
      }
    }
    T* out[2];
    float* partial[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = entry_row(home, 2 * r);
      out[r] = row < rows ? result_at<T>(home.row_side, p, home.batch, home.head, row) : nullptr;
      partial[r] = row < rows ? p.partial + (of_split * rows + row) * pass.width : nullptr;
    }
    if (p.splits > 1) {
      store_rows(partial, sum, factor, pass, first_value);
    } else {
      store_rows(out, sum, factor, pass, first_value);
    }
  }
}

constexpr int kMergeThreads = 256;

// Rows that a block of merge_kernel takes.
__host__ __device__ __forceinline__ int merged_rows(const Pass& pass) {
  return pass.width < kMergeThreads ? kMergeThreads / pass.width : 1;
}

// A block takes rows of one (batch, head).
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Pass pass) {
  int block;
  const Problem& p = problem_of(pass, block);
  const int rows = p.length[pass.row_side], rows_here = merged_rows(pass), lanes = kMergeThreads / rows_here;
  const int row_blocks = (rows + rows_here - 1) / rows_here;
  const int thread = static_cast<int>(threadIdx.x), row = block % row_blocks * rows_here + thread / lanes;
  if (thread / lanes >= rows_here || row >= rows) return;
  const int64_t matrix = block / row_blocks, index = matrix * rows + row, of_split = pass.batch * pass.heads * rows;

  float reference = 0.0f, total = 1.0f;
  if (p.partial_lse) {
    float top = -INFINITY;
    for (int s = 0; s < p.splits; ++s) top = fmaxf(top, p.partial_lse[s * of_split + index]);
    if (top != -INFINITY) reference = top;
    total = 0.0f;
  }
  auto weight = [&](int s) {
    return p.partial_lse ? ptx::exp2((p.partial_lse[s * of_split + index] - reference) * kLog2e) : 1.0f;
  };
  if (p.partial_lse) {
    for (int s = 0; s < p.splits; ++s) total += weight(s);
  }
  T* out = result_at<T>(pass.row_side, p, matrix / pass.heads, matrix % pass.heads, row);
  for (int e = thread % lanes; out && e < pass.width; e += lanes) {
    float sum = 0.0f;
    for (int s = 0; s < p.splits; ++s) sum += weight(s) * p.partial[(s * of_split + index) * pass.width + e];
    out[e] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
  if (p.partial_lse && thread % lanes == 0) p.lse[index] = total == 0.0f ? -INFINITY : reference + logf(total);
}

template <class T>
__global__ void sum_kernel(const float* partial, int64_t splits, int64_t count, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t s = 0; s < splits; ++s) sum += partial[s * count + i];
  out[i] = from_float<T>(sum);
}

// One warp a row.
template <class T>
__global__ void delta_kernel(const __grid_constant__ Pass pass) {
  int block;
  const Problem& p = problem_of(pass, block);
  const int queries = p.length[kQueries], boundary = p.boundary[kQueries];
  const int64_t index = static_cast<int64_t>(block) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t matrix = index / queries;
  if (matrix >= pass.batch * pass.heads) return;  // a whole warp
  const int64_t batch = matrix / pass.heads, head = matrix % pass.heads;
  const int row = static_cast<int>(index % queries);
  const T* dout = row_at<T>(p.matrix[kQueries][kB], boundary, batch, head, row);
  const T* out = row_at<T>(p.out, boundary, batch, head, row);
  float sum = 0.0f;
  for (int e = threadIdx.x % 32; e < pass.width; e += 32) sum += to_float(dout[e]) * to_float(out[e]);
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x % 32 == 0) {
    const bool answered = p.lse[index] != -INFINITY;  // or there may be NaN in dout and dlse, which nobody shall see
    p.delta[index] = answered ? sum - (p.dlse ? p.dlse[index] : 0.0f) : 0.0f;
    if (p.answered) p.answered[index] = answered;
  }
}

// Starts `blocks_of(problem)` blocks for every problem.
template <class Kernel, class Count>
int start(Kernel kernel, Pass pass, int threads, int shared_bytes, void* stream, Count blocks_of) {
  int64_t blocks = 0;
  for (int i = 0; i < pass.count; ++i) {
    pass.first_block[i] = static_cast<int>(blocks);
    blocks += blocks_of(pass.problem[i]);
    if (blocks > INT_MAX) return 1;
  }
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes, stream, pass);
}

template <class T, Mode mode, int Blocks>
int start_pass(const Pass& pass, void* stream) {
  return start(attention_kernel<T, mode, Blocks>, pass, 32 * pass.warps, pass.shared_bytes, stream,
               [&](const Problem& p) {
                 if constexpr (mode == Mode::bias) {
                   return p.splits * pass.bias_sizes[0] * pass.bias_sizes[1] *
                          (pass.bias_sizes[2] == 1 ? 1 : p.row_tiles) * p.column_tiles;
                 } else {
                   return p.splits * pass.batch * pass.heads * p.row_tiles * pass.value_tiles;
                 }
               });
}

template <class T, Mode mode>
int start_pass(const Pass& pass, void* stream) {
  if (pass.blocks_of_8 == 8) return start_pass<T, mode, 8>(pass, stream);
  if constexpr (mode != Mode::bias) {
    if (pass.blocks_of_8 == 16) return start_pass<T, mode, 16>(pass, stream);
    if constexpr (sizeof(T) == 2) {
      if (pass.blocks_of_8 == 33) return start_pass<T, mode, 33>(pass, stream);
    }
  }
  return 1;
}

template <class F>
int with_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::bf16) return f(bf16{});
  if (dtype == Dtype::fp16) return f(fp16{});
  return f(float{});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace mmk::attention

using namespace mmk::attention;

int mmk_attention_pass(Dtype dtype, Mode mode, const Pass* pass, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (mode == Mode::forward) return start_pass<T, Mode::forward>(*pass, stream);
    if (mode == Mode::backward) return start_pass<T, Mode::backward>(*pass, stream);
    return start_pass<T, Mode::bias>(*pass, stream);
  });
}

int mmk_attention_merge(Dtype dtype, const Pass* pass, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    return start(merge_kernel<decltype(zero)>, *pass, kMergeThreads, 0, stream, [&](const Problem& p) {
      if (p.splits == 1) return int64_t{0};
      return pass->batch * pass->heads * ceil_div(p.length[pass->row_side], merged_rows(*pass));
    });
  });
}

int mmk_attention_sum(Dtype dtype, const float* partial, int64_t splits, int64_t count, void* out, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return mmk::launch(sum_kernel<T>, dim3(static_cast<unsigned>(ceil_div(count, 256))), dim3(256), 0, stream, partial,
                       splits, count, static_cast<T*>(out));
  });
}

int mmk_attention_delta(Dtype dtype, const Pass* pass, void* stream) {
  constexpr int kWarps = 4;
  return with_dtype(dtype, [&](auto zero) {
    return start(delta_kernel<decltype(zero)>, *pass, 32 * kWarps, 0, stream,
                 [&](const Problem& p) { return ceil_div(pass->batch * pass->heads * p.length[kQueries], kWarps); });
  });
}
