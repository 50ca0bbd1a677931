// Tiles in shared memory and what warps do with them: loads with zero fill for ragged edges, and the two products of
// attention, rows x rows^T (both operands from shared memory) and weights x values (weights from registers).
//
// A tile is cut into chunks of 128 bytes a row (64 elements of 16 bits, 32 of fp32) so that any head dim is a loop over
// chunks. Rows are 144 bytes apart: an odd multiple of 16, hence the eight rows of an ldmatrix, and the rows 2t of the
// fp32 reads below, fall into different banks. One k-step of an mma is 32 bytes of a row in every type, so the
// addresses are the same for all of them.
//
// fp32 is multiplied in tf32 by halves: x y = big big + (big small + small big). Tensor cores truncate their sums to
// fp32, so every k-step starts from zero, the small products apart from the large ones, and is added with rounding; an
// accumulator that lives over a long row would collect many times the error of fp32 arithmetic.
#pragma once
#include "common/ptx.cuh"

namespace mmk {

constexpr int kChunkBytes = 128;
constexpr int kRowBytes = kChunkBytes + 16;
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));  // elements of a row in a chunk
template <class T>
constexpr int kStep = 32 / static_cast<int>(sizeof(T));  // elements of a row in a k-step

// Rows of a matrix in global memory. Rows from `rows` on, columns from `columns` on and rows that `visible` hides read
// as 0.
struct Rows {
  const char* data;
  int64_t stride;  // between rows, in bytes
  int rows, columns;
  const uint8_t* visible;  // one flag a row, or null
  int64_t visible_stride;
  int copy_bytes;  // 16, 8 or 4: data and stride are multiples of it; 2: only elements are aligned
};

template <class T, int Bytes>
__device__ __forceinline__ void copy_chunk(unsigned char* tile, const Rows& m, int first_row, int count,
                                           int first_column) {
  constexpr int kPieces = kChunkBytes / Bytes, kElements = Bytes / static_cast<int>(sizeof(T));
#pragma unroll 1
#pragma unroll 1
  for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
    const int row = first_row + i / kPieces, piece = i % kPieces, column = first_column + piece * kElements;
    int valid = min(max(m.columns - column, 0), kElements) * static_cast<int>(sizeof(T));
    if (row >= m.rows || (m.visible && !m.visible[row * m.visible_stride])) valid = 0;
    const char* source = m.data + (valid ? row * m.stride + column * static_cast<int>(sizeof(T)) : 0);
    ptx::cp_async<Bytes>(tile + i / kPieces * kRowBytes + piece * Bytes, source, valid);
  }
}

// Rows that start at odd elements of 16 bits: cp.async cannot copy them, so two loads make a word.
__device__ __forceinline__ void copy_chunk_by_element(unsigned char* tile, const Rows& m, int first_row, int count,
                                                      int first_column) {
  constexpr int kPieces = kChunkBytes / 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < count * kPieces; i += blockDim.x) {
    const int row = first_row + i / kPieces, piece = i % kPieces, column = first_column + piece * 2;
    const bool inside = row < m.rows && !(m.visible && !m.visible[row * m.visible_stride]);
    const auto* source = reinterpret_cast<const uint16_t*>(m.data + (inside ? row * m.stride : 0)) + column;
    const uint32_t low = inside && column < m.columns ? __ldg(source) : 0;
    const uint32_t high = inside && column + 1 < m.columns ? __ldg(source + 1) : 0;
    *reinterpret_cast<uint32_t*>(tile + i / kPieces * kRowBytes + piece * 4) = low | high << 16;
  }
}

// All threads of the block copy `count` rows of one chunk. The copies belong to the caller's next cp_async_commit().
template <class T>
__device__ __forceinline__ void load_chunk(unsigned char* tile, const Rows& m, int first_row, int count,
                                           int first_column) {
  if (m.copy_bytes == 16) {
    copy_chunk<T, 16>(tile, m, first_row, count, first_column);
  } else if (m.copy_bytes == 8) {
    copy_chunk<T, 8>(tile, m, first_row, count, first_column);
  } else if (sizeof(T) == 4 || m.copy_bytes == 4) {
    copy_chunk<T, 4>(tile, m, first_row, count, first_column);
  } else {
    copy_chunk_by_element(tile, m, first_row, count, first_column);
  }
}

