// Attention on tensor cores with mma.sync (sm_80 and newer). attention_cuda.h says which pass is which.
#include "attention/attention_cuda.h"
#include "common/dropout.h"
#include "common/ptx.cuh"
#include "common/tile.cuh"

namespace mmk::attention {
namespace {

// One tile of the score matrix: its batch and head, its first row and column.
struct Place {
  int64_t batch, head;
  int row, column;
};

__device__ __forceinline__ Rows rows_of(const Pass& p, const Matrix& m, const Place& at, int size, int rows,
                                        int columns) {
  return {static_cast<const char*>(m.data) + (at.batch * m.batch + at.head * m.head) * size,
          m.row * size,
          rows,
          columns,
          m.is_keys && p.key_mask ? p.key_mask + at.batch * p.mask_batch : nullptr,
          p.mask_key,
          m.copy_bytes};
}

// Where entry i of block j of this lane's accumulator stands.
__device__ __forceinline__ int entry_row(const Place& at, int i) {
  return at.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 * 8;
}
__device__ __forceinline__ int entry_column(const Place& at, int j, int i) {
  return at.column + j * 8 + threadIdx.x % 4 * 2 + i % 2;
}

// Calls use(load(query), j, i) for every entry, with one load for the entries that share a query.
template <int Blocks, class Load, class Use>
__device__ __forceinline__ void by_query(const Pass& p, const Place& at, Load load, Use use) {
  if (p.rows_are_keys) {
#pragma unroll
    for (int j = 0; j < Blocks; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto loaded = load(entry_column(at, j, i));
        use(loaded, j, i);
        use(loaded, j, i + 2);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto loaded = load(entry_row(at, 2 * r));
#pragma unroll
      for (int j = 0; j < Blocks; ++j) {
        use(loaded, j, 2 * r);
        use(loaded, j, 2 * r + 1);
      }
    }
  }
}

// s * scale + bias; -inf where there is no key, no query, or a masked key.
template <class T, int Blocks>
__device__ __forceinline__ void finish_scores(float (&s)[Blocks][4], const Pass& p, const Place& at) {
  const int rows_here = static_cast<int>(blockDim.x) / 2;
  if (at.row + rows_here <= p.rows && at.column + Blocks * 8 <= p.columns && !p.key_mask && !p.bias) {
#pragma unroll
    for (int j = 0; j < Blocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[j][i] *= p.scale;
    }
    return;
  }
  const uint8_t* mask = p.key_mask ? p.key_mask + at.batch * p.mask_batch : nullptr;
  const int64_t bias_start = at.batch * p.bias_strides[0] + at.head * p.bias_strides[1];
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = entry_row(at, i), column = entry_column(at, j, i);
      const int n = p.rows_are_keys ? column : row, m = p.rows_are_keys ? row : column;
      float x = -INFINITY;
      if (n < p.queries && m < p.keys && (!mask || mask[m * p.mask_key])) {
        x = s[j][i] * p.scale;
        if (p.bias) {
          const int64_t index = bias_start + n * p.bias_strides[2] + m * p.bias_strides[3];
          x += p.bias_is_fp32 ? static_cast<const float*>(p.bias)[index]
                              : to_float(static_cast<const T*>(p.bias)[index]);
        }
      }
      s[j][i] = x;
    }
  }
}

// Bit 4 j + i: entry i of block j survives dropout.
template <int Blocks>
__device__ __forceinline__ uint32_t keep_bits(const Pass& p, const Place& at) {
  static_assert(Blocks * 4 <= 32);
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const uint64_t first = static_cast<uint64_t>(at.batch * p.heads + at.head) * p.queries;
  uint32_t keep = 0;
  by_query<Blocks>(
      p, at, [&](int n) { return dropout_row(seed, first + n); },
      [&](DropoutRow row, int j, int i) {
        const int m = p.rows_are_keys ? entry_row(at, i) : entry_column(at, j, i);
        keep |= static_cast<uint32_t>(dropout_bits(row, m) >= p.drop_below) << (4 * j + i);
      });
  return keep;
}

template <int Blocks>
__device__ __forceinline__ void drop(float (&s)[Blocks][4], uint32_t keep) {
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) s[j][i] = keep >> (4 * j + i) & 1 ? s[j][i] : 0.0f;
  }
}

template <class Out, int Blocks>
__device__ __forceinline__ void store_rows(Out* out, const float (&d)[Blocks][4], const float (&factor)[2],
                                           const Place& at, const Pass& p, int first_column) {
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = entry_row(at, i), column = entry_column({0, 0, 0, 0}, j, i);
      if (row < p.rows && column < p.tile_width && first_column + column < p.width) {
        out[static_cast<int64_t>(row) * p.width + first_column + column] = from_float<Out>(d[j][i] * factor[i / 2]);
      }
    }
  }
}

