// C (+)= A B in float32, register-tiled. Columns are vector lanes: B and C are cut into panels of kPanel columns.
//
//   A(i, p)  at  a + i * a_stride + p                                           (ByRows)
//                a + i + p * a_stride                                           (ByColumns)
//                a + p / kWidth * a_stride + i * kWidth + p % kWidth            (ByChunks)
//   B(p, j)  at  b + (j / kPanel) * b_panel + p * b_row + j % kPanel
//   C(i, j)  at  c + (j / kPanel) * c_panel + i * c_row + j % kPanel
//
// A panel stride of kPanel is a row-major matrix; a larger one keeps the panels apart, each dense. Columns are computed
// up to the next multiple of kWidth, so B must be readable and C writable there.
//
// Long sums are cut into stretches that are added up: the rounding error grows with the root of a stretch, and a
// stretch of a panel of B stays in the first cache level.
#pragma once
#include <algorithm>

#include "common/simd.h"

namespace mmk::MMK_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kTileRows = 6;  // of 16
#else
constexpr int kTileRows = 4;
#endif
constexpr int kPanel = 2 * kWidth;
constexpr int64_t kStretch = 192;

struct Gemm {
  const float* a;
  int64_t a_stride;  // of rows, or of columns when transposed
  const float* b;
  int64_t b_row, b_panel;
  float* c;
  int64_t c_row, c_panel;
};

enum class Order { kByRows, kByColumns, kByChunks };  // of A's elements

// What becomes of a tile's sums: C, or something to add to it.
struct Add {
  float* c;
  int64_t c_row;
  bool accumulate;

  template <int kRows, int kVecs>
  __attribute__((always_inline)) inline void operator()(const Vec (&acc)[kRows][kVecs]) const {
    float* __restrict to = c;
    const auto put = [&](auto sum) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i, to += c_row)
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) store(to + v * kWidth, sum(to + v * kWidth, acc[i][v]));
    };
    if (accumulate)
      put([](const float* before, Vec sum) { return load(before) + sum; });
    else
      put([](const float*, Vec sum) { return sum; });
  }
};

template <int kRows, int kVecs, Order kOrder, class Finish>
static void micro_kernel(const float* __restrict a, int64_t a_stride, const float* __restrict b, int64_t b_row,
                         int64_t depth, const Finish& finish) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec{};
  const auto multiply = [&](const auto& element) __attribute__((always_inline)) {
    Vec columns[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Vec scalar = splat(element(i));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] += scalar * columns[v];
    }
    b += b_row;
  };
  const auto prefetch = [&]() __attribute__((always_inline)) {  // the first tile finds B in the second cache level
    for (int j = 0; j < kVecs * kWidth; j += 16) __builtin_prefetch(b + 8 * b_row + j);
  };
  if constexpr (kOrder == Order::kByRows) {
    // A pointer for three rows: one for all of them would need as many multiples of the stride, more than there are
    // registers. The compiler, who would see that they are of one array, is kept from knowing it.
    constexpr int kGroups = (kRows + 2) / 3;
    const float* rows[kGroups];
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      rows[g] = a + 3 * g * a_stride;
      asm("" : "+r"(rows[g]));
    }
    for (int64_t p = 0; p < depth; ++p) {
      prefetch();
      multiply([&](int i) __attribute__((always_inline)) { return rows[i / 3][i % 3 * a_stride]; });
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; ++g) ++rows[g];
    }
  } else if constexpr (kOrder == Order::kByColumns) {
    for (int64_t p = 0; p < depth; ++p, a += a_stride)
      multiply([&](int i) __attribute__((always_inline)) { return a[i]; });
  } else {
    // One loop without branches: the end of an inner one, every kWidth steps, would be mispredicted.
    for (int64_t p = 1; p <= depth; ++p) {
      prefetch();
      multiply([&](int i) __attribute__((always_inline)) { return a[i * kWidth]; });
      a += p % kWidth == 0 ? a_stride - kWidth + 1 : 1;
    }
  }
  finish(acc);
}

template <int kVecs, Order kOrder, class Finish, int kRows = kTileRows>
static void micro_kernel_of(int64_t rows, const float* a, int64_t a_stride, const float* b, int64_t b_row,
                            int64_t depth, const Finish& finish) {
  if (rows == kRows)
    micro_kernel<kRows, kVecs, kOrder>(a, a_stride, b, b_row, depth, finish);
  else if constexpr (kRows > 1)
    micro_kernel_of<kVecs, kOrder, Finish, kRows - 1>(rows, a, a_stride, b, b_row, depth, finish);
}

// `most`: the longest stretch.
template <bool kTransposed>  // A by its columns
static void gemm(const Gemm& g, int64_t rows, int64_t columns, int64_t depth, bool accumulate,
                 int64_t most = kStretch) {
  // Tiles of almost equal height, stretches of almost equal length: a last one of one row would be slow.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, stretches = (depth + most - 1) / most;
  int64_t j = 0;
  if constexpr (!kTransposed)
    // One row has registers for many columns. Of a wide matrix a panel alone would be a line of cache in every page.
    for (constexpr int kVecs = 8;
         rows == 1 && g.b_panel == kPanel && g.c_panel == kPanel && j + kVecs * kWidth <= columns; j += kVecs * kWidth)
      for (int64_t stretch = 0; stretch < stretches; ++stretch) {
        const int64_t p = stretch * depth / stretches, length = (stretch + 1) * depth / stretches - p;
        micro_kernel<1, kVecs, Order::kByRows>(g.a + p, g.a_stride, g.b + j + p * g.b_row, g.b_row, length,
                                               Add{g.c + j, g.c_row, accumulate || stretch > 0});
      }
  for (; j < columns; j += kPanel) {
    const bool wide = columns - j > kWidth;
    for (int64_t stretch = 0; stretch < stretches; ++stretch) {
      const int64_t p = stretch * depth / stretches, length = (stretch + 1) * depth / stretches - p;
      const float* b = g.b + j / kPanel * g.b_panel + p * g.b_row;
      for (int64_t tile = 0, i = 0, next; tile < tiles; ++tile, i = next) {
        next = (tile + 1) * rows / tiles;
        const float* a = g.a + (kTransposed ? p * g.a_stride + i : i * g.a_stride + p);
        float* c = g.c + j / kPanel * g.c_panel + i * g.c_row;
        constexpr Order kOrder = kTransposed ? Order::kByColumns : Order::kByRows;
        const auto kernel = wide ? micro_kernel_of<2, kOrder, Add> : micro_kernel_of<1, kOrder, Add>;
        kernel(next - i, a, g.a_stride, b, g.b_row, length, Add{c, g.c_row, accumulate || stretch > 0});
      }
    }
  }
}

}  // namespace mmk::MMK_ISA
