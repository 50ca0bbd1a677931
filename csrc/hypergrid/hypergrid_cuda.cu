// HyperGrid's products on tensor cores by mma.sync, for compute capability 8.0 and newer. Each of the three is a matrix
// product whose sum has pieces - blocks of the grid, or the rows of a gate - with one factor for every piece and block
// of the result: the partial product of a piece is made in registers and added with its factors. README.md in
// mmkernels/ops/hypergrid has the derivation and the time model.
#include <climits>
#include <type_traits>

#include "common/rows.cuh"
#include "common/tile.cuh"
#include "hypergrid/hypergrid_device.cuh"

namespace mmk::hypergrid {
namespace {

constexpr int kThreads = 256, kWarpColumns = 32, kMostStages = 3;
constexpr int kMostBlocks = 16;               // of the grid that a tile of 128 columns meets
constexpr int kTablePitch = kMostBlocks + 1;  // floats, odd: rows fall into different banks

// A block has 2 x 4 warps; the tile of a warp is kFragments x 16 rows and 32 columns.
template <class T>
struct Tile {
  static constexpr int kRows = sizeof(T) == 4 ? 64 : 128, kFragments = kRows / 32;
  static constexpr int kDepth = kChunk<T>;                                     // of the contraction, a stage
  static constexpr int kRowsPitch = kRows * static_cast<int>(sizeof(T)) + 16;  // of a tile with contraction rows
  static constexpr int kColumnsPitch = kColumns * static_cast<int>(sizeof(T)) + 16;
};

// --- Tiles into shared memory ---

template <int Bytes, class Source>
__device__ __forceinline__ void copy_pieces(unsigned char* tile, int pitch, int count, int width, int valid,
                                            const void* base, Source source) {
  const int pieces = width / Bytes;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * pieces; i += kThreads) {
    const int row = i / pieces, at = i % pieces * Bytes;
    const char* from = source(row);
    const int bytes = from ? min(max(valid - at, 0), Bytes) : 0;
    ptx::cp_async<Bytes>(tile + row * pitch + at, bytes ? from + at : static_cast<const char*>(base), bytes);
  }
}

// `count` rows of `width` bytes, of which `valid` exist; zeros elsewhere and where source(row) is null. All addresses
// are multiples of `aligned` (16, 4 or 2). The copies belong to the next cp_async_commit().
template <class Source>
__device__ __forceinline__ void copy_rows(unsigned char* tile, int pitch, int count, int width, int valid, int aligned,
                                          const void* base, Source source) {
  if (aligned == 16) {
    copy_pieces<16>(tile, pitch, count, width, valid, base, source);
  } else if (aligned == 4) {
    copy_pieces<4>(tile, pitch, count, width, valid, base, source);
  } else {
    const int pieces = width / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * pieces; i += kThreads) {
      const int row = i / pieces, at = i % pieces * 4;
      const auto* from = reinterpret_cast<const uint16_t*>(source(row));
      const uint32_t low = from && at < valid ? __ldg(from + at / 2) : 0;
      const uint32_t high = from && at + 2 < valid ? __ldg(from + at / 2 + 1) : 0;
      *reinterpret_cast<uint32_t*>(tile + row * pitch + at) = low | high << 16;
    }
  }
}

// What divides the addresses of a matrix's pieces that begin every `step` elements.
template <class T>
int alignment(const void* data, int64_t row, int64_t step) {
  const uint64_t bits = reinterpret_cast<uint64_t>(data) | static_cast<uint64_t>(row * sizeof(T)) |
                        static_cast<uint64_t>(step * sizeof(T));
  return bits % 16 == 0 ? 16 : bits % 4 == 0 ? 4 : 2;
}

// --- Operands ---

template <class T>
__device__ __forceinline__ uint32_t relu_word(uint32_t x) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(x) < 0.0f ? 0 : x;  // NaN stays
  if constexpr (sizeof(T) == 2) return ptx::relu_pair<T>(x);
}

