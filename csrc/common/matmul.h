// C = A B in float32 for operands of any layout and dtype, packed block by block: what a library's GEMM does, with the
// packing in the caller's hands, who may scale or gather on the way, and so the sums of every tile.
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

// C's size, and into what its sums are cut: no stretch that the micro kernel adds up crosses a multiple of `piece`,
// which divides `depth`.
struct Extent {
  int64_t rows, columns, depth, piece;
};

// Floats of scratch memory; `packed`: B comes packed.
inline int64_t matmul_space(const Extent& e, bool packed = false) {
  const int64_t padding = e.piece % kWidth == 0 ? 1 : 2;  // pieces of 8 and more are padded
  return kBlockDepth * ((packed ? 0 : round_up(e.columns, kPanel)) + padding * kBlockRows) + kWidth +
         kTileRows * kPanel;
}

// How many of the sums' terms, from p on, are packed together.
inline int64_t chunk_length(const Extent& e, int64_t p) {
  if (e.piece > kBlockDepth) return std::min({even_length(e.piece, kBlockDepth), e.depth - p, e.piece - p % e.piece});
  const int64_t piece = std::max<int64_t>(e.piece, 1), pieces = e.depth / piece;
  return std::min(piece * ceil_div(pieces, ceil_div(std::max<int64_t>(pieces, 1), kBlockDepth / piece)), e.depth - p);
}

// Columns `first` to `last`, whole panels, of all of B, for products of many parts of A's rows that share it: the
// panels of a chunk of the sums lie behind those of the one before it.
template <class PackB>
void pack_panels(const Extent& e, const PackB& pack_b, int64_t first, int64_t last, float* packed) {
  for (int64_t p = 0, length; p < e.depth; p += length) {
    length = chunk_length(e, p);
    for (int64_t j = first; j < last; j += kPanel)
      pack_b(packed + p * round_up(e.columns, kPanel) + j * length, p, length, j,
             std::min<int64_t>(kPanel, e.columns - j));
  }
}

// A tile of C, when a stretch of its sums is there.
struct Place {
  int64_t row, column, depth;  // where tile and stretch begin
  float* c;                    // columns up to the next multiple of kWidth may be read and written
  int64_t c_row;
  bool accumulate;  // or it is the first of the sums
};

// C (rows x columns, row-major with c_row floats between rows) = A B + bias, or C += A B with `accumulate`.
//
//   pack_a(to, i, rows, p, depth)     A(i + r, p + q) in kOrder: kByColumns with stride kTileRows, or kByChunks with
//                                     stride kTileRows * kWidth; may write kWidth floats beyond the tile
//   pack_b(to, p, depth, j, columns)  to[q * kPanel + l] = B(p + q, j + l), zeros up to the next multiple of kWidth
//   finish_of(place)                  what is called with the sums of a stretch
//
//   packed                            B, as pack_panels leaves it, or null
//
// Every element of C is summed in an order that depends on `depth` and `piece` alone. C may be null where finish does
// not touch it.
template <Order kOrder, class PackA, class PackB, class FinishOf>
void matmul(const Extent& e, const PackA& pack_a, const PackB& pack_b, const FinishOf& finish_of, float* c,
            int64_t c_row, const float* bias, bool accumulate, float* space, const float* packed = nullptr) {
  float* const own = space;
  float* const edge = own + (packed == nullptr ? kBlockDepth * round_up(e.columns, kPanel) : 0);
  float* const tiles = edge + kTileRows * kPanel;
  constexpr int64_t kAStride = kOrder == Order::kByColumns ? kTileRows : kTileRows * kWidth;
  for (int64_t p = 0, length; p == 0 || p < e.depth; p += std::max<int64_t>(length, 1)) {
    length = chunk_length(e, p);
    const int64_t part = std::min(length, e.piece);  // what of a piece is in the chunk
    const int64_t padded = kOrder == Order::kByChunks ? round_up(part, kWidth) : part;
    const int64_t tile_length = part == 0 ? 0 : length / part * padded, stretch = even_length(part, kStretch);
    const bool last = p + length == e.depth;
    const float* const panels = packed == nullptr ? own : packed + p * round_up(e.columns, kPanel);
    for (int64_t j = 0; j < e.columns && packed == nullptr; j += kPanel)
      pack_b(own + j * length, p, length, j, std::min<int64_t>(kPanel, e.columns - j));
    for (int64_t block = 0; block < e.rows; block += kBlockRows) {
      const int64_t end = std::min(block + kBlockRows, e.rows);
      for (int64_t i = block; i < end; i += kTileRows) {
        float* to = tiles + (i - block) * tile_length;
        for (int64_t s = 0; s == 0 || s < length; s += std::max<int64_t>(part, 1), to += padded * kTileRows)
          pack_a(to, i, std::min<int64_t>(kTileRows, end - i), p + s, part);
      }
      for (int64_t j = 0; j < e.columns; j += kPanel) {
        const int64_t width = std::min<int64_t>(kPanel, e.columns - j);
        const bool whole = width % kWidth == 0 || c == nullptr;
        // A stretch of the panel stays in the first cache level while all tiles of the block meet it.
        for (int64_t s = 0; s == 0 || s < length; s += std::max<int64_t>(part, 1))
          for (int64_t q = 0; q == 0 || q < part; q += std::max<int64_t>(stretch, 1)) {
            const bool first = p + s + q == 0, final = last && s + part == length && q + stretch >= part;
            for (int64_t i = block; i < end; i += kTileRows) {
              const int64_t height = std::min<int64_t>(kTileRows, end - i);
              float* const home = c == nullptr ? nullptr : c + i * c_row + j;
              float* const to = whole ? home : edge;
              const int64_t to_row = whole ? c_row : kPanel;
              if (!whole && (!first || accumulate)) load_tile(edge, kPanel, home, c_row, 1, height, width, 1.0f);
              if (length > 0) {
                const auto finish = finish_of(Place{i, j, p + s + q, to, to_row, accumulate || !first});
                using Finish = std::decay_t<decltype(finish)>;
                const auto kernel =
                    width > kWidth ? micro_kernel_of<2, kOrder, Finish> : micro_kernel_of<1, kOrder, Finish>;
                const float* const a = tiles + (i - block) * tile_length + (s / part * padded + q) * kTileRows;
                kernel(height, a, kAStride, panels + j * length + (s + q) * kPanel, kPanel, std::min(stretch, part - q),
                       finish);
              } else if (!accumulate) {
                for (int64_t r = 0; r < height; ++r) std::fill_n(to + r * to_row, width, 0.0f);
              }
              if (final && bias != nullptr)
                for (int64_t r = 0; r < height; ++r)
                  for (int64_t l = 0; l < width; ++l) to[r * to_row + l] += bias[j + l];
              if (!whole) store_tile(home, c_row, 1, edge, kPanel, height, width);
            }
          }
      }
    }
  }
}

// C = A B + bias.
template <Order kOrder, class PackA, class PackB>
void matmul(const Extent& e, const PackA& pack_a, const PackB& pack_b, float* c, int64_t c_row, const float* bias,
            float* space, const float* packed = nullptr) {
  const auto add = [](const Place& to) { return Add{to.c, to.c_row, to.accumulate}; };
  matmul<kOrder>(e, pack_a, pack_b, add, c, c_row, bias, false, space, packed);
}

}  // namespace mmk::MMK_ISA
