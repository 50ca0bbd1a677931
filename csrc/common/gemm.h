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
  float* __restrict c;
  int64_t c_row;
  bool accumulate;

  template <int kRows, int kVecs>
  __attribute__((always_inline)) inline void operator()(const Vec (&acc)[kRows][kVecs]) const {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) {
        float* to = c + i * c_row + v * kWidth;
        store(to, accumulate ? load(to) + acc[i][v] : acc[i][v]);
      }
  }
};

template <int kRows, int kVecs, Order kOrder, class Finish>
static void micro_kernel(const float* __restrict a, int64_t a_stride, const float* __restrict b, int64_t b_row,
                         int64_t depth, const Finish& finish) {
  Vec acc[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec{};
  const int64_t stride = kOrder == Order::kByRows ? a_stride : kOrder == Order::kByColumns ? 1 : kWidth;
  for (int64_t p = 0; p < depth;) {
    const int64_t end = kOrder == Order::kByChunks ? std::min<int64_t>(p + kWidth, depth) : depth;
    const float* __restrict next = a + a_stride;
    for (; p < end; ++p) {
      if constexpr (kOrder != Order::kByColumns) {  // the first tile finds B in the second cache level
        for (int j = 0; j < kVecs * kWidth; j += 16) __builtin_prefetch(b + 8 * b_row + j);
      }
      Vec columns[kVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) columns[v] = load(b + v * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec scalar = splat(a[i * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) acc[i][v] += scalar * columns[v];
      }
      a += kOrder == Order::kByColumns ? a_stride : 1;
      b += b_row;
    }
    if constexpr (kOrder == Order::kByChunks) a = next;
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

template <bool kTransposed>  // A by its columns
static void gemm(const Gemm& g, int64_t rows, int64_t columns, int64_t depth, bool accumulate) {
  // Tiles of almost equal height, stretches of almost equal length: a last one of one row would be slow.
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, stretches = (depth + kStretch - 1) / kStretch;
  for (int64_t j = 0; j < columns; j += kPanel) {
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
