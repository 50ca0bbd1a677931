// What the binding tells the kernels. Plain data: the binding is compiled without CUDA headers, the kernels without
// torch's.
//
// Every pass of attention, forward and backward, is the same walk: a block keeps some rows and goes over tiles of
// columns,
//     S = a_rows a_columns^T            then weights W from S, and in backward from dP = b_rows b_columns^T as well
//     out = W values                    over one tile of the values' columns
//
//   pass      rows     columns   a    b       W    values
//   forward   queries  keys      q k          P    v
//   dq        queries  keys      q k  dout v  dS   k
//   dv        keys     queries   k q          P    dout
//   dk        keys     queries   k q  v dout  dS   q
//   dbias     queries  keys      q k  dout v  dS   none: dS itself is summed
#pragma once
#include <cstdint>

namespace mmk::attention {

enum class Dtype : int { fp32, bf16, fp16 };
enum class Mode : int { forward, backward, bias };

struct Matrix {  // (B, H, rows, columns), columns with stride 1; strides in elements
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  int copy_bytes = 0;    // see Rows in common/tile.cuh
  bool is_keys = false;  // the key mask hides its rows
};

struct Pass {
  Matrix rows_a, rows_b, columns_a, columns_b, values;
  int64_t batch, heads;
  int queries, keys;
  int rows, columns;        // queries and keys in the order of this pass
  int a_dim, b_dim, width;  // b_dim is 0 when W is P
  bool rows_are_keys;
  float scale;      // of the scores
  float out_scale;  // of the result

  const uint8_t* key_mask;
  int64_t mask_batch, mask_key;
  const void* bias;
  bool bias_is_fp32;
  int64_t bias_strides[4];  // 0 where it is broadcast
  const int64_t* seed;      // null: no dropout
  uint32_t drop_below;
  float keep_scale;

  float* lse;          // (B, H, N): written by forward, read by backward
  const float* delta;  // (B, H, N): rowsum(dout out) - dlse
  void* out;           // (B, H, rows, width) of the inputs' dtype; used when there is one split
  float* partial;      // (splits, B, H, rows, width) otherwise; (splits, *bias's shape) for dbias
  float* partial_lse;  // (splits, B, H, rows)

  // Geometry, from plan_pass.
  int warps, row_tiles, column_tiles, value_tiles, tile_width;
  int blocks_of_8;  // of the accumulator: which instantiation runs
  int64_t items;    // column tiles a piece of work walks (dbias: tiles that add up in one entry)
  int64_t splits, items_per_split;
  int shared_bytes;
  bool resident;  // the rows stay in shared memory; otherwise they are read again with every column tile
  int64_t bias_sizes[4];
};

constexpr int kStages = 4;

constexpr int max_warps(Mode mode) { return mode == Mode::bias ? 4 : 8; }
template <Mode mode>
constexpr int kThreads = 32 * max_warps(mode);

// Keys (or queries) of a column tile. Narrow where the accumulators leave no registers for a wide one.
constexpr int column_tile(Mode mode, int blocks_of_8, int element_bytes) {
  const int most = mode == Mode::backward && element_bytes == 4 ? 8 : 16;
  return mode != Mode::bias && blocks_of_8 > most ? 32 : 64;
}
template <Mode mode, int BlocksOf8, int ElementBytes>
constexpr int kColumnTile = column_tile(mode, BlocksOf8, ElementBytes);

}  // namespace mmk::attention

extern "C" {
int mmk_attention_pass(mmk::attention::Dtype dtype, mmk::attention::Mode mode, const mmk::attention::Pass* pass,
                       void* stream);
// out = sum over splits weighted by their log-sum-exps; rows = B H N.
int mmk_attention_merge(mmk::attention::Dtype dtype, const float* partial, const float* partial_lse, int64_t splits,
                        int64_t rows, int64_t width, void* out, float* lse, void* stream);
// out[i] = sum over splits of partial[split][i], in their order.
int mmk_attention_sum(mmk::attention::Dtype dtype, const float* partial, int64_t splits, int64_t count, void* out,
                      void* stream);
// delta = rowsum(dout out) - dlse; dlse may be null.
int mmk_attention_delta(mmk::attention::Dtype dtype, const mmk::attention::Matrix* dout, const void* out,
                        const float* dlse, int64_t batch, int64_t heads, int64_t rows, int64_t width, float* delta,
                        void* stream);
}