// The gradient of the bias: entries of `d`, summed over the rows where the bias has only one.
template <int Blocks>
__device__ __forceinline__ void store_bias(unsigned char* shared, const float (&d)[Blocks][4], const Place& home,
                                           const Pass& p, int64_t split) {
  constexpr int kColumns = Blocks * 8, kWidth = kColumns + 1;
  const int rows_here = blockDim.x / 2;
  auto* tile = reinterpret_cast<float*>(shared);  // rows_here x kColumns, its rows kWidth apart
#pragma unroll
  for (int j = 0; j < Blocks; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) tile[entry_row({0, 0, 0, 0}, i) * kWidth + entry_column({0, 0, 0, 0}, j, i)] = d[j][i];
  }
  __syncthreads();
  if (p.bias_sizes[2] == 1) {
    for (int c = threadIdx.x; c < kColumns; c += blockDim.x) {
      float total = 0.0f;
      for (int r = 0; r < rows_here; ++r) total += tile[r * kWidth + c];
      tile[c] = total;
    }
    __syncthreads();
  }
  const int64_t matrix = (split * p.bias_sizes[0] + home.batch) * p.bias_sizes[1] + home.head;
  for (int i = threadIdx.x; i < rows_here * kColumns; i += blockDim.x) {
    const int64_t row = home.row + i / kColumns, column = home.column + i % kColumns;
    if (row < p.bias_sizes[2] && column < p.bias_sizes[3]) {
      p.partial[(matrix * p.bias_sizes[2] + row) * p.bias_sizes[3] + column] =
          tile[i / kColumns * kWidth + i % kColumns];
    }
  }
}

