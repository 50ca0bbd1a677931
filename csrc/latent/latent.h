// Attention over a normalised input that is key and value at once. No torch here.
//
// With dropout qk_dim and v_dim count one channel more, the last: 1 in the keys and 0 in the queries. It leaves scores
// as they are, and its output is the sum of a row's dropped weights.
#pragma once
#include "attention/attention.h"

namespace mmk {

struct LatentAttention : Attention {
  Strided x;         // (B,M,Cx) in the last three dimensions
  Strided position;  // (M,C-Cx) in the last two, or no data
  int64_t channels, x_channels;
  float eps;                   // negative: no normalisation
  Strided dx;                  // as x, or no data
  Strided dposition;           // as position, or no data
  bool add_dposition = false;  // to float32 sums over the batch
};

// What surrounds the core when the projections are absorbed: per head q' = q w_k diag(gain) before it, and
// out = o' (w_v diag(gain))^T + w_v shift + b_v after it.
struct Projections {
  int64_t batch, heads, queries, channels, qk_dim, v_dim;  // qk_dim and v_dim of one head
  Strided q;                                               // (B|1,N,H*D) in the last three dimensions
  Strided w_k, w_v;                                        // (H*D,C), (H*E,C) in the last two
  Strided gain, shift, b_v;                                // in the last one, or no data
  float* absorbed;                                         // (B|1,H*N,padded_row(C))
  const float* core;                                       // (B,H*N,padded_row(C))
  const float* lse;                                        // (B,H*N)
  Strided out;                                             // (B,N,H*E) in the last three
};

constexpr int64_t kProjectionColumns = 128;

struct LatentKernels {
  LoadKeys* load_keys;
  StoreKeyGradients* store_key_gradients;
  int64_t (*projection_space)(const Projections&);
  // kChunkRows of the rows that a head has in `examples` examples, and kProjectionColumns columns of the result.
  void (*absorb)(const Projections&, int64_t examples, int64_t head, int64_t row, int64_t column, float* space);
  void (*project)(const Projections&, int64_t examples, int64_t head, int64_t row, int64_t column, float* space);
};

inline int64_t latent_key_space(int64_t channels) { return kBlockKeys * (padded_row(channels) + 1); }

}  // namespace mmk
