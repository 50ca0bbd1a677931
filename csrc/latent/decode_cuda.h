// What the binding hands to the launchers of decode*_cuda.cu: plain pointers, sizes and strides in elements.
#pragma once
#include "latent/latent_cuda.h"

namespace mmk::latent {

// The decoder as the mirror image of the latent problem: the queries are its keys, normalised on the tile, with `mask`
// for those that count; its rows are the folded latents.
struct Decode {
  Problem x;
  int64_t heads;
  int columns;        // of the values and of the result
  bool shared;        // one array of queries for all examples
  int64_t examples;   // that a block takes one after another
  QueryRows k, v;     // (batch * heads, latents, C) in the kernels' channel order and (batch * heads, latents, columns)
  const float* bias;  // (batch, heads, latents)
  const bool* latent_mask;  // (batch, latents) of any strides, or null
  int64_t latent_mask_batch, latent_mask_row;
  const void* out_bias;  // (columns), or null
  void* out;             // (batch, queries, columns)
  float* sums;           // as out, with several heads: those before this one
  float* lse;            // (batch, heads, queries)
};

struct DecodeBackward {
  // dout (batch, queries, columns) contiguous; dx (batch or 1, queries, content), dtable and its sums
  Backward of_rows;
  int dout_bytes;       // what its rows are aligned to: 16, 4, or the size of an element
  bool sums_first;      // delta comes from a pass over the latents, otherwise from the result
  float* delta;         // (batch, heads, queries)
  float* partial;       // (splits, batch, heads, latents, columns or C): dv or dk
  float* partial_bias;  // (splits, batch, heads, latents), beside dk
};

}  // namespace mmk::latent

// All return 0 or a CUDA error code; the planners -1 where no tile fits the device's shared memory. A plan's row tiles
// and key tiles are those of the accumulators and of what the kernel walks over.
extern "C" {
int mmk_latent_decode_plan_fwd(const mmk::latent::Decode*, mmk::latent::Plan*);
int mmk_latent_decode_plan_bwd_rows(const mmk::latent::Decode*, mmk::latent::Plan*);
int mmk_latent_decode_plan_bwd_values(const mmk::latent::Decode*, mmk::latent::Plan*);
int mmk_latent_decode_plan_bwd_keys(const mmk::latent::Decode*, mmk::latent::Plan*);
int mmk_latent_decode_fwd(const mmk::latent::Decode*, const mmk::latent::Plan*, void* stream);
// delta, and the gradients of the queries and of the position that are wanted.
int mmk_latent_decode_bwd_rows(const mmk::latent::Decode*, const mmk::latent::Plan*, const mmk::latent::DecodeBackward*,
                               void* stream);
// delta alone, of one head, whose result is there.
int mmk_latent_decode_delta(const mmk::latent::Decode*, const mmk::latent::DecodeBackward*, void* stream);
// Into `partial`, then into dv; and dk with dbias likewise.
int mmk_latent_decode_bwd_values(const mmk::latent::Decode*, const mmk::latent::Plan*,
                                 const mmk::latent::DecodeBackward*, void* dv, void* stream);
int mmk_latent_decode_bwd_keys(const mmk::latent::Decode*, const mmk::latent::Plan*, const mmk::latent::DecodeBackward*,
                               void* dk, float* dbias, void* stream);
}
