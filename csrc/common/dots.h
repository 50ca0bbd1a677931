// Products of few rows with many rows, both as they lie: the other product that narrow attention needs beside gemm.h.
#pragma once
#include "common/simd.h"

namespace mmk::MMK_ISA {

// C(i, j) = A(i, :) . B(j, :) for few rows of A and many of B, all with zeros from `depth` to the next multiple of
// kWidth. Lanes are the depth: kRows x kWidth / kRows sums at a time, which one tree of additions turns into one
// vector.
template <int kRows>
static void dots_of(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t columns, float* c,
                    int64_t c_row, int64_t depth) {
  constexpr int kColumns = kWidth / kRows;
  for (int64_t j = 0; j < columns; j += kColumns) {
    const float* from[kColumns];
    for (int l = 0; l < kColumns; ++l) from[l] = b + (j + l < columns ? j + l : columns - 1) * b_row;
    Vec acc[kWidth];
#pragma GCC unroll 16
    for (int l = 0; l < kWidth; ++l) acc[l] = Vec{};
    // Short rows apart from each other are not what processors fetch ahead by themselves.
    for (int l = 0; depth <= 128 && l < kColumns; ++l)
      for (int64_t p = 0; p < depth; p += 16) __builtin_prefetch(from[l] + 16 * b_row + p);
    for (int64_t p = 0; p < depth; p += kWidth) {
      Vec rows[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) rows[i] = load(a + i * a_row + p);
#pragma GCC unroll 16
      for (int l = 0; l < kColumns; ++l) {
        const Vec column = load(from[l] + p);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) acc[i * kColumns + l] += rows[i] * column;
      }
    }
    const Vec result = sums(acc);
    for (int i = 0; i < kRows; ++i)
      std::memcpy(c + i * c_row + j, reinterpret_cast<const float*>(&result) + i * kColumns, kColumns * sizeof(float));
  }
}

static void dots(const float* a, int64_t a_row, int64_t rows, const float* b, int64_t b_row, int64_t columns, float* c,
                 int64_t c_row, int64_t depth) {
  for (int64_t i = 0, step; i < rows; i += step) {
    step = rows - i >= 4 ? 4 : rows - i >= 2 ? 2 : 1;
    const auto kernel = step == 4 ? dots_of<4> : step == 2 ? dots_of<2> : dots_of<1>;
    kernel(a + i * a_row, a_row, b, b_row, columns, c + i * c_row, c_row, depth);
  }
}

}  // namespace mmk::MMK_ISA
