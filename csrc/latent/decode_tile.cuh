// What the kernels of the decoder share beside those of the whole family: the way of folded keys, values and dout into
// shared memory. Latents are few and queries many: a block that owns queries walks over all latents of its heads. Sums
// over few latents and channels show that fp32 is multiplied by halves: the gradients take the small products as well.
#pragma once
#include "latent/decode_cuda.h"
#include "latent/latent_tile.cuh"

namespace mmk::latent {
namespace {

__host__ __device__ inline int padded_columns(const Decode& d) { return round_up(d.columns, 16); }

template <class T>
__host__ __device__ int column_pitch(const Decode& d) {
  return padded_columns(d) + kVector<T>;
}

// One at least, which without latents is empty.
inline int64_t latent_tiles(const Decode& d, int columns) { return d.x.rows > 0 ? ceil_div(d.x.rows, columns) : 1; }

__device__ __forceinline__ bool visible(const Decode& d, int64_t batch, int64_t latent) {
  return latent < d.x.rows &&
         (!d.latent_mask || d.latent_mask[batch * d.latent_mask_batch + latent * d.latent_mask_row]);
}

__device__ __forceinline__ bool shown(const Decode& d, int64_t batch, int64_t query) {
  return query < d.x.keys && (!d.x.mask || d.x.mask[batch * d.x.mask_batch + query * d.x.mask_key]);
}

__device__ __forceinline__ int64_t batch_of(const Decode& d, int64_t head) { return small(head) / small(d.heads); }

// What a latent adds to its scores in units of log2, -inf where nobody may see it.
__device__ __forceinline__ float score_bias(const Decode& d, int64_t pair, int64_t latent) {
  return visible(d, batch_of(d, pair), latent) ? d.bias[pair * d.x.rows + latent] * d.x.scale * kLog2e : -INFINITY;
}

// P from the saved log-sum-exp.
__device__ __forceinline__ float weight_of(float s, float scale, float bias, float shift) {
  return ptx::exp2(fmaf(s, scale, bias - shift));
}

// Queries as a tile of one block sees them. Rows do not meet each other, so those that all examples share are
// normalised once, hidden or not.
__device__ __forceinline__ Problem queries_of_tile(const Decode& d) {
  Problem p = d.x;
  if (d.shared) p.mask = nullptr;
  return p;
}

// Rows of k or v of a head; those of hidden latents become zeros. cp.async, not yet committed.
template <class T>
__device__ void load_latents(const Decode& d, const QueryRows& rows, int width, int64_t pair, int64_t first, T* tile,
                             int count, int pitch) {
  const T* source = static_cast<const T*>(rows.data) + pair * rows.batch + first * rows.row;
  const int64_t batch = batch_of(d, pair);
  copy_rows<T, 16>(source, rows.row, width, tile, count, pitch, [&](int r) { return visible(d, batch, first + r); });
}

// Rows of dout; those of hidden queries become zeros. cp.async, not yet committed.
template <class T>
__device__ void load_dout(const Decode& d, const DecodeBackward& b, int64_t batch, int64_t first, T* tile, int count,
                          int pitch) {
  const T* source = static_cast<const T*>(b.of_rows.dout.data) + (batch * d.x.keys + first) * d.columns;
  auto inside = [&](int r) { return shown(d, batch, first + r); };
  if (b.dout_bytes == 16) {
    copy_rows<T, 16>(source, d.columns, d.columns, tile, count, pitch, inside);
  } else if (b.dout_bytes == 4) {
    copy_rows<T, 4>(source, d.columns, d.columns, tile, count, pitch, inside);
  } else {
    copy_rows<T, sizeof(T)>(source, d.columns, d.columns, tile, count, pitch, inside);
  }
}

}  // namespace
}  // namespace mmk::latent