// A k-step of 16 rows of the left operand. By rows: rows of the operand `pitch` apart, the contraction along them; else
// the other way round.
template <class T, bool ByRows>
__device__ __forceinline__ Operand<T> left_operand(const unsigned char* tile, int pitch, int row, int step, bool relu) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  if constexpr (ByRows) {
    ptx::ldmatrix_x4(r, tile + (row + lane % 16) * pitch + step * 32 + lane / 16 * 16);
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(r, tile + (step * 16 + lane / 16 * 8 + lane % 8) * pitch + (row + lane / 8 % 2 * 8) * 2);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = *reinterpret_cast<const uint32_t*>(tile + (step * 8 + lane % 4 + i / 2 * 4) * pitch +
                                                (row + lane / 4 + i % 2 * 8) * 4);
  }
  Operand<T> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (relu) r[i] = relu_word<T>(r[i]);
    if constexpr (sizeof(T) == 4) {
      set_operand(a, i, __uint_as_float(r[i]));
    } else {
      a.r[i] = r[i];
    }
  }
  return a;
}

// A k-step of 16 columns of the right operand: two registers for each 8.
template <class T, bool ByRows>
__device__ __forceinline__ void right_operand(uint32_t (&b)[4], const unsigned char* tile, int pitch, int column,
                                              int step, bool relu) {
  load_right<T, ByRows>(b, tile, pitch, column, step);
  if (relu) {
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i] = relu_word<T>(b[i]);
  }
}

// Where a warp and a lane stand in the tile of a block: element i of fragment (f, j) is row(f, i / 2), column(j, i %
// 2).
template <class T>
struct Place {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_row = warp / 4 * Tile<T>::kFragments * 16, first_column = warp % 4 * kWarpColumns;

  __device__ __forceinline__ int row(int f, int half) const { return first_row + f * 16 + half * 8 + lane / 4; }
  __device__ __forceinline__ int column(int j, int i) const { return first_column + j * 8 + lane % 4 * 2 + i; }
};

template <class T>
using Sums = float[Tile<T>::kFragments][kWarpColumns / 8][4];

