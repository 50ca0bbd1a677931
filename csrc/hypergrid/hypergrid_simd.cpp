// HyperGrid's products, compiled once per instruction set. A gate's factor reaches the product in one of three places:
// the sums of a piece, before they are added to C (any rows); the copy of B (rows with one gate); the copy of A (few
// rows).
#include "common/activation.h"
#include "common/dots.h"
#include "common/matmul.h"
#include "common/rows.h"
#include "hypergrid/hypergrid.h"

namespace mmk::MMK_ISA {
namespace {

MMK_INLINE Vec take(Vec v, IntVec from) { return shuffle(v, v, from); }

// --- a(x) ----------------------------------------------------------------------------------------------------------

MMK_INLINE Vec dropped(const Activation& a, DropoutRow row, int64_t column, Vec v) {
  return mmk::MMK_ISA::dropped(row, column, a.threshold, a.gain, v);
}

// A row of `count` elements of x, in place, with zeros up to the next multiple of kWidth.
void activate(const Activation& a, float* values, int64_t row, int64_t column, int64_t count) {
  if (a.kind == 0 && !a.dropout) return;
  const DropoutRow random = a.dropout ? dropout_row(a.seed, static_cast<uint64_t>(row)) : DropoutRow{};
  for (int64_t l = 0; l < count; l += kWidth) {
    Vec v = activated(a.kind, load(values + l));
    if (a.dropout) v = dropped(a, random, column + l, v);
    store(values + l, v);
  }
}

// --- Factors -------------------------------------------------------------------------------------------------------

void factors(const Strided& from, int64_t rows, int64_t columns, float offset, float* to) {
  float row[64 + kWidth];
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += 64) {
      const int64_t count = std::min<int64_t>(64, columns - j);
      load_tile(row, 64, from.at(0, 0, i, j), from.dtype, from.stride[2], from.stride[3], 1, count);
      for (int64_t l = 0; l < count; ++l) to[i * columns + j + l] = row[l] + offset;
    }
}

// What gates the columns of a part have: a vector of them has gates of which the first kWidth hold all.
class Columns {
 public:
  Columns(int64_t first, int64_t columns, int64_t block, int32_t* space) : first_(first), block_(block), lanes_(space) {
    for (int64_t j = 0; j < columns; j += kPanel)
      for (int64_t l = 0; l < kPanel; ++l)
        lanes_[j + l] = static_cast<int32_t>((first + std::min(j + l, columns - 1)) / block - gate(j));
  }
  int64_t gate(int64_t j) const { return (first_ + j) / block_; }
  MMK_INLINE_LAMBDA inline IntVec lanes(int64_t j) const {
    IntVec v;
    std::memcpy(&v, lanes_ + j, sizeof(v));
    return v;
  }

 private:
  int64_t first_, block_;
  int32_t* lanes_;
};

int64_t columns_space(int64_t columns) { return round_up(columns, kPanel); }

// Adds the sums of a piece, times the factors of their rows and columns.
struct AddScaled {
  Add to;
  const float* data;  // of the piece's factors for the tile's first column
  int64_t stride;
  const int64_t* places;  // of the rows, in units of the stride
  bool one_place;
  IntVec lanes[2];

  template <int kRows, int kVecs>
  MMK_INLINE_LAMBDA inline void operator()(const Vec (&acc)[kRows][kVecs]) const {
    if (one_place)
      add<true>(acc);
    else
      add<false>(acc);
  }

  template <bool kOnePlace, int kRows, int kVecs>
  MMK_INLINE_LAMBDA inline void add(const Vec (&acc)[kRows][kVecs]) const {
    Vec factor[kVecs], scaled[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      if (i == 0 || !kOnePlace) {
        const Vec row = load(data + places[i] * stride);
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) factor[v] = take(row, lanes[v]);
      }
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) scaled[i][v] = acc[i][v] * factor[v];
    }
    to(scaled);
  }
};

// --- y and dx ------------------------------------------------------------------------------------------------------

Extent extent_of(const GridProduct& m) { return {m.rows, m.columns, m.depth, m.scale_b ? m.depth : m.factors.piece}; }

// Whether sums are made where the result is; others are made in float32 scratch first.
bool in_place(const Strided& result) { return result.dtype == DType::kFloat32 && result.stride[3] == 1; }

