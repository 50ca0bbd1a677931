// What the binding of HyperGrid tells the CUDA kernels. Plain data: the binding is compiled without CUDA headers, the
// kernels without torch's. Strides are in elements.
#pragma once
#include "common/rows_cuda.h"

namespace mmk::hypergrid {

// Derivative of a(x), by which the gradient of x is multiplied where it is stored.
struct Epilogue {
  const void* bias = nullptr;  // of the result's dtype, contiguous
  const void* x = nullptr;     // rows of consecutive elements
  int64_t x_row = 0;
  int activation = 0;  // 0 none, 1 relu, 2 gelu by erf, 3 gelu by tanh
  const int64_t* seed = nullptr;
  uint32_t threshold = 0;
  float gain = 1.0f;  // 1 / (1 - dropout_p)
};

// Which gate a row has.
struct Gates {
  const float* data = nullptr;  // (g, p, q) of a product, (g, r, c) of the weight's gradient, by strides
  int64_t stride[3] = {};
  int64_t count = 0;
  float residual = 0.0f;  // added to every gate
  const int64_t* index = nullptr;
  int64_t group_rows = 1;  // rows one after another that have the same gate
};

// out[m, n] = sum over blocks p of (residual + gate[g(m), p, q(n)]) left_p right_p^T: the forward, and the gradient of
// x.
struct Product {
  const void *left, *right;
  int64_t left_row, right_row;
  bool transposed;  // right is (contraction, column) instead of (column, contraction)
  bool relu;        // of left
  int64_t rows;
  int p, kp, q, kq;  // blocks and their widths, over the contraction and over columns
  Gates gates;
  Epilogue epilogue;
  void* out;  // contiguous
  // Blocks p are split `splits` ways, `split_blocks` each; with more than one split sums go to `partial` (splits, rows,
  // columns).
  int splits, split_blocks;
  float* partial;
};

// dweight[n, k] = sum over gates of (residual + gate[g, r(k), c(n)]) times the rows' dy^T a(x), and from the same tiles
// dgate.
struct WeightGradient {
  const void *dy, *left, *weight;
  int64_t dy_row, left_row, weight_row, rows;
  bool relu;  // of left
  int r, kr, c, kc;
  Gates gates;
  const int64_t *begins, *order;  // (G + 1) rows where gates begin; groups of rows in the order of their gates, or null
  // The rows of a gate are cut into `chunks` segments; a block walks `split_segments` of all of them.
  int chunks, segments, split_segments, splits;
  void* out;       // contiguous; null: not wanted
  float* partial;  // (splits, N, K)
  // (segments, row tiles + C, units + R), tiles and units of what the kernel makes; null: not wanted
  float* parts;
  float* dgate;  // (G, R, C)
};

struct GateFactors {
  const void *row, *column, *dgate;  // dgate of the factors' dtype
  int64_t row_strides[2], column_strides[2], dgate_strides[3];
  int64_t gates;
  int r, c;
  void* out;              // (G, R, C)
  float *drow, *dcolumn;  // backward
  bool row_shared, column_shared;
};

// Rows and columns of a tile of the results, and columns of a unit of dgate's parts.
constexpr int kColumns = 128, kUnit = kColumns / 4;
// What a warpgroup of the kernel for wgmma makes of the weight's gradient: a unit of dgate's parts.
constexpr int kHopperRows = 64, kHopperUnit = 192;
constexpr int tile_rows(Dtype dtype) { return dtype == Dtype::fp32 ? 64 : 128; }

}  // namespace mmk::hypergrid

extern "C" {
int mmk_hypergrid_product(mmk::Dtype dtype, const mmk::hypergrid::Product* product, void* stream);
// With wgmma and TMA, and whether they take a product: the forward, the gradient of x (with the weight turned: right is
// (column, contraction)), the gradients of the weight and of the gate.
bool mmk_hypergrid_takes_hopper(mmk::Dtype dtype, const mmk::hypergrid::Product* product);
int mmk_hypergrid_hopper(mmk::Dtype dtype, const mmk::hypergrid::Product* product, void* stream);
bool mmk_hypergrid_takes_hopper_input(mmk::Dtype dtype, const mmk::hypergrid::Product* product);
int mmk_hypergrid_hopper_input(mmk::Dtype dtype, const mmk::hypergrid::Product* product, void* stream);
bool mmk_hypergrid_takes_hopper_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight);
int64_t mmk_hypergrid_hopper_weight_clusters(const mmk::hypergrid::WeightGradient* weight);  // of 4 blocks, a split
int mmk_hypergrid_hopper_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight, void* stream);
int mmk_hypergrid_weight(mmk::Dtype dtype, const mmk::hypergrid::WeightGradient* weight, void* stream);
// a(x) of rows of consecutive elements.
int mmk_hypergrid_activate(mmk::Dtype dtype, const mmk::hypergrid::Epilogue* what, int64_t rows, int64_t columns,
                           void* out, void* stream);
// begins[g]: the number of elements of `sorted` below g, times rows. Without `sorted` g times rows.
int mmk_hypergrid_begins(const int64_t* sorted, int64_t count, int64_t gates, int64_t rows, int64_t* begins,
                         void* stream);
int mmk_hypergrid_gate(mmk::Dtype dtype, const mmk::hypergrid::GateFactors* gate, bool backward, void* stream);
}