template <class T, bool LeftByRows, bool RightByRows>
__device__ __forceinline__ void multiply_stage(Sums<T>& part, const Place<T>& place, const unsigned char* left,
                                               int left_pitch, const unsigned char* right, int right_pitch, int steps,
                                               bool relu_left, bool relu_right) {
#pragma unroll
  for (int k = 0; k < Tile<T>::kDepth / kStep<T>; ++k) {
    if (k < steps) {
      uint32_t b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        right_operand<T, RightByRows>(b[j], right, right_pitch, place.first_column + j * 16, k, relu_right);
#pragma unroll
      for (int f = 0; f < Tile<T>::kFragments; ++f) {
        const Operand<T> a = left_operand<T, LeftByRows>(left, left_pitch, place.first_row + f * 16, k, relu_left);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(part[f][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void clear(Sums<T>& sums) {
#pragma unroll
  for (int f = 0; f < Tile<T>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[f][j][i] = 0.0f;
}

__device__ __forceinline__ void await_stage(int stages) {
  if (stages == 3) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
  __syncthreads();
}

// --- Results ---

template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Epilogue e, const float* partial, T* out, int splits, int64_t count, int64_t columns) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int s = 0; s < splits; ++s) sum += partial[s * count + i];
  out[i] = from_float<T>(finished<T>(e, sum, i / columns, i % columns));
}

template <class T>
int finish(const Epilogue& e, const float* partial, void* out, int splits, int64_t rows, int64_t columns,
           void* stream) {
  const int64_t count = rows * columns;
  return launch(finish_kernel<T>, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0,
                stream, e, partial, static_cast<T*>(out), splits, count, columns);
}

template <class T>
__global__ void __launch_bounds__(kThreads) activate_kernel(const Epilogue e, T* out, int64_t count, int64_t columns) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= count) return;
  const uint64_t seed = e.seed ? static_cast<uint64_t>(*e.seed) : 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (i + j >= count) return;
    const int64_t m = (i + j) / columns, n = (i + j) % columns;
    float y = activated(to_float(static_cast<const T*>(e.x)[m * e.x_row + n]), e.activation);
    if (e.seed) {
      const DropoutRow row = dropout_row(seed, static_cast<uint64_t>(m));
      y = dropout_bits(row, static_cast<uint32_t>(n)) >= e.threshold ? y * e.gain : 0.0f;
    }
    out[i + j] = from_float<T>(y);
  }
}

// --- The forward and the gradient of x ---

template <class T, bool Transposed>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const Product d, int stages, bool by_row, int left_aligned, int right_aligned) {
  using Shape = Tile<T>;
  constexpr int kSize = sizeof(T), kLeftBytes = Shape::kRows * kRowBytes;
  constexpr int kRightPitch = Transposed ? Shape::kColumnsPitch : kRowBytes;
  constexpr int kStage = kLeftBytes + (Transposed ? Shape::kDepth : kColumns) * kRightPitch;
  const Place<T> place;
  const int columns = d.q * d.kq, column_tiles = (columns + kColumns - 1) / kColumns;
  const int tile = blockIdx.x / d.splits, split = blockIdx.x % d.splits;
  const int first_column = tile % column_tiles * kColumns;
  // Rows of a tile are those of one group, or (by_row) any.
  const int64_t group_rows = by_row ? d.rows : d.gates.group_rows;
  const int64_t row_tiles = (group_rows + Shape::kRows - 1) / Shape::kRows, group = tile / column_tiles / row_tiles;
  const int64_t local_row = tile / column_tiles % row_tiles * Shape::kRows, first_row = group * group_rows + local_row;
  const int count = static_cast<int>(min(group_rows - local_row, int64_t{Shape::kRows}));

  unsigned char* shared = shared_memory();
  const int table_rows = by_row ? Shape::kRows : 1, table_size = table_rows * kTablePitch;
  auto* numbers = reinterpret_cast<int64_t*>(shared + stages * kStage);
  auto* tables = reinterpret_cast<float*>(numbers + table_rows);
  const int first_q = first_column / d.kq, last_q = (min(first_column + kColumns, columns) - 1) / d.kq;
  const int met = last_q - first_q + 1;

  // The gate of each row: its offset, or -1 for a number that is no gate's.
  for (int i = threadIdx.x; i < table_rows; i += kThreads) {
    int64_t offset = 0;
    if (i < count) {
      int64_t g = d.gates.count == 1 && !d.gates.index ? 0 : (first_row + i) / d.gates.group_rows;
      if (d.gates.index) g = d.gates.index[g];
      offset = g >= 0 && g < d.gates.count ? g * d.gates.stride[0] : -1;
    }
    numbers[i] = offset;
  }
  __syncthreads();

  const int chunks = (d.kp + Shape::kDepth - 1) / Shape::kDepth;
  const int first_p = split * d.split_blocks, blocks = min(d.split_blocks, d.p - first_p), steps = blocks * chunks;
  const char *left = static_cast<const char*>(d.left), *right = static_cast<const char*>(d.right);
  auto load = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % stages * kStage;
      const int block = step / chunks, chunk = step % chunks, p = first_p + block;
      const int64_t k = int64_t{p} * d.kp + chunk * Shape::kDepth;
      const int rest = min(d.kp - chunk * Shape::kDepth, Shape::kDepth);
      copy_rows(stage, kRowBytes, Shape::kRows, kChunkBytes, rest * kSize, left_aligned, left,
                [&](int row) { return row < count ? left + ((first_row + row) * d.left_row + k) * kSize : nullptr; });
      if constexpr (Transposed) {
        copy_rows(stage + kLeftBytes, kRightPitch, Shape::kDepth, kColumns * kSize,
                  min(columns - first_column, kColumns) * kSize, right_aligned, right, [&](int row) {
                    return row < rest ? right + ((k + row) * d.right_row + first_column) * kSize : nullptr;
                  });
      } else {
        copy_rows(
            stage + kLeftBytes, kRightPitch, kColumns, kChunkBytes, rest * kSize, right_aligned, right, [&](int row) {
              return first_column + row < columns ? right + ((first_column + row) * d.right_row + k) * kSize : nullptr;
            });
      }
      if (chunk == 0) {
        float* table = tables + block % stages * table_size;
        for (int i = threadIdx.x; i < table_rows * met; i += kThreads) {
          const int row = i / met, q = i % met;
          float* to = table + row * kTablePitch + q;
          if (numbers[row] < 0) {
            *to = NAN;
          } else {
            const int64_t at = numbers[row] + p * d.gates.stride[1] + (first_q + q) * d.gates.stride[2];
            ptx::cp_async<4>(to, d.gates.data + at);
          }
        }
      }
    }
    ptx::cp_async_commit();
  };

  int block_of[8];  // of the grid, for the columns of this lane