// Scratch: the product's, the bias, the columns' lanes, results.
int64_t product_space(const GridProduct& m) {
  return matmul_space(extent_of(m)) + 2 * columns_space(m.columns) + (in_place(m.c) ? 0 : m.rows * m.columns);
}

void product(const GridProduct& m, float* space) {
  const Factors& f = m.factors;
  const bool wide = in_place(m.c);
  float* const bias = space + matmul_space(extent_of(m));
  float* const lanes = bias + columns_space(m.columns);
  float* const results = lanes + columns_space(m.columns);
  const Columns columns(m.first_column, m.columns, f.block, reinterpret_cast<int32_t*>(lanes));
  if (m.bias.data != nullptr) load_tile(bias, m.columns, m.bias.data, m.bias.dtype, 0, m.bias.stride[3], 1, m.columns);
  const auto pack_a = [&](float* to, int64_t i, int64_t rows, int64_t p, int64_t depth) {
    for (int64_t q = 0; q < depth; q += kWidth) {
      float* const tile = to + q * kTileRows;
      const int64_t count = std::min<int64_t>(kWidth, depth - q);
      load_tile(tile, kWidth, m.a.at(0, 0, i, p + q), m.a.dtype, m.a.stride[2], m.a.stride[3], rows, count);
      if (m.x.data == nullptr)
        for (int64_t r = 0; r < rows; ++r) activate(m.activation, tile + r * kWidth, m.first_row + i + r, p + q, count);
    }
  };
  const auto load_b = [&](float* to, int64_t p, int64_t depth, int64_t j, int64_t width) {
    load_tile(to, kPanel, m.b.at(0, 0, p, j), m.b.dtype, m.b.stride[2], m.b.stride[3], depth, width);
  };
  const auto scaled_b = [&](float* to, int64_t p, int64_t depth, int64_t j, int64_t width) {
    const float* const gate = f.data + m.gates[0] * f.stride + columns.gate(j);
    const IntVec of[2] = {columns.lanes(j), columns.lanes(j + kWidth)};
    for (int64_t q = 0, end; q < depth; q = end) {
      end = std::min(((p + q) / f.piece + 1) * f.piece - p, depth);
      load_b(to + q * kPanel, p + q, end - q, j, width);
      const Vec row = load(gate + (p + q) / f.piece * f.row), left = take(row, of[0]), right = take(row, of[1]);
      for (int64_t s = q; s < end; ++s) {
        float* const at = to + s * kPanel;
        store(at, load(at) * left);
        if (width > kWidth) store(at + kWidth, load(at + kWidth) * right);
      }
    }
  };
  const auto add_scaled = [&](const Place& at) {
    const int64_t last = std::min<int64_t>(at.row + kTileRows, m.rows) - 1;
    const bool one_gate = m.run >= kTileRows && m.gates[at.row] == m.gates[last];  // two runs at most
    return AddScaled{{at.c, at.c_row, at.accumulate},
                     f.data + at.depth / f.piece * f.row + columns.gate(at.column),
                     f.stride,
                     m.gates + at.row,
                     one_gate,
                     {columns.lanes(at.column), columns.lanes(at.column + kWidth)}};
  };
  float* const c = wide ? reinterpret_cast<float*>(m.c.data) : results;
  const int64_t c_row = wide ? m.c.stride[2] : m.columns;
  const float* const added = m.bias.data == nullptr ? nullptr : bias;
  if (m.scale_b)
    matmul<Order::kByChunks>(extent_of(m), pack_a, scaled_b, c, c_row, added, space);
  else
    matmul<Order::kByChunks>(extent_of(m), pack_a, load_b, add_scaled, c, c_row, added, false, space);
  if (m.x.data != nullptr && (m.activation.kind != 0 || m.activation.dropout)) {
    const Activation& a = m.activation;
    for (int64_t i = 0; i < m.rows; ++i) {
      const DropoutRow random = a.dropout ? dropout_row(a.seed, m.first_row + i) : DropoutRow{};
      float x[kWidth];
      for_vectors(m.columns, [&](int64_t j, int, auto lanes) MMK_INLINE_LAMBDA {
        const int64_t count = std::min<int64_t>(kWidth, m.columns - j);
        load_tile(x, kWidth, m.x.at(0, 0, i, j), m.x.dtype, 0, m.x.stride[3], 1, count);
        Vec v = load(c + i * c_row + j, lanes) * slope(a.kind, load(x));
        if (a.dropout) v = dropped(a, random, m.first_column + j, v);
        store(c + i * c_row + j, v, lanes);
      });
    }
  }
  if (!wide) store_tile(m.c.data, m.c.dtype, m.c.stride[2], m.c.stride[3], c, c_row, m.rows, m.columns);
}