// --- Operands of an mma ---

template <class T>
struct Operand {
  uint32_t r[4];
};
template <>
struct Operand<float> {
  uint32_t big[4], small[4];
};

struct Halves {
  uint32_t big, small;
};

__device__ __forceinline__ Halves halves(float x) {
  const uint32_t big = ptx::to_tf32(x);
  return {big, ptx::to_tf32(x - __uint_as_float(big))};
}

__device__ __forceinline__ void set_operand(Operand<float>& a, int i, float x) {
  const Halves h = halves(x);
  a.big[i] = h.big;
  a.small[i] = h.small;
}

// The left operand: 16 rows of shared memory, `row_bytes` apart, 32 bytes of each.
template <class T>
__device__ __forceinline__ Operand<T> load_left(const void* rows, int row_bytes = kRowBytes) {
  const int lane = threadIdx.x % 32;
  uint32_t r[4];
  ptx::ldmatrix_x4(r, static_cast<const unsigned char*>(rows) + lane % 16 * row_bytes + lane / 16 * 16);
  Operand<T> a;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      set_operand(a, i, __uint_as_float(r[i]));
    } else {
      a.r[i] = r[i];
    }
  }
  return a;
}

// WithSmall: fp32 operands with the product of their small halves as well, for sums so short that it shows.
template <class T, bool WithSmall = false>
__device__ __forceinline__ void multiply(float (&d)[4], const Operand<T>& a, uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(T) == 4) {
    const Halves x = halves(__uint_as_float(b0)), y = halves(__uint_as_float(b1));
    float rest[4] = {}, part[4] = {};
    if constexpr (WithSmall) ptx::mma_16x8x8_tf32(rest, a.small, x.small, y.small);
    ptx::mma_16x8x8_tf32(rest, a.small, x.big, y.big);
    ptx::mma_16x8x8_tf32(rest, a.big, x.small, y.small);
    ptx::mma_16x8x8_tf32(part, a.big, x.big, y.big);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += part[i] + rest[i];
  } else {
    ptx::mma_16x8x16<T>(d, a.r, b0, b1);
  }
}

// d (16 x Columns) += rows (16 x chunk) columns (Columns x chunk)^T over the first `steps` k-steps of a chunk.
template <class T, int Columns>
__device__ __forceinline__ void multiply_rows(float (&d)[Columns / 8][4], const unsigned char* rows,
                                              const unsigned char* columns, int steps) {
  const int lane = threadIdx.x % 32;
  columns += (lane / 16 * 8 + lane % 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < kChunkBytes / 32; ++k) {
    if (k < steps) {
      const Operand<T> a = load_left<T>(rows + k * 32);
#pragma unroll
      for (int j = 0; j < Columns / 8; j += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, columns + j * 8 * kRowBytes + k * 32);
        multiply(d[j], a, b[0], b[1]);
        multiply(d[j + 1], a, b[2], b[3]);
      }
    }
  }
}

// A k-step of 16 columns of the right operand, two registers for each 8. By rows: its columns are rows of shared
// memory, `pitch` apart, with the contraction along them; else the other way round.
template <class T, bool ByRows>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], const unsigned char* tile, int pitch, int column,
                                           int step) {
  const int lane = threadIdx.x % 32;
  if constexpr (ByRows) {
    ptx::ldmatrix_x4(b, tile + (column + lane / 16 * 8 + lane % 8) * pitch + step * 32 + lane / 8 % 2 * 16);
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(b, tile + (step * 16 + lane % 16) * pitch + (column + lane / 16 * 8) * 2);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      b[i] = *reinterpret_cast<const uint32_t*>(tile + (step * 8 + lane % 4 + i % 2 * 4) * pitch +
                                                (column + lane / 4 + i / 2 * 8) * 4);
  }
}