#pragma unroll
  for (int j = 0; j < 8; ++j)
    block_of[j] = min(first_column + place.column(j / 2, j % 2), columns - 1) / d.kq - first_q;

  Sums<T> acc, part;
  clear<T>(acc);
  clear<T>(part);
  for (int step = 0; step < stages - 1; ++step) load(step);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    await_stage(stages);
    load(step + stages - 1);
    const unsigned char* stage = shared + step % stages * kStage;
    const int chunk = step % chunks, rest = min(d.kp - chunk * Shape::kDepth, Shape::kDepth);
    multiply_stage<T, true, !Transposed>(part, place, stage, kRowBytes, stage + kLeftBytes, kRightPitch,
                                         (rest + kStep<T> - 1) / kStep<T>, d.relu, false);
    if (chunk == chunks - 1) {
      const float* table = tables + step / chunks % stages * table_size;
#pragma unroll
      for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* factors = table + (by_row ? place.row(f, half) * kTablePitch : 0);
#pragma unroll
          for (int j = 0; j < 8; ++j)
            acc[f][j / 2][half * 2 + j % 2] +=
                part[f][j / 2][half * 2 + j % 2] * (d.gates.residual + factors[block_of[j]]);
        }
      }
      clear<T>(part);
    }
  }

  auto* out = static_cast<T*>(d.out);
#pragma unroll 1
  for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = place.row(f, half);
      if (row >= count) continue;
      const int64_t m = first_row + row;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int n = first_column + place.column(j / 2, j % 2);
        if (n >= columns) continue;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Shape::kFragments; ++i) sum = i == f ? acc[i][j / 2][half * 2 + j % 2] : sum;
        if (d.splits > 1) {
          d.partial[(split * d.rows + m) * columns + n] = sum;
        } else {
          out[m * columns + n] = from_float<T>(finished<T>(d.epilogue, sum, m, n));
        }
      }
    }
  }
}

template <class T, bool Transposed>
int start_product(const Product& d, void* stream) {
  using Shape = Tile<T>;
  // Tiles that cross groups need a factor for each row, tiles that do not waste rows at the ends of groups.
  const int64_t group = d.gates.count == 1 && !d.gates.index ? d.rows : d.gates.group_rows;
  const bool by_row = group % Shape::kRows != 0 && group < 4 * Shape::kRows;
  Product e = d;
  if (group == d.rows) e.gates.group_rows = d.rows;
  const int64_t groups = by_row ? 1 : d.rows / group, own = by_row ? d.rows : group;
  const int64_t columns = int64_t{d.q} * d.kq;
  const int64_t tiles = groups * ((own + Shape::kRows - 1) / Shape::kRows) * ((columns + kColumns - 1) / kColumns);
  if (tiles * d.splits > INT_MAX) return 1;
  const int left = static_cast<int>(Shape::kRows * kRowBytes);
  const int right = Transposed ? Shape::kDepth * Shape::kColumnsPitch : kColumns * kRowBytes;
  const int table = (by_row ? Shape::kRows : 1) * kTablePitch * 4;
  auto bytes = [&](int stages) { return stages * (left + right + table) + (by_row ? Shape::kRows : 1) * 8; };
  const int stages = bytes(kMostStages) <= mmk_shared_memory() ? kMostStages : 2;
  const int left_aligned = alignment<T>(d.left, d.left_row, d.kp);
  const int right_aligned = alignment<T>(d.right, d.right_row, Transposed ? 8 : d.kp);
  const int code = launch(product_kernel<T, Transposed>, dim3(static_cast<unsigned>(tiles * d.splits)), dim3(kThreads),
                          bytes(stages), stream, e, stages, by_row, left_aligned, right_aligned);
  if (code || d.splits == 1) return code;
  return finish<T>(d.epilogue, d.partial, d.out, d.splits, d.rows, columns, stream);
}