// --- y of few rows -------------------------------------------------------------------------------------------------
// A(i, :) times the factors of a block of columns, then its dot products with the weight's rows as they lie.

constexpr int64_t kFewColumns = 32;  // of the weight, at a time

// Rows of a power of two would compete for one cache set.
int64_t few_row(const GridProduct& m) { return round_up(m.depth, kWidth) + 16; }

int64_t few_rows_space(const GridProduct& m) {
  return (2 * m.rows + kFewColumns) * few_row(m) + m.rows * (kFewColumns + kWidth);
}

void few_rows(const GridProduct& m, float* space) {
  const Factors& f = m.factors;
  const int64_t row = few_row(m), depth = round_up(m.depth, kWidth), result_row = kFewColumns + kWidth;
  float *const a = space, *const scaled = a + m.rows * row, *const weight = scaled + m.rows * row,
               *const results = weight + kFewColumns * row;
  load_tile(a, row, m.a.data, m.a.dtype, m.a.stride[2], m.a.stride[3], m.rows, m.depth);
  for (int64_t i = 0; i < m.rows; ++i) activate(m.activation, a + i * row, m.first_row + i, 0, m.depth);
  const bool dense = m.b.dtype == DType::kFloat32 && m.b.stride[2] == 1 && m.depth % kWidth == 0;
  int64_t block = -1;
  for (int64_t j = 0, end; j < m.columns; j = end) {
    const int64_t gate = (m.first_column + j) / f.block;
    end = std::min({(gate + 1) * f.block - m.first_column, j + kFewColumns, m.columns});
    if (gate != block)
      for (int64_t i = 0; i < m.rows; ++i) {
        const float* const from = f.data + m.gates[i] * f.stride + gate;
        for (int64_t p = 0; p < m.depth; p += f.piece) {
          const float factor = from[p / f.piece * f.row];
          const float* const x = a + i * row + p;
          float* const to = scaled + i * row + p;
          for (int64_t q = 0; q < f.piece; ++q) to[q] = x[q] * factor;
        }
        std::fill(scaled + i * row + m.depth, scaled + i * row + depth, 0.0f);
      }
    block = gate;
    const float* rows = reinterpret_cast<const float*>(m.b.at(0, 0, 0, j));
    if (!dense) load_tile(weight, row, m.b.at(0, 0, 0, j), m.b.dtype, m.b.stride[3], m.b.stride[2], end - j, m.depth);
    dots(scaled, row, m.rows, dense ? rows : weight, dense ? m.b.stride[3] : row, end - j, results, result_row, depth);
    if (m.bias.data != nullptr) {
      float bias[kFewColumns + kWidth];
      load_tile(bias, kFewColumns, m.bias.at(0, 0, 0, j), m.bias.dtype, 0, m.bias.stride[3], 1, end - j);
      for (int64_t i = 0; i < m.rows; ++i)
        for (int64_t l = 0; l < end - j; ++l) results[i * result_row + l] += bias[l];
    }
    store_tile(m.c.at(0, 0, 0, j), m.c.dtype, m.c.stride[2], m.c.stride[3], results, result_row, m.rows, end - j);
  }
}

// --- dW and dgate --------------------------------------------------------------------------------------------------

// Adds P, times its factors, to dW, and P o weight to the sums of the rows of a block, apart for every column.
struct AddGradient {
  AddScaled scaled;  // places: the grid's rows
  bool wants_weight;
  const float* weight;
  int64_t weight_row;
  float* sums;  // null: not wanted
  int64_t sums_row;

  template <int kRows, int kVecs>
  MMK_INLINE_LAMBDA inline void operator()(const Vec (&acc)[kRows][kVecs]) const {
    if (wants_weight) scaled(acc);
    const int64_t* const grid_rows = scaled.places;
    if (sums == nullptr) return;
    Vec sum[kVecs] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sum[v] += acc[i][v] * load(weight + i * weight_row + v * kWidth);
      if (i + 1 == kRows || grid_rows[i + 1] != grid_rows[i])
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          float* const at = sums + grid_rows[i] * sums_row + v * kWidth;
          store(at, load(at) + sum[v]);
          sum[v] = Vec{};
        }
    }
  }
};

