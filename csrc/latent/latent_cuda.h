// What the binding hands to the launchers of latent_cuda.cu: plain pointers, sizes and strides in elements.
#pragma once
#include <cstdint>

#include "common/dropout.h"

namespace mmk::latent {

enum class Type : int { float32, bfloat16, float16 };

// Matrices of one row per query as the kernels read them: every row starts at a multiple of 16 bytes, its channels are
// in the kernels' order (those of the position first) and zeros follow up to the next multiple of 16 bytes.
struct QueryRows {
  const void* data;
  int64_t batch, row;  // strides; batch 0: shared
};

struct Problem {
  Type type;
  int64_t batch, rows, keys;
  int content, position;  // channels; C is their sum
  const void* x;          // (batch, keys, content)
  int64_t x_batch, x_key, x_channel;
  const void* table;  // (keys, position)
  int64_t table_key, table_channel;
  const bool* mask;  // (batch, keys) or null
  int64_t mask_batch, mask_key;
  QueryRows q;
  float scale, eps;
  const int64_t*
      seed;  // of dropout, or null. With it `out` and `dout` have a channel more: the sum of the row's weights
  uint32_t drop_below;
  float keep_scale;
  uint32_t first_key;  // what dropout counts from

  MMK_HOST_DEVICE int out_channels() const { return content + position + (seed ? 1 : 0); }
};

// How a kernel cuts the problem up, decided by its planner; the binding adds the splits.
struct Plan {
  int64_t row_tiles, key_tiles;
  int64_t slots;   // blocks that the device runs at a time
  int64_t splits;  // of the keys
  bool hopper;     // the kernels of latent_hopper*_cuda.cu take it
};

struct Forward {
  float* out;  // (batch, rows, out_channels) contiguous
  float* lse;  // (batch, rows)
  float *sums,
      *tops;  // with splits: (splits, batch, rows, out_channels) unnormalised outputs; (2, splits, batch, rows) maxima,
              // sums
};

struct Backward {
  QueryRows dout;
  const float *lse, *delta;  // (batch, rows)
  const float* dsum;         // (batch, rows), with dropout: the gradient of the sum of a row's weights
  void* dq;                  // (dq_batch, rows, C) contiguous; dq_batch is batch, or 1 for shared queries
  int64_t dq_batch;
  float* partial_dq;  // (splits, batch, rows, C), or null where a block's result is final
  void* dx;           // (batch, keys, content) contiguous, or null
  void* dtable;       // (keys, position) contiguous, or null
  float* table_sums;  // (keys, position), where 16-bit sums over the batch need it
};

struct Strided {  // (batch, rows, C) of any strides
  const void* data;
  int64_t batch, row, channel;
};

}  // namespace mmk::latent

// All return 0 or a CUDA error code, the hopper launchers without merging splits; the planners return -1 where no tile
// fits the device's shared memory, those of hopper also where the device or the problem is none for them.
extern "C" {
int mmk_latent_hopper_plan_fwd(const mmk::latent::Problem*, mmk::latent::Plan*);
int mmk_latent_hopper_plan_bwd_q(const mmk::latent::Problem*, mmk::latent::Plan*);
int mmk_latent_hopper_plan_bwd_x(const mmk::latent::Problem*, mmk::latent::Plan*);
int mmk_latent_hopper_fwd(const mmk::latent::Problem*, const mmk::latent::Plan*, const mmk::latent::Forward*,
                          void* stream);
int mmk_latent_hopper_bwd_q(const mmk::latent::Problem*, const mmk::latent::Plan*, const mmk::latent::Backward*,
                            void* stream);
int mmk_latent_hopper_bwd_x(const mmk::latent::Problem*, const mmk::latent::Plan*, const mmk::latent::Backward*,
                            void* stream);
int mmk_latent_plan_fwd(const mmk::latent::Problem*, mmk::latent::Plan*);
int mmk_latent_plan_bwd_q(const mmk::latent::Problem*, mmk::latent::Plan*);
int mmk_latent_plan_bwd_x(const mmk::latent::Problem*, mmk::latent::Plan*);
int mmk_latent_fwd(const mmk::latent::Problem*, const mmk::latent::Plan*, const mmk::latent::Forward*, void* stream);
int mmk_latent_bwd_q(const mmk::latent::Problem*, const mmk::latent::Plan*, const mmk::latent::Backward*, void* stream);
int mmk_latent_bwd_x(const mmk::latent::Problem*, const mmk::latent::Plan*, const mmk::latent::Backward*, void* stream);
// `source`, of the problem's type or (`from_float`) float32, into rows of `pitch` elements of the problem's type in the
// kernels' channel order.
int mmk_latent_pack(const mmk::latent::Problem*, const mmk::latent::Strided* source, bool from_float, int64_t batch,
                    void* packed, int64_t pitch, void* stream);
// delta = rowsum(dout * out) - dlse, (batch, rows), with dout as the kernels read it: rounded to the problem's type.
// Both are float32. With dropout the row's last channel, which no kernel rounds, goes to `dsum` as well.
int mmk_latent_delta(const mmk::latent::Problem*, const mmk::latent::Strided* dout, const mmk::latent::Strided* out,
                     const float* dlse, int64_t dlse_batch, int64_t dlse_row, float* delta, float* dsum, void* stream);
}
