// HyperGrid's products on the CPU: what the binding tells the kernels of every instruction set.
#pragma once
#include "common/cpu.h"

namespace mmk {

// a(x): activation (0 none, 1 relu, 2 gelu by erf, 3 by tanh), then dropout by counter with the row and column of x.
struct Activation {
  int64_t kind = 0;
  bool dropout = false;
  uint64_t seed = 0;
  uint32_t threshold = 0;
  float gain = 1.0f;
};

// Factors rho + gate in float32 for a product with `piece` places of the sum and `block` columns to a gate:
// data[gate * stride + p / piece * row + n / block]. Vectors that begin at any of them can be read.
struct Factors {
  const float* data;
  int64_t stride, row, piece, block;
};

// A part of C = act(A) (F o B) + bias, where F differs from row to row, or C = slope(x) o (A (F o B)). The last two
// strides of `a` (rows x depth), `b` (depth x columns), `c` and `x` (rows x columns) count.
struct GridProduct {
  int64_t rows, columns, depth;
  int64_t first_row, first_column;  // the part's, in C
  Strided a, b, c, bias, x;         // their first element of the part; no bias, no x: data is null
  Activation activation;
  Factors factors;
  const int64_t* gates;  // of the rows of the part
  int64_t run;           // so many rows from a multiple of it on, counted in C, have the same gate
  bool scale_b;          // the rows have one gate, and B is scaled by it when it is copied
};

// A part of dW = sum over gates of F o P, P = dy^T act(x) over the rows of the gate, and of dgate = the sums of
// P o weight over blocks.
struct GridGradient {
  int64_t rows, columns;            // of dW
  int64_t first_row, first_column;  // the part's
  Strided dy, x, weight, dweight;   // their first element of the part; dweight's data is null where not wanted
  Activation activation;
  Factors factors;                // piece: rows of dW to a gate, block: columns
  int64_t gate_count, run;        // rows of x come in runs with one gate
  const int64_t *begins, *order;  // the runs of gate g: order[begins[g]] to order[begins[g + 1]]
  float* sums;                    // (gate_count, grid rows, grid columns) that the part touches, or null

  int64_t grid_row() const { return first_row / factors.piece; }
  int64_t grid_column() const { return first_column / factors.block; }
  int64_t grid_rows() const { return (first_row + rows - 1) / factors.piece - grid_row() + 1; }
  int64_t grid_columns() const { return (first_column + columns - 1) / factors.block - grid_column() + 1; }
};

// Gates of examples from their factors; strides of the last two dimensions count, 0 along the gates where shared.
struct GateFactors {
  int64_t rows, columns;
  Strided row, column, gate;  // gate: the result, or its gradient
  float *drow, *dcolumn;      // (gates, rows) and (gates, columns)
};

struct HyperGridKernels {
  int64_t width;  // floats that may be read beyond the last factor
  // to[i * columns + j] = from(i, j) + offset
  void (*factors)(const Strided& from, int64_t rows, int64_t columns, float offset, float* to);
  int64_t (*product_space)(const GridProduct&);
  void (*product)(const GridProduct&, float* space);
  int64_t (*few_rows_space)(const GridProduct&);
  void (*few_rows)(const GridProduct&, float* space);
  int64_t (*gradient_space)(const GridGradient&);
  void (*gradient)(const GridGradient&, float* space);
  int64_t (*gate_space)(const GateFactors&);
  void (*gate_forward)(const GateFactors&, int64_t begin, int64_t end, float* space);
  void (*gate_backward)(const GateFactors&, int64_t begin, int64_t end, float* space);
};

}  // namespace mmk
