// What the binding of adapters tells the CUDA kernels. Plain data: the binding is compiled without CUDA headers, the
// kernels without torch's. Strides are in elements; tensors are contiguous where none are named.
#pragma once
#include "common/rows_cuda.h"

namespace mmk::adapter {

struct RowTensor {  // (B, T, C), columns one after another
  const void* data = nullptr;
  int64_t example = 0, row = 0;
};

struct Parameter {
  const void* data = nullptr;  // of the rows' dtype or float32
  bool is_fp32 = false;
};

// How rows are found: all have the one adapter, an index for each example, groups in the order of their adapters,
// groups of items so few that every block puts them in order by itself.
enum class Mode : int { alone, by_example, grouped, few };

struct Adapter {
  RowTensor x, input_residual, residual;
  const void *w_down, *w_up;  // (A, R, C), (A, C, R)
  Parameter b_down, b_up, norm_weight, norm_bias, out_weight, out_bias, scale, gate;
  int64_t scale_adapter, scale_channel;  // strides; 0 where they are shared
  const int64_t* index;                  // contiguous
  const int *begins, *order;             // of groups 0 to A + 1 (A: none, A + 1: no number of an adapter), in items
  const int64_t* seed;
  int64_t rows, length, group_rows, gate_rows;  // rows of an item of the index, of the gate
  int channels, bottleneck, adapters;
  Mode mode;
  int skip, activation;
  float eps, out_eps, factor, gain;
  uint32_t threshold;
  bool by_vector;  // 16 bytes of every row and parameter may come in one load

  float* statistics;
  void* out;
  int tile;       // rows
  bool resident;  // a tile's s stays in shared memory

  // Backward. hidden and dhidden: (M, R), rows in the order of adapters.
  const void* dout;
  void *dy, *dx, *dinput, *hidden, *dhidden;  // null: not wanted (dy: there is no norm of the result)
  float *dgate, *norm_sums, *out_sums;        // (M), (2, tiles, C)

  // Gradients of weights: an adapter's rows are cut into parts of `part` rows, which sum for themselves.
  int64_t part, parts;
  float *down_parts, *bias_parts, *up_parts, *dl_parts;  // (parts, R, C), (parts, R), (parts, C, R), (parts, C)
  void *dw_down, *dw_up;
  float *db_down, *db_up, *dscale;
};

constexpr int kMostTile = 128, kClusterTile = 32, kFewItems = 256;
// Bytes of shared memory a block takes.
int64_t shared_bytes(Dtype dtype, int channels, int bottleneck, int tile, bool resident, bool backward);

}  // namespace mmk::adapter

extern "C" {
int mmk_adapter_forward(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, int64_t tiles, void* stream);
int mmk_adapter_backward(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, int64_t tiles, void* stream);
// The parts' sums, and the sums of an adapter's parts.
int mmk_adapter_weights(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, void* stream);
int mmk_adapter_sums(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, void* stream);
// Clusters of multiprocessors that the device runs the forward by clusters on; 0 where it does not serve.
int mmk_adapter_cluster_forward_slots(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter);
int mmk_adapter_cluster_forward(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, void* stream);
// Rows of a tile of the backward in one pass, and the clusters that the device runs at a time; 0 where it does not
// serve.
int mmk_adapter_cluster_tile(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, int* clusters);
// dx, dy and the parts' sums.
int mmk_adapter_cluster_backward(mmk::Dtype dtype, const mmk::adapter::Adapter* adapter, void* stream);
// Where groups begin (A + 3) and the items in their order.
int mmk_adapter_group(const int64_t* index, int64_t count, int adapters, int* begins, int* order, void* stream);
}