template <class T, Mode mode, int Blocks>
__global__ void __launch_bounds__(kThreads<mode>, 1) attention_kernel(const __grid_constant__ Pass p) {
  constexpr int kColumns = kColumnTile<mode, Blocks, sizeof(T)>, kTileBlocks = kColumns / 8, kSize = sizeof(T);
  constexpr int kSteps = kChunkBytes / 32;
  const int warp = threadIdx.x / 32, rows_here = blockDim.x / 2;
  const int a_chunks = (p.a_dim + kChunk<T> - 1) / kChunk<T>, b_chunks = (p.b_dim + kChunk<T> - 1) / kChunk<T>;
  const int value_chunks = mode == Mode::bias ? 0 : (p.tile_width + kChunk<T> - 1) / kChunk<T>;

  // The piece of work of this block. Neighbouring blocks share columns, which then come from the L2 cache.
  int64_t piece = blockIdx.x;
  auto digit = [&](int64_t base) {
    const int64_t d = piece % base;
    piece /= base;
    return d;
  };
  Place home;
  int first_value = 0;
  int64_t split;
  if constexpr (mode == Mode::bias) {
    home.column = static_cast<int>(digit(p.column_tiles)) * kColumns;
    home.row = p.bias_sizes[2] == 1 ? 0 : static_cast<int>(digit(p.row_tiles)) * rows_here;
    home.head = digit(p.bias_sizes[1]);
    home.batch = digit(p.bias_sizes[0]);
    split = piece;
  } else {
    home.row = static_cast<int>(digit(p.row_tiles)) * rows_here;
    home.column = 0;
    first_value = static_cast<int>(digit(p.value_tiles)) * p.tile_width;
    split = digit(p.splits);
    home.head = digit(p.heads);
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
      if (p.bias_sizes[2] == 1) at.row = static_cast<int>(next(p.row_tiles)) * rows_here;
      if (p.bias_sizes[1] == 1) at.head = next(p.heads);
      if (p.bias_sizes[0] == 1) at.batch = item;
    } else {
      at.column = static_cast<int>(item) * kColumns;
    }
    return at;
  };

  // Shared memory: the resident rows, chunk after chunk; then the stages of the pipeline, each one chunk of a column
  // tile, followed by the same chunk of the rows where these are not resident.
  unsigned char* const resident = shared_memory();
  unsigned char* const stages = resident + (p.resident ? (a_chunks + b_chunks) * rows_here * kRowBytes : 0);
  const int stage_bytes = (kColumns + (p.resident ? 0 : rows_here)) * kRowBytes;

  int64_t fetched_item = first_item;
  int fetched_chunk = 0, fetch_stage = 0, use_stage = 0;
  auto fetch = [&] {
    if (fetched_item < last_item) {
      unsigned char* stage = stages + fetch_stage * stage_bytes;
      const Place at = place(fetched_item);
      const bool is_a = fetched_chunk < a_chunks, is_value = fetched_chunk >= a_chunks + b_chunks;
      const int column = (fetched_chunk - (is_a ? 0 : is_value ? a_chunks + b_chunks : a_chunks)) * kChunk<T>;
      const int limit = is_a ? p.a_dim : is_value ? min(p.width, first_value + p.tile_width) : p.b_dim;
#pragma unroll 1
      for (int part = 0; part < (p.resident || is_value ? 1 : 2); ++part) {
        const Matrix& m = part ? (is_a ? p.rows_a : p.rows_b) : is_a ? p.columns_a : is_value ? p.values : p.columns_b;
        load_chunk<T>(stage + part * kColumns * kRowBytes, rows_of(p, m, at, kSize, part ? p.rows : p.columns, limit),
                      part ? at.row : at.column, part ? rows_here : kColumns, column + (is_value ? first_value : 0));
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
          p.resident ? resident + (resident_chunk + c) * rows_here * kRowBytes : stage + kColumns * kRowBytes;
      const int steps = min(kSteps, (dim - c * kChunk<T> + kStep<T> - 1) / kStep<T>);
      multiply_rows<T, kColumns>(d, rows + warp * 16 * kRowBytes, stage, steps);
    }
  };

  if (p.resident) {
    for (int c = 0; c < a_chunks + b_chunks; ++c) {
      const bool is_a = c < a_chunks;
      const Rows rows = rows_of(p, is_a ? p.rows_a : p.rows_b, home, kSize, p.rows, is_a ? p.a_dim : p.b_dim);
      load_chunk<T>(resident + c * rows_here * kRowBytes, rows, home.row, rows_here,
                    (is_a ? c : c - a_chunks) * kChunk<T>);
    }
  }
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch();

  float sum[mode == Mode::bias ? kTileBlocks : Blocks][4] = {};
  OnlineSoftmax softmax;
  for (int64_t item = first_item; item < last_item; ++item) {
    const Place at = place(item);
    float s[kTileBlocks][4] = {};
    dot(s, 0, a_chunks, p.a_dim);
    finish_scores<T>(s, p, at);
    const uint32_t keep = p.seed ? keep_bits<kTileBlocks>(p, at) : 0xffffffffu;
    if constexpr (mode == Mode::forward) {
      float rescale[2];
      softmax.update(s, rescale);
#pragma unroll
      for (int j = 0; j < Blocks; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[j][i] *= rescale[i / 2];
      }
      if (p.seed) drop(s, keep);
    } else {
      const int64_t first_query = (at.batch * p.heads + at.head) * p.queries;
      by_query<kTileBlocks>(
          p, at,
          [&](int n) {  // a query without keys, or none: subtracting +inf makes its weights 0
            const float lse = n < p.queries ? p.lse[first_query + n] : -INFINITY;
            return lse == -INFINITY ? INFINITY : lse;
          },
          [&](float lse, int j, int i) { s[j][i] = ptx::exp2((s[j][i] - lse) * kLog2e); });
      if (p.b_dim) {
        float gradient[kTileBlocks][4] = {};
        dot(gradient, a_chunks, b_chunks, p.b_dim);
        if (p.seed) drop(gradient, keep);
        by_query<kTileBlocks>(
            p, at, [&](int n) { return n < p.queries ? p.delta[first_query + n] : 0.0f; },
            [&](float delta, int j, int i) { s[j][i] *= gradient[j][i] * p.keep_scale - delta; });
      } else if (p.seed) {
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
            multiply_values<T, kColumns>(sum, weights, stage, known * kChunk<T> / 8, p.tile_width / 8);
          }
        }
      }
    }
  }

  ptx::cp_async_wait<0>();
  if constexpr (mode == Mode::bias) {
    __syncthreads();
    store_bias(shared_memory(), sum, home, p, split);
  } else {
    float factor[2] = {p.out_scale, p.out_scale};
    const int64_t matrix = home.batch * p.heads + home.head;
    const int64_t partial_matrix = split * p.batch * p.heads + matrix;
    if constexpr (mode == Mode::forward) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float total = quad_sum(softmax.sum[r]);
        factor[r] = total == 0.0f ? 0.0f : p.out_scale / total;
        const int row = entry_row(home, 2 * r);
        if (first_value == 0 && row < p.rows && threadIdx.x % 4 == 0) {
          const float lse = total == 0.0f ? -INFINITY : softmax.top[r] + logf(total);
          (p.splits > 1 ? p.partial_lse + partial_matrix * p.rows : p.lse + matrix * p.rows)[row] = lse;
        }
      }
    }
    if (p.splits > 1) {
      store_rows(p.partial + partial_matrix * p.rows * p.width, sum, factor, home, p, first_value);
    } else {
      store_rows(static_cast<T*>(p.out) + matrix * p.rows * p.width, sum, factor, home, p, first_value);
    }
  }
}

