// C = A B in float32 for operands of any layout and dtype, packed block by block: what a library's GEMM does, with the
// packing in the caller's hands, who may scale or gather on the way.
#pragma once
#include <algorithm>

#include "common/gemm.h"
#include "common/tiles.h"

namespace mmk::MMK_ISA {

// A tile of A (kTileRows x depth, a multiple of kWidth) and a panel of B (depth x kPanel) lie dense. A block of A and
// one panel fit the second cache level.
constexpr int64_t kBlockDepth = 768, kBlockRows = 96;
static_assert(kBlockRows % kTileRows == 0 && kBlockDepth % kStretch == 0 && kStretch % kWidth == 0);

// What to cut `whole` into: multiples of kWidth up to `most`, the last one not much shorter.
inline int64_t even_length(int64_t whole, int64_t most) {
  return round_up(ceil_div(whole, std::max<int64_t>(ceil_div(whole, most), 1)), kWidth) + (whole == 0);
}

// Floats of scratch memory for a product with so many columns.
inline int64_t matmul_space(int64_t columns) {
  return kBlockDepth * (round_up(columns, kPanel) + kBlockRows) + kWidth + kTileRows * kPanel;
}

// C (rows x columns, row-major with c_row floats between rows) = A B + bias.
//
//   pack_a(to, i, rows, p, depth)     A(i + r, p + q) in kOrder: kByColumns with stride kTileRows, or kByChunks with
//                                     stride kTileRows * kWidth; may write kWidth floats beyond the tile
//   pack_b(to, p, depth, j, columns)  to[q * kPanel + l] = B(p + q, j + l), zeros up to the next multiple of kWidth
//
// Every element of C is summed in an order that depends on `depth` alone.
template <Order kOrder, class PackA, class PackB>
void matmul(int64_t rows, int64_t columns, int64_t depth, const PackA& pack_a, const PackB& pack_b, float* c,
            int64_t c_row, const float* bias, float* space) {
  float* const panels = space;
  float* const tiles = panels + kBlockDepth * round_up(columns, kPanel);
  float* const edge = tiles + kBlockDepth * kBlockRows + kWidth;
  constexpr int64_t kAStride = kOrder == Order::kByColumns ? kTileRows : kTileRows * kWidth;
  const int64_t chunk_length = even_length(depth, kBlockDepth);
  for (int64_t p = 0; p == 0 || p < depth; p += chunk_length) {
    const int64_t length = std::min(chunk_length, depth - p), tile_length = round_up(length, kWidth);
    const int64_t stretch = even_length(length, kStretch);
    const bool last = p + length == depth;
    for (int64_t j = 0; j < columns; j += kPanel)
      pack_b(panels + j * length, p, length, j, std::min<int64_t>(kPanel, columns - j));
    for (int64_t block = 0; block < rows; block += kBlockRows) {
      const int64_t end = std::min(block + kBlockRows, rows);
      for (int64_t i = block; i < end; i += kTileRows)
        pack_a(tiles + (i - block) * tile_length, i, std::min<int64_t>(kTileRows, end - i), p, length);
      for (int64_t j = 0; j < columns; j += kPanel) {
        const int64_t width = std::min<int64_t>(kPanel, columns - j);
        const bool whole = width % kWidth == 0;
        for (int64_t i = block; i < end; i += kTileRows) {
          const int64_t height = std::min<int64_t>(kTileRows, end - i);
          float* const home = c + i * c_row + j;
          float* const to = whole ? home : edge;
          const int64_t to_row = whole ? c_row : kPanel;
          if (!whole && p > 0) load_tile(edge, kPanel, home, c_row, 1, height, width, 1.0f);
          const float* const a = tiles + (i - block) * tile_length;
          const float* const b = panels + j * length;
          const auto kernel = width > kWidth ? micro_kernel_of<2, kOrder> : micro_kernel_of<1, kOrder>;
          for (int64_t q = 0; q < length; q += stretch)
            kernel(height, a + q * kTileRows, kAStride, b + q * kPanel, kPanel, to, to_row,
                   std::min(stretch, length - q), p > 0 || q > 0);
          if (length == 0)
            for (int64_t r = 0; r < height; ++r) std::fill_n(to + r * to_row, width, 0.0f);
          if (last && bias != nullptr)
            for (int64_t r = 0; r < height; ++r)
              for (int64_t l = 0; l < width; ++l) to[r * to_row + l] += bias[j + l];
          if (!whole) store_tile(home, c_row, 1, edge, kPanel, height, width);
        }
      }
    }
  }
}

}  // namespace mmk::MMK_ISA