// --- The gradients of the weight and of the gate ---

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    weight_kernel(const WeightGradient d, int stages, int left_aligned, int right_aligned) {
  using Shape = Tile<T>;
  constexpr int kSize = sizeof(T), kLeftBytes = Shape::kDepth * Shape::kRowsPitch;
  constexpr int kStage = kLeftBytes + Shape::kDepth * Shape::kColumnsPitch;
  const Place<T> place;
  const int rows = d.c * d.kc, columns = d.r * d.kr;  // of the result: n and k
  const int row_tiles = (rows + Shape::kRows - 1) / Shape::kRows, column_tiles = (columns + kColumns - 1) / kColumns;
  const int tile = blockIdx.x % (row_tiles * column_tiles), split = blockIdx.x / (row_tiles * column_tiles);
  const int row_tile = tile / column_tiles, column_tile = tile % column_tiles;
  const int first_row = row_tile * Shape::kRows, first_column = column_tile * kColumns;
  const int first_c = first_row / d.kc, first_r = first_column / d.kr;
  const int met_c = (min(first_row + Shape::kRows, rows) - 1) / d.kc - first_c + 1;
  const int met_r = (min(first_column + kColumns, columns) - 1) / d.kr - first_r + 1;

  unsigned char* shared = shared_memory();
  auto* tables = reinterpret_cast<float*>(shared + stages * kStage);
  float* products = tables + stages * kMostBlocks * kTablePitch;  // (4, kRows, blocks in 32 columns)

  const char *dy = static_cast<const char*>(d.dy), *left = static_cast<const char*>(d.left);
  Walk ahead(d, split, Shape::kDepth), here(d, split, Shape::kDepth);
  int loaded = 0, segments_loaded = 0;
  auto load = [&] {
    if (!ahead.done()) {
      unsigned char* stage = shared + loaded % stages * kStage;
      const int count = ahead.rows();
      const int first = ahead.begin_row + ahead.chunk * Shape::kDepth,
                group_rows = static_cast<int>(d.gates.group_rows);
      auto source_row = [&](int row) {
        const int m = first + row;
        return d.order ? d.order[m / group_rows] * group_rows + m % group_rows : int64_t{m};
      };
      copy_rows(stage, Shape::kRowsPitch, Shape::kDepth, Shape::kRows * kSize,
                min(rows - first_row, Shape::kRows) * kSize, left_aligned, dy,
                [&](int row) { return row < count ? dy + (source_row(row) * d.dy_row + first_row) * kSize : nullptr; });
      copy_rows(stage + kLeftBytes, Shape::kColumnsPitch, Shape::kDepth, kColumns * kSize,
                min(columns - first_column, kColumns) * kSize, right_aligned, left, [&](int row) {
                  return row < count ? left + (source_row(row) * d.left_row + first_column) * kSize : nullptr;
                });
      if (ahead.chunk == 0) {
        float* table = tables + segments_loaded % stages * (kMostBlocks * kTablePitch);
        const float* gate = d.gates.data + int64_t{ahead.segment / d.chunks} * d.gates.stride[0];
        for (int i = threadIdx.x; i < met_c * met_r; i += kThreads) {
          const int c = i / met_r, r = i % met_r;
          ptx::cp_async<4>(table + c * kTablePitch + r,
                           gate + (first_r + r) * d.gates.stride[1] + (first_c + c) * d.gates.stride[2]);
        }
      }
      segments_loaded += ahead.last_of_segment();
      ahead.advance(d);
      ++loaded;
    }
    ptx::cp_async_commit();
  };

  int r_of[8];  // blocks of the grid that this lane's columns lie in
#pragma unroll
  for (int j = 0; j < 8; ++j) r_of[j] = min(first_column + place.column(j / 2, j % 2), columns - 1) / d.kr - first_r;
  const int unit_r =
      min(first_column + place.first_column, columns - 1) / d.kr - first_r;  // of this warp's first column
  const int unit_met =
      min(first_column + place.first_column + kWarpColumns - 1, columns - 1) / d.kr - first_r - unit_r + 1;
  constexpr int kUnitBlocks = kWarpColumns / 8 + 1;

  Sums<T> acc, part;
  clear<T>(acc);
  clear<T>(part);
  for (int step = 0; step < stages - 1; ++step) load();
  int segments = 0;
#pragma unroll 1
  for (int step = 0; !here.done(); ++step) {
    await_stage(stages);
    load();
    const unsigned char* stage = shared + step % stages * kStage;
    const int count = max(here.rows(), 0);
    multiply_stage<T, false, false>(part, place, stage, Shape::kRowsPitch, stage + kLeftBytes, Shape::kColumnsPitch,
                                    (count + kStep<T> - 1) / kStep<T>, false, d.relu);
    const bool last = here.last_of_segment();
    const bool empty = here.begin_row >= here.end_row;
    const int segment = here.segment;
    here.advance(d);
    if (!last) continue;
    const float* table = tables + segments++ % stages * (kMostBlocks * kTablePitch);
    if (!empty) {  // a gate without rows has no part in the sum, whatever it is
#pragma unroll
      for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = min(first_row + place.row(f, half), rows - 1) / d.kc - first_c;
#pragma unroll
          for (int j = 0; j < 8; ++j)
            acc[f][j / 2][half * 2 + j % 2] +=
                part[f][j / 2][half * 2 + j % 2] * (d.gates.residual + table[c * kTablePitch + r_of[j]]);
        }
      }
    }
    if (d.parts) {
      // dgate: part o weight, summed over the columns of a block in a warp, then over its rows.
      const auto* weight = static_cast<const T*>(d.weight);
#pragma unroll
      for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = place.row(f, half), n = first_row + row;
          __syncwarp();  // or the compiler would load the weights of all rows first
          float z[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const int k = first_column + place.column(j / 2, j % 2);
            const bool inside = !empty && n < rows && k < columns;
            z[j] = inside ? part[f][j / 2][half * 2 + j % 2] * to_float(weight[n * d.weight_row + k]) : 0.0f;
          }
#pragma unroll 1
          for (int u = 0; u < unit_met; ++u) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < 8; ++j) sum += r_of[j] - unit_r == u ? z[j] : 0.0f;
            sum = quad_sum(sum);
            if (place.lane % 4 == 0) products[(place.warp % 4 * Shape::kRows + row) * kUnitBlocks + u] = sum;
          }
        }
      }
      __syncthreads();
      const int units = column_tiles * 4, unit = column_tile * 4;
      for (int task = place.warp; task < 4 * met_c; task += kThreads / 32) {
        const int w = task / met_c, c = task % met_c;
        const int begin = max((first_c + c) * d.kc - first_row, 0);
        const int end = min(min((first_c + c + 1) * d.kc - first_row, rows - first_row), Shape::kRows);
        const int u_first = first_column + w * kWarpColumns;
        if (u_first >= columns) continue;
        const int r0 = u_first / d.kr, r1 = min(u_first + kWarpColumns - 1, columns - 1) / d.kr;
        for (int r = r0; r <= r1; ++r) {
          float sum = 0.0f;
          for (int row = begin + place.lane; row < end; row += 32)
            sum += products[(w * Shape::kRows + row) * kUnitBlocks + r - r0];
          for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
          if (place.lane == 0)
            d.parts[(int64_t{segment} * (row_tiles + d.c) + row_tile + first_c + c) * (units + d.r) + unit + w + r] =
                sum;
        }
      }
    }
    clear<T>(part);
  }

  if (!d.out) return;
  auto* out = static_cast<T*>(d.out);