// One block a row.
template <class T>
__global__ void merge_kernel(const float* partial, const float* partial_lse, int64_t splits, int64_t rows,
                             int64_t width, T* out, float* lse) {
  const int64_t row = blockIdx.x;
  float top = -INFINITY;
  for (int64_t s = 0; s < splits; ++s) top = fmaxf(top, partial_lse[s * rows + row]);
  const float reference = top == -INFINITY ? 0.0f : top;
  float total = 0.0f;
  for (int64_t s = 0; s < splits; ++s) total += ptx::exp2((partial_lse[s * rows + row] - reference) * kLog2e);
  for (int64_t e = threadIdx.x; e < width; e += blockDim.x) {
    float sum = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      sum += ptx::exp2((partial_lse[s * rows + row] - reference) * kLog2e) * partial[(s * rows + row) * width + e];
    }
    out[row * width + e] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
  }
  if (threadIdx.x == 0) lse[row] = total == 0.0f ? -INFINITY : reference + logf(total);
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
__global__ void delta_kernel(const Matrix dout, const T* out, const float* dlse, int64_t heads, int64_t rows,
                             int64_t width, int64_t count, float* delta) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (row >= count) return;  // a whole warp
  const int64_t matrix = row / rows;
  const T* gradient = static_cast<const T*>(dout.data) + matrix / heads * dout.batch + matrix % heads * dout.head +
                      row % rows * dout.row;
  float sum = 0.0f;
  for (int64_t e = threadIdx.x % 32; e < width; e += 32) sum += to_float(gradient[e]) * to_float(out[row * width + e]);
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (threadIdx.x % 32 == 0) delta[row] = sum - (dlse ? dlse[row] : 0.0f);
}

template <class T, Mode mode, int Blocks>
int start(const Pass& p, void* stream) {
  const int64_t blocks = mode == Mode::bias ? p.splits * p.bias_sizes[0] * p.bias_sizes[1] *
                                                  (p.bias_sizes[2] == 1 ? 1 : p.row_tiles) * p.column_tiles
                                            : p.splits * p.batch * p.heads * p.row_tiles * p.value_tiles;
  return launch(attention_kernel<T, mode, Blocks>, dim3(static_cast<unsigned>(blocks)), dim3(32 * p.warps),
                p.shared_bytes, stream, p);
}

template <class T, Mode mode>
int start(const Pass& p, void* stream) {
  if (p.blocks_of_8 == 8) return start<T, mode, 8>(p, stream);
  if constexpr (mode != Mode::bias) {
    if (p.blocks_of_8 == 16) return start<T, mode, 16>(p, stream);
    if constexpr (sizeof(T) == 2) {
      if (p.blocks_of_8 == 33) return start<T, mode, 33>(p, stream);
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

unsigned blocks_of(int64_t count, int64_t a_block) { return static_cast<unsigned>((count + a_block - 1) / a_block); }

}  // namespace
}  // namespace mmk::attention

using namespace mmk::attention;

int mmk_attention_pass(Dtype dtype, Mode mode, const Pass* pass, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (mode == Mode::forward) return start<T, Mode::forward>(*pass, stream);
    if (mode == Mode::backward) return start<T, Mode::backward>(*pass, stream);
    return start<T, Mode::bias>(*pass, stream);
  });
}

int mmk_attention_merge(Dtype dtype, const float* partial, const float* partial_lse, int64_t splits, int64_t rows,
                        int64_t width, void* out, float* lse, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return mmk::launch(merge_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(64), 0, stream, partial, partial_lse,
                       splits, rows, width, static_cast<T*>(out), lse);
  });
}

int mmk_attention_sum(Dtype dtype, const float* partial, int64_t splits, int64_t count, void* out, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return mmk::launch(sum_kernel<T>, dim3(blocks_of(count, 256)), dim3(256), 0, stream, partial, splits, count,
                       static_cast<T*>(out));
  });
}

int mmk_attention_delta(Dtype dtype, const Matrix* dout, const void* out, const float* dlse, int64_t batch,
                        int64_t heads, int64_t rows, int64_t width, float* delta, void* stream) {
  return with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return mmk::launch(delta_kernel<T>, dim3(blocks_of(batch * heads * rows, 4)), dim3(128), 0, stream, *dout,
                       static_cast<const T*>(out), dlse, heads, rows, width, batch * heads * rows, delta);
  });
}
