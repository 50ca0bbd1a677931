// Many queries, normalised on the way, that read few keys which hold the projections: attention's own parts over tiles
// of the queries, each of which meets every example and head in turn. No torch here.
#pragma once
#include "attention/attention.h"

namespace mmk {

constexpr int64_t kDecodeRows = 512;  // queries of a tile

struct Decode {
  int64_t batch, heads, queries, keys, channels, x_channels, v_dim;
  int64_t query_batch;  // 1 where all examples share the queries
  float scale, eps;     // eps negative: no normalisation
  Strided x;            // (B|1,O,Cx) in the last three dimensions
  Strided position;     // (O,C-Cx) in the last two, or no data
  Strided query_mask;   // bool (B,O) in the last two, or no data
  Strided k, v;         // (B,H,M,C), (B,H,M,E)
  Strided bias;         // (B,H,M) in the last three
  Strided out_bias;     // (E) in the last, or no data
  Strided out;          // (B,O,E) in the last three
  float* lse;           // (B,H,O)

  // Backward only.
  Strided dout;       // as out
  Strided dx;         // as x, or no data
  Strided dposition;  // as position, or no data
  Strided dk, dv;     // as k and v, or no data
  float* dbias;       // (B,H,M)

  // A key has its bias as one channel more, which is 1 in every query.
  int64_t wide() const { return channels + 1; }
  int64_t k_row() const { return padded_row(wide()); }
  int64_t v_row() const { return padded_row(v_dim); }
  bool shared() const { return query_batch == 1; }
};

// What one tile sees of one example and head: rows in scratch memory, and the visible keys, packed.
struct DecodeAttention : Attention {
  const float *packed_k, *packed_v;    // (keys,k_row), (keys,v_row)
  float *dk = nullptr, *dv = nullptr;  // what they add to
};

struct DecodeKernels {
  LoadKeys* load_keys;
  StoreKeyGradients* store_key_gradients;
  // Visible keys of a head, `count` of them from the packed row `first` on; keys[i] is the number of packed row i.
  void (*pack_keys)(const Decode&, int64_t example, int64_t head, const int32_t* keys, int64_t first, int64_t count,
                    float* k, float* v);
  // Sums of `copies` packed gradients go to those keys.
  void (*unpack_gradients)(const Decode&, int64_t example, int64_t head, const int32_t* keys, int64_t first,
                           int64_t count, float* dk, float* dv, int64_t copies, int64_t stride);
  // The rows [row, row + rows) as (rows, k_row), normalised, and their factors; zeros where `example` hides a row (-1:
  // where all do).
  void (*load_queries)(const Decode&, int64_t example, int64_t row, int64_t rows, float* xhat, float* factors);
  // out = sums + out_bias, where the query is hidden the bias alone.
  void (*store_out)(const Decode&, int64_t example, int64_t row, int64_t rows, float* sums);
  // dout and, where it is wanted, out - out_bias as (rows, v_row); dout is zero where the query is hidden.
  void (*load_results)(const Decode&, int64_t example, int64_t row, int64_t rows, float* dout, float* out);
  // The gradient d (rows, k_row) of the normalised rows becomes that of the raw ones; stored as far as it is wanted,
  // that of the position in float32 in `position_sums` (rows, padded_row(C - Cx)) where it is not null, added unless
  // `first`.
  void (*store_dqueries)(const Decode&, int64_t example, int64_t row, int64_t rows, const float* xhat,
                         const float* factors, float* d, float* position_sums, bool first);
  void (*store_dposition)(const Decode&, int64_t row, int64_t rows, const float* position_sums);
  void (*add)(float* to, const float* from, int64_t floats);
};

}  // namespace mmk