#pragma unroll
  for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = first_row + place.row(f, half);
      if (n >= rows) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int k = first_column + place.column(j / 2, j % 2);
        if (k >= columns) continue;
        const float sum = acc[f][j / 2][half * 2 + j % 2];
        if (d.splits > 1) {
          d.partial[(int64_t{split} * rows + n) * columns + k] = sum;
        } else {
          out[int64_t{n} * columns + k] = from_float<T>(sum);
        }
      }
    }
  }
}

// dgate from what the tiles that a block lies in have of it, in order.
__global__ void __launch_bounds__(kThreads)
    gate_sum_kernel(const WeightGradient d, int tile_rows, int row_tiles, int unit, int units, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int r = static_cast<int>(i / d.c % d.r), c = static_cast<int>(i % d.c);
  const int64_t gate = i / d.c / d.r;
  float sum = 0.0f;
  for (int chunk = 0; chunk < d.chunks; ++chunk) {
    const float* parts = d.parts + (gate * d.chunks + chunk) * (row_tiles + d.c) * (units + d.r);
    for (int t = c * d.kc / tile_rows; t <= (c * d.kc + d.kc - 1) / tile_rows; ++t)
      for (int u = r * d.kr / unit; u <= (r * d.kr + d.kr - 1) / unit; ++u)
        sum += parts[int64_t{t + c} * (units + d.r) + u + r];
  }
  d.dgate[i] = sum;
}

