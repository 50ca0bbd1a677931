// A part of a matrix product, compiled once per instruction set.
#include "common/matmul.h"
#include "linear/linear.h"

namespace mmk::MMK_ISA {
namespace {

Extent extent_of(const Product& m) {  // one piece: only its last vector is padded
  return {m.rows, m.columns, m.depth, m.depth};
}

int64_t product_space(const Product& m) {
  return matmul_space({m.rows, m.columns, kWidth, kWidth}, m.packed != nullptr);
}

// 16-bit results are summed in float32 first.
int64_t space(const Product& m) {
  return product_space(m) + round_up(m.columns, kWidth) + (m.c.dtype == DType::kFloat32 ? 0 : m.rows * m.columns);
}

auto pack_b_of(const Product& m) {
  return [&](float* to, int64_t p, int64_t depth, int64_t j, int64_t columns) {
    load_tile(to, kPanel, m.b.at(0, 0, p, j), m.b.dtype, m.b.stride[2], m.b.stride[3], depth, columns);
  };
}

int64_t packed_space(const Product& m) { return m.depth * round_up(m.columns, kPanel); }

void pack(const Product& m, int64_t first, int64_t last, float* packed) {
  pack_panels(extent_of(m), pack_b_of(m), first, last, packed);
}

void multiply(const Product& m, float* space) {
  const bool wide = m.c.dtype == DType::kFloat32;
  const Extent extent = extent_of(m);
  float* const bias = space + product_space(m);
  float* const results = bias + round_up(m.columns, kWidth);
  if (m.bias.data != nullptr) load_tile(bias, m.columns, m.bias.data, m.bias.dtype, 0, m.bias.stride[3], 1, m.columns);
  const auto by_columns = [&](float* to, int64_t i, int64_t rows, int64_t p, int64_t depth) {
    const int64_t lanes = std::min<int64_t>(kWidth, m.rows - i);  // whole vectors: the next row overwrites the rest
    load_tile(to, kTileRows, m.a.at(0, 0, i, p), m.a.dtype, m.a.stride[3], m.a.stride[2], depth, lanes);
    if (m.a_sums == nullptr) return;
    if (p == 0) std::fill_n(m.a_sums + i, rows, 0.0f);
    for (int64_t q = 0; q < depth; q += 32) {  // short sums: their rounding errors grow with the root of the length
      float part[kTileRows] = {};
      for (int64_t s = q; s < std::min(q + 32, depth); ++s)
        for (int64_t r = 0; r < kTileRows; ++r) part[r] += to[s * kTileRows + r];
      for (int64_t r = 0; r < rows; ++r) m.a_sums[i + r] += part[r];
    }
  };
  const auto by_chunks = [&](float* to, int64_t i, int64_t rows, int64_t p, int64_t depth) {
    for (int64_t q = 0; q < depth; q += kWidth)
      load_tile(to + q * kTileRows, kWidth, m.a.at(0, 0, i, p + q), m.a.dtype, m.a.stride[2], m.a.stride[3], rows,
                std::min<int64_t>(kWidth, depth - q));
  };
  float* const c = wide ? reinterpret_cast<float*>(m.c.data) : results;
  const int64_t c_row = wide ? m.c.stride[2] : m.columns;
  const float* const added = m.bias.data == nullptr ? nullptr : bias;
  if (m.a.stride[3] == 1 && m.a_sums == nullptr)
    matmul<Order::kByChunks>(extent, by_chunks, pack_b_of(m), c, c_row, added, space, m.packed);
  else
    matmul<Order::kByColumns>(extent, by_columns, pack_b_of(m), c, c_row, added, space, m.packed);
  if (!wide) store_tile(m.c.data, m.c.dtype, m.c.stride[2], 1, c, c_row, m.rows, m.columns);
}

}  // namespace

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {space, multiply, packed_space, pack};

}  // namespace mmk::MMK_ISA