// A k-step of 16 columns of shared memory, which are the rows of the left operand, with the contraction along its rows.
template <class T>
__device__ __forceinline__ Operand<T> load_left_turned(const unsigned char* tile, int pitch, int row, int step) {
  const int lane = threadIdx.x % 32;
  Operand<T> a;
  if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4_trans(a.r, tile + (step * 16 + lane / 16 * 8 + lane % 8) * pitch + (row + lane / 8 % 2 * 8) * 2);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      set_operand(a, i,
                  *reinterpret_cast<const float*>(tile + (step * 8 + lane % 4 + i / 2 * 4) * pitch +
                                                  (row + lane / 4 + i % 2 * 8) * 4));
  }
  return a;
}

// Weights (16 x Columns) in the registers of a left operand, made from an accumulator.
template <class T, int Columns>
struct Weights {
  uint32_t r[Columns / 16][4];

  __device__ __forceinline__ void set(const float (&p)[Columns / 8][4]) {
#pragma unroll
    for (int k = 0; k < Columns / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[k][i] = pack<T>(p[2 * k + i / 2][i % 2 * 2], p[2 * k + i / 2][i % 2 * 2 + 1]);
    }
  }
};

// fp32: keys 2t and 2t + 1, which an accumulator holds, stand at k = t and t + 4 of the operand. The order of a sum is
// free as long as both operands have the same.
template <int Columns>
struct Weights<float, Columns> {
  float r[Columns / 8][4];

  __device__ __forceinline__ void set(const float (&p)[Columns / 8][4]) {
#pragma unroll
    for (int k = 0; k < Columns / 8; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[k][i] = p[k][i % 2 * 2 + i / 2];
    }
  }
};

// d[first ... ] (16 x chunk) += weights (16 x Columns) values (Columns x chunk); blocks of 8 columns from `blocks` on
// are left out. `first` is known when this is unrolled.
template <class T, int Columns, int Blocks>
__device__ __forceinline__ void multiply_values(float (&d)[Blocks][4], const Weights<T, Columns>& weights,
                                                const unsigned char* values, int first, int blocks) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 4) {
    values += lane % 4 * 2 * kRowBytes + lane / 4 * 4;
#pragma unroll
    for (int k = 0; k < Columns / 8; ++k) {
      Operand<float> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) set_operand(a, i, weights.r[k][i]);
#pragma unroll
      for (int j = 0; j < kChunk<T> / 8; ++j) {
        if (first + j < Blocks && first + j < blocks) {
          const unsigned char* b = values + k * 8 * kRowBytes + j * 32;
          multiply(d[first + j], a, *reinterpret_cast<const uint32_t*>(b),
                   *reinterpret_cast<const uint32_t*>(b + kRowBytes));
        }
      }
    }
  } else {
    values += lane % 16 * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < Columns / 16; ++k) {
      Operand<T> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[i] = weights.r[k][i];
#pragma unroll
      for (int j = 0; j < kChunk<T> / 8; j += 2) {
        if (first + j < Blocks && first + j < blocks) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, values + k * 16 * kRowBytes + j * 16);
          multiply(d[first + j], a, b[0], b[1]);
          if (first + j + 1 < Blocks && first + j + 1 < blocks) multiply(d[first + j + 1], a, b[2], b[3]);
        }
      }
    }
  }
}

// --- Online softmax of a 16 x Columns accumulator ---

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Of the two rows that a lane has a part of.
struct OnlineSoftmax {
  float top[2] = {-INFINITY, -INFINITY};  // the highest score
  float sum[2] = {0.0f, 0.0f};            // of this lane's columns only

  // Turns scores into exp(score - top) and returns in `rescale` what earlier results are multiplied by. A row that has
  // seen no key yet keeps the top -inf and is measured against 0, so nothing becomes inf - inf.
  template <int Blocks>
  __device__ __forceinline__ void update(float (&s)[Blocks][4], float (&rescale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < Blocks; ++j) highest = fmaxf(highest, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      highest = fmaxf(top[r], quad_max(highest));
      const float reference = highest == -INFINITY ? 0.0f : highest;
      rescale[r] = ptx::exp2((top[r] - reference) * kLog2e);
      float part = 0.0f;
#pragma unroll
      for (int j = 0; j < Blocks; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) part += s[j][i] = ptx::exp2((s[j][i] - reference) * kLog2e);
      }
      sum[r] = sum[r] * rescale[r] + part;
      top[r] = highest;
    }
  }
};

}  // namespace mmk