template <class T>
int start_weight(const WeightGradient& d, void* stream) {
  using Shape = Tile<T>;
  const int rows = d.c * d.kc, columns = d.r * d.kr;
  const int row_tiles = (rows + Shape::kRows - 1) / Shape::kRows, column_tiles = (columns + kColumns - 1) / kColumns;
  auto bytes = [&](int stages) {
    return stages * Shape::kDepth * (Shape::kRowsPitch + Shape::kColumnsPitch) +
           4 * (stages * kMostBlocks * kTablePitch + 4 * Shape::kRows * (kWarpColumns / 8 + 1));
  };
  const int stages = bytes(kMostStages) <= mmk_shared_memory() ? kMostStages : 2;
  const int64_t blocks = int64_t{row_tiles} * column_tiles * d.splits;
  if (blocks > INT_MAX) return 1;
  constexpr Dtype dtype = sizeof(T) == 4 ? Dtype::fp32 : std::is_same_v<T, bf16> ? Dtype::bf16 : Dtype::fp16;
  const bool hopper = mmk_hypergrid_takes_hopper_weight(dtype, &d);
  int code = hopper ? mmk_hypergrid_hopper_weight(dtype, &d, stream)
                    : launch(weight_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes(stages),
                             stream, d, stages, alignment<T>(d.dy, d.dy_row, 8), alignment<T>(d.left, d.left_row, 8));
  if (code == 0 && d.out && d.splits > 1) code = finish<T>({}, d.partial, d.out, d.splits, rows, columns, stream);
  if (code || !d.parts) return code;
  const int64_t count = d.gates.count * d.r * d.c;
  const int tile = hopper ? kHopperRows : int{Shape::kRows}, unit = hopper ? kHopperUnit : kUnit;
  return launch(gate_sum_kernel, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0,
                stream, d, tile, hopper ? (rows + 2 * tile - 1) / (2 * tile) * 2 : row_tiles, unit,
                hopper ? (columns + unit - 1) / unit : column_tiles * 4, count);
}

__global__ void __launch_bounds__(kThreads)
    begins_kernel(const int64_t* sorted, int64_t count, int64_t gates, int64_t rows, int64_t* begins) {
  const int64_t g = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (g > gates) return;
  int64_t low = g;
  if (sorted) {
    low = 0;
    for (int64_t high = count; low < high;) {
      const int64_t middle = (low + high) / 2;
      if (sorted[middle] < g) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
  }
  begins[g] = low * rows;
}

// --- The gate ---

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <class T>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GateFactors d) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= d.gates * d.r * d.c) return;
  const int64_t g = i / d.c / d.r;
  const float u = to_float(static_cast<const T*>(d.row)[g * d.row_strides[0] + i / d.c % d.r * d.row_strides[1]]);
  const float v = to_float(static_cast<const T*>(d.column)[g * d.column_strides[0] + i % d.c * d.column_strides[1]]);
  static_cast<T*>(d.out)[i] = from_float<T>(sigmoid(u * v));
}