Extent extent_of(const GridGradient& m, int64_t depth) { return {m.rows, m.columns, depth, depth}; }

// Scratch: the product's, the columns' lanes, the rows of the grid, a tile of the weight, sums, results.
int64_t gradient_space(const GridGradient& m) {
  const int64_t results = m.dweight.data == nullptr || in_place(m.dweight) ? 0 : m.rows * m.columns;
  return matmul_space(extent_of(m, kWidth)) + columns_space(m.columns) + 2 * columns_space(m.rows + kTileRows) +
         kTileRows * kPanel + m.grid_rows() * columns_space(m.columns) + results;
}

void gradient(const GridGradient& m, float* space) {
  const Factors& f = m.factors;
  const bool wide = in_place(m.dweight);
  const int64_t sums_row = columns_space(m.columns), grid_rows = m.grid_rows(), grid_columns = m.grid_columns();
  float* const lanes = space + matmul_space(extent_of(m, kWidth));
  int64_t* const of_rows = reinterpret_cast<int64_t*>(lanes + columns_space(m.columns));
  float* const tile = lanes + columns_space(m.columns) + 2 * columns_space(m.rows + kTileRows);
  float* const sums = tile + kTileRows * kPanel;
  float* const results = sums + grid_rows * sums_row;
  const Columns columns(m.first_column, m.columns, f.block, reinterpret_cast<int32_t*>(lanes));
  for (int64_t i = 0; i < m.rows + kTileRows; ++i)
    of_rows[i] = (m.first_row + std::min(i, m.rows - 1)) / f.piece - m.grid_row();
  const bool dense_weight = m.weight.dtype == DType::kFloat32 && m.weight.stride[3] == 1;
  float* const c = m.dweight.data == nullptr ? nullptr : wide ? reinterpret_cast<float*>(m.dweight.data) : results;
  const int64_t c_row = wide ? m.dweight.stride[2] : m.columns;
  if (m.sums != nullptr) std::fill_n(m.sums, m.gate_count * grid_rows * grid_columns, 0.0f);

  bool accumulate = false;
  for (int64_t gate = 0; gate < m.gate_count; ++gate) {
    const int64_t* const order = m.order + m.begins[gate];
    const int64_t depth = (m.begins[gate + 1] - m.begins[gate]) * m.run;
    if (depth == 0) continue;
    // f(place in [0, count), row of x, rows) for every run that lies in places p to p + count of the gate's rows.
    const auto for_runs = [&](int64_t p, int64_t count, const auto& f) {
      for (int64_t q = 0, step; q < count; q += step) {
        const int64_t within = (p + q) % m.run;
        step = std::min(m.run - within, count - q);
        f(q, order[(p + q) / m.run] * m.run + within, step);
      }
    };
    const auto pack_a = [&](float* to, int64_t i, int64_t, int64_t p, int64_t count) {
      const int64_t width = std::min<int64_t>(kWidth, m.rows - i);
      for_runs(p, count, [&](int64_t q, int64_t row, int64_t rows) {
        load_tile(to + q * kTileRows, kTileRows, m.dy.at(0, 0, row, i), m.dy.dtype, m.dy.stride[2], m.dy.stride[3],
                  rows, width);
      });
    };
    const auto pack_b = [&](float* to, int64_t p, int64_t count, int64_t j, int64_t width) {
      for_runs(p, count, [&](int64_t q, int64_t row, int64_t rows) {
        float* const at = to + q * kPanel;
        load_tile(at, kPanel, m.x.at(0, 0, row, j), m.x.dtype, m.x.stride[2], m.x.stride[3], rows, width);
        for (int64_t r = 0; r < rows; ++r) activate(m.activation, at + r * kPanel, row + r, m.first_column + j, width);
      });
    };
    const auto finish = [&](const Place& at) {
      const int64_t width = std::min<int64_t>(kPanel, m.columns - at.column);
      const int64_t* const grid_row = of_rows + at.row;
      AddGradient add{{{at.c, at.c_row, at.accumulate},
                       f.data + gate * f.stride + m.grid_row() * f.row + columns.gate(at.column),
                       f.row,
                       grid_row,
                       grid_row[0] == grid_row[kTileRows - 1],
                       {columns.lanes(at.column), columns.lanes(at.column + kWidth)}},
                      c != nullptr,
                      nullptr,
                      m.weight.stride[2],
                      m.sums == nullptr ? nullptr : sums + at.column,
                      sums_row};
      if (m.sums == nullptr) return add;
      add.weight = reinterpret_cast<const float*>(m.weight.at(0, 0, at.row, at.column));
      if (dense_weight && width % kWidth == 0) return add;
      const int64_t height = std::min<int64_t>(kTileRows, m.rows - at.row);
      load_tile(tile, kPanel, m.weight.at(0, 0, at.row, at.column), m.weight.dtype, m.weight.stride[2],
                m.weight.stride[3], height, width);
      add.weight = tile, add.weight_row = kPanel;
      return add;
    };
    if (m.sums != nullptr) std::fill_n(sums, grid_rows * sums_row, 0.0f);
    matmul<Order::kByColumns>(extent_of(m, depth), pack_a, pack_b, finish, c, c_row, nullptr, accumulate, space);
    accumulate = true;
    if (m.sums == nullptr) continue;
    for (int64_t i = 0; i < grid_rows; ++i)
      for (int64_t j = 0; j < m.columns; ++j)
        m.sums[(gate * grid_rows + i) * grid_columns + (m.first_column + j) / f.block - m.grid_column()] +=
            sums[i * sums_row + j];
  }
  if (c == nullptr) return;
  if (!accumulate)
    for (int64_t i = 0; i < m.rows; ++i) std::fill_n(c + i * c_row, m.columns, 0.0f);
  if (!wide) store_tile(m.dweight.data, m.dweight.dtype, m.dweight.stride[2], 1, c, c_row, m.rows, m.columns);
}

