// Products of few rows with many rows, both as they lie: the other product that narrow attention needs beside gemm.h.
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace mmk::MMK_ISA {

// C(i, j) = A(i, :) . B(j, :) for few rows of A and many of B, all with zeros from `depth` to the next multiple of
// kWidth. Lanes are the depth: up to kWidth sums at a time, kRows x kColumns, which one tree of additions turns into
// one vector. Rows of C are written up to kWidth floats beyond the last column.
template <int kRows>
static void dots_of(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t columns, float* c,
                    int64_t c_row, int64_t depth) {
  constexpr int kColumns = kWidth / kRows, kStored = kColumns > 8 ? 16 : kColumns > 4 ? 8 : kColumns > 2 ? 4 : kColumns;
  // Short rows apart from each other are not what processors fetch ahead by themselves.
  const int64_t ahead = depth <= 128 ? 16 * b_row : 0;
  for (int64_t j = 0; j < columns; j += kColumns) {
    const float* from[kColumns];
    for (int l = 0; l < kColumns; ++l) from[l] = b + (j + l < columns ? j + l : columns - 1) * b_row;
    Vec acc[kWidth];
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) acc[l] = Vec{};
    for (int64_t p = 0; p < depth; p += kWidth) {
      Vec rows[kRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) rows[i] = load(a + i * a_row + p);
#pragma GCC unroll 16
      for (int l = 0; l < kColumns; ++l) {
        const Vec column = load(from[l] + p);
        __builtin_prefetch(from[l] + p + ahead);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) acc[i * kColumns + l] += rows[i] * column;
      }
    }
    const Vec result = sums(acc);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {  // out of registers: reading parts of what was just stored would wait
      IntVec lanes;
      for (int l = 0; l < kWidth; ++l) lanes[l] = (i * kColumns + l) % kWidth;
      const Vec row = shuffle(result, result, lanes);
      std::memcpy(c + i * c_row + j, &row, kStored * sizeof(float));
    }
  }
}

constexpr int kDotRows = kWidth < 16 ? kWidth / 2 : 8;  // most at a time: more would leave a tree few columns

template <int kRows = kDotRows>
static void dots_of(int64_t rows, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t columns,
                    float* c, int64_t c_row, int64_t depth) {
  if (rows == kRows)
    dots_of<kRows>(a, a_row, b, b_row, columns, c, c_row, depth);
  else if constexpr (kRows > 1)
    dots_of<kRows - 1>(rows, a, a_row, b, b_row, columns, c, c_row, depth);
}

static void dots(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_row, int64_t columns, float* c,
                 int64_t c_row, int64_t depth) {
  const int64_t block = rows <= kDotRows ? columns : 2 * kWidth;  // of B's rows: in cache until all of A's met them
  for (int64_t j = 0; j < columns; j += block)
    for (int64_t i = 0, step; i < rows; i += step) {
      step = std::min<int64_t>(rows - i, kDotRows);
      dots_of(step, a + i * a_row, a_row, b + j * b_row, b_row, std::min(block, columns - j), c + i * c_row + j, c_row,
              depth);
    }
}

}  // namespace mmk::MMK_ISA