// A warp for an element of drow, or of dcolumn: dgate s (1 - s) times the other factor, summed over the other side and,
// where the factor is shared, over the gates.
template <class T>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(const GateFactors d, int64_t rows, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (i >= count) return;
  const bool is_row = i < rows;
  const int size = is_row ? d.r : d.c, width = is_row ? d.c : d.r;
  const int64_t at = is_row ? i : i - rows;
  const bool is_shared = is_row ? d.row_shared : d.column_shared;
  const int64_t first = is_shared ? 0 : at / size, gates = is_shared ? d.gates : 1, own = at % size;
  const auto *ours = static_cast<const T*>(is_row ? d.row : d.column),
             *other = static_cast<const T*>(is_row ? d.column : d.row);
  const int64_t our_gate = is_row ? d.row_strides[0] : d.column_strides[0],
                other_gate = is_row ? d.column_strides[0] : d.row_strides[0],
                our_block = is_row ? d.row_strides[1] : d.column_strides[1],
                other_block = is_row ? d.column_strides[1] : d.row_strides[1],
                our_incoming = is_row ? d.dgate_strides[1] : d.dgate_strides[2],
                other_incoming = is_row ? d.dgate_strides[2] : d.dgate_strides[1];
  float sum = 0.0f;
  for (int64_t g = first; g < first + gates; ++g) {
    const float u = to_float(ours[g * our_gate + own * our_block]);
    const T* incoming = static_cast<const T*>(d.dgate) + g * d.dgate_strides[0] + own * our_incoming;
    for (int j = lane; j < width; j += 32) {
      const float v = to_float(other[g * other_gate + j * other_block]);
      sum += to_float(incoming[j * other_incoming]) * (sigmoid(u * v) * sigmoid(-u * v)) * v;
    }
  }
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (lane == 0) (is_row ? d.drow : d.dcolumn)[at] = sum;
}

template <class T>
int start_gate(const GateFactors& d, bool backward, void* stream) {
  if (!backward) {
    const int64_t count = d.gates * d.r * d.c;
    return launch(gate_kernel<T>, dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)), dim3(kThreads), 0,
                  stream, d);
  }
  const int64_t rows = (d.row_shared ? 1 : d.gates) * d.r, count = rows + (d.column_shared ? 1 : d.gates) * d.c;
  return launch(gate_backward_kernel<T>, dim3(static_cast<unsigned>((count + kThreads / 32 - 1) / (kThreads / 32))),
                dim3(kThreads), 0, stream, d, rows, count);
}

}  // namespace
}  // namespace mmk::hypergrid

int mmk_hypergrid_product(mmk::Dtype dtype, const mmk::hypergrid::Product* product, void* stream) {
  if (mmk_hypergrid_takes_hopper(dtype, product)) return mmk_hypergrid_hopper(dtype, product, stream);
  return mmk::with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    return product->transposed ? mmk::hypergrid::start_product<T, true>(*product, stream)
                               : mmk::hypergrid::start_product<T, false>(*product, stream);
  });
}

int mmk_hypergrid_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight, void* stream) {
  return mmk::with_dtype(dtype,
                         [&](auto zero) { return mmk::hypergrid::start_weight<decltype(zero)>(*weight, stream); });
}

int mmk_hypergrid_activate(mmk::Dtype dtype, const mmk::hypergrid::Epilogue* what, int64_t rows, int64_t columns,
                           void* out, void* stream) {
  return mmk::with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t count = rows * columns, own = mmk::hypergrid::kThreads * 4;
    return mmk::launch(mmk::hypergrid::activate_kernel<T>, dim3(static_cast<unsigned>((count + own - 1) / own)),
                       dim3(mmk::hypergrid::kThreads), 0, stream, *what, static_cast<T*>(out), count, columns);
  });
}

int mmk_hypergrid_begins(const int64_t* sorted, int64_t count, int64_t gates, int64_t rows, int64_t* begins,
                         void* stream) {
  constexpr int threads = mmk::hypergrid::kThreads;
  return mmk::launch(mmk::hypergrid::begins_kernel, dim3(static_cast<unsigned>((gates + threads) / threads)),
                     dim3(threads), 0, stream, sorted, count, gates, rows, begins);
}

int mmk_hypergrid_gate(mmk::Dtype dtype, const mmk::hypergrid::GateFactors* gate, bool backward, void* stream) {
  return mmk::with_dtype(
      dtype, [&](auto zero) { return mmk::hypergrid::start_gate<decltype(zero)>(*gate, backward, stream); });
}