// --- The gate ------------------------------------------------------------------------------------------------------

int64_t gate_space(const GateFactors& g) { return round_up(g.rows, kWidth) + 3 * round_up(g.columns, kWidth); }

void load_row(float* to, const Strided& from, int64_t gate, int64_t i, int64_t count) {
  load_tile(to, count, from.at(0, gate, i, 0), from.dtype, 0, from.stride[3], 1, count);
}

MMK_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }

void gate_forward(const GateFactors& g, int64_t begin, int64_t end, float* space) {
  float *const row = space, *const column = row + round_up(g.rows, kWidth),
               *const out = column + round_up(g.columns, kWidth);
  for (int64_t gate = begin; gate < end; ++gate) {
    load_row(row, g.row, gate, 0, g.rows);
    load_row(column, g.column, gate, 0, g.columns);
    for (int64_t i = 0; i < g.rows; ++i) {
      for (int64_t j = 0; j < g.columns; j += kWidth) store(out + j, sigmoid(load(column + j) * row[i]));
      store_tile(g.gate.at(0, gate, i, 0), g.gate.dtype, 0, g.gate.stride[3], out, g.columns, 1, g.columns);
    }
  }
}

void gate_backward(const GateFactors& g, int64_t begin, int64_t end, float* space) {
  const int64_t padded = round_up(g.columns, kWidth);
  float *const row = space, *const column = row + round_up(g.rows, kWidth), *const dgate = column + padded,
               *const dcolumn = dgate + padded;
  for (int64_t gate = begin; gate < end; ++gate) {
    load_row(row, g.row, gate, 0, g.rows);
    load_row(column, g.column, gate, 0, g.columns);
    std::fill_n(dcolumn, padded, 0.0f);
    for (int64_t i = 0; i < g.rows; ++i) {
      load_row(dgate, g.gate, gate, i, g.columns);
      Vec drow{};
      for (int64_t j = 0; j < g.columns; j += kWidth) {
        // s (1 - s) by the exponential of -|u|: no 1 - s that would cancel.
        const Vec c = load(column + j), u = c * row[i], e = exp(u > 0.0f ? -u : u);
        const Vec d = load(dgate + j) * (e / (e * (e + 2.0f) + 1.0f));
        drow += d * c;
        store(dcolumn + j, load(dcolumn + j) + d * row[i]);
      }
      g.drow[gate * g.rows + i] = sum(drow);
    }
    std::copy_n(dcolumn, g.columns, g.dcolumn + gate * g.columns);
  }
}

}  // namespace

extern const HyperGridKernels hypergrid_kernels;
const HyperGridKernels hypergrid_kernels = {kWidth,         factors,      product_space,  product,
                                            few_rows_space, few_rows,     gradient_space, gradient,
                                            gate_space,     gate_forward, gate_backward};

}  // namespace mmk::MMK_ISA
