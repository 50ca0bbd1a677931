// The decoder's rows and keys on their way into cache and out of it. Compiled once per instruction set.
#include "common/tiles.h"
#include "latent/decode.h"
#include "latent/norm_rows.h"

namespace mmk::MMK_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void add(float* to, const float* from, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) to[i] += from[i];
}

bool hidden(const Decode& d, int64_t example, int64_t row) {
  if (d.query_mask.data == nullptr) return false;
  if (example >= 0) return d.query_mask.data[example * d.query_mask.stride[2] + row * d.query_mask.stride[3]] == 0;
  for (int64_t b = 0; b < d.batch; ++b)
    if (!hidden(d, b, row)) return false;
  return true;
}

// --- Keys ----------------------------------------------------------------------------------------------------------

void load_keys(const Attention& a, int64_t, int64_t, KeyBlock& block, float*) {
  const auto& p = static_cast<const DecodeAttention&>(a);
  block.k_row = padded_row(a.qk_dim), block.v_row = padded_row(a.v_dim);
  block.k = p.packed_k + block.begin * block.k_row, block.v = p.packed_v + block.begin * block.v_row;
}

void store_key_gradients(const Attention& a, int64_t, int64_t, const KeyBlock& block, const float*, float* dk,
                         float* dv) {
  const auto& p = static_cast<const DecodeAttention&>(a);
  const int64_t k_row = padded_row(a.qk_dim), v_row = padded_row(a.v_dim);
  add(p.dk + block.begin * k_row, dk, block.count * k_row);
  add(p.dv + block.begin * v_row, dv, block.count * v_row);
}

void pack_keys(const Decode& d, int64_t example, int64_t head, const int32_t* keys, int64_t first, int64_t count,
               float* k, float* v) {
  const int64_t k_row = d.k_row(), v_row = d.v_row();
  const auto* bias = reinterpret_cast<const float*>(d.bias.at(0, example, head));
  for (int64_t i = first; i < first + count; ++i) {
    float* to = k + i * k_row;
    load_tile(to, k_row, d.k.at(example, head, keys[i]), d.k.dtype, 0, d.k.stride[3], 1, d.channels);
    for (int64_t c = d.channels + 1; c < k_row; ++c) to[c] = 0.0f;
    to[d.channels] = bias[keys[i] * d.bias.stride[3]];
    load_tile(v + i * v_row, v_row, d.v.at(example, head, keys[i]), d.v.dtype, 0, d.v.stride[3], 1, d.v_dim);
  }
}

void unpack_gradients(const Decode& d, int64_t example, int64_t head, const int32_t* keys, int64_t first, int64_t count,
                      float* dk, float* dv, int64_t copies, int64_t stride) {
  const int64_t k_row = d.k_row(), v_row = d.v_row();
  for (int64_t i = first; i < first + count; ++i) {
    float *k = dk + i * k_row, *v = dv + i * v_row;
    for (int64_t c = 1; c < copies; ++c) add(k, k + c * stride, d.wide()), add(v, v + c * stride, d.v_dim);
    store_tile(d.dk.at(example, head, keys[i]), d.dk.dtype, 0, 1, k, 0, 1, d.channels);
    store_tile(d.dv.at(example, head, keys[i]), d.dv.dtype, 0, 1, v, 0, 1, d.v_dim);
    d.dbias[(example * d.heads + head) * d.keys + keys[i]] = k[d.channels];
  }
}

// --- Queries -------------------------------------------------------------------------------------------------------

void load_queries(const Decode& d, int64_t example, int64_t row, int64_t rows, float* xhat, float* factors) {
  constexpr int64_t kRows = 16;  // loaded, then normalised while in the first cache level
  const int64_t ld = d.k_row(), of = d.shared() ? 0 : example;
  for (int64_t done = 0; done < rows; done += kRows) {
    const int64_t count = smaller(kRows, rows - done), first = row + done;
    float* tile = xhat + done * ld;
    load_tile(tile, ld, d.x.at(0, of, first), d.x.dtype, d.x.stride[2], d.x.stride[3], count, d.x_channels);
    if (d.position.data != nullptr)
      load_tile(tile + d.x_channels, ld, d.position.at(0, 0, first), d.position.dtype, d.position.stride[2],
                d.position.stride[3], count, d.channels - d.x_channels);
    for (int64_t r = 0; r < count; ++r) {
      float* line = tile + r * ld;
      if (hidden(d, example, first + r)) std::memset(line, 0, d.channels * sizeof(float));
      factors[done + r] = d.eps < 0.0f ? 1.0f : normalise(line, line, d.channels, d.eps);
      for (int64_t c = d.channels; c < ld; ++c) line[c] = 0.0f;
      line[d.channels] = 1.0f;
    }
  }
}

void load_out_bias(const Decode& d, float* line) {
  load_tile(line, 0, d.out_bias.data, d.out_bias.dtype, 0, d.out_bias.stride[3], 1, d.v_dim);
}

void store_out(const Decode& d, int64_t example, int64_t row, int64_t rows, float* sums) {
  const int64_t ld = d.v_row();
  float* const bias = sums + rows * ld;  // one row more is there
  if (d.out_bias.data != nullptr) load_out_bias(d, bias);
  for (int64_t r = 0; r < rows; ++r) {
    float* line = sums + r * ld;
    if (hidden(d, example, row + r)) std::memset(line, 0, ld * sizeof(float));
    if (d.out_bias.data != nullptr) add(line, bias, d.v_dim);
  }
  store_tile(d.out.at(0, example, row), d.out.dtype, d.out.stride[2], d.out.stride[3], sums, ld, rows, d.v_dim);
}

void load_results(const Decode& d, int64_t example, int64_t row, int64_t rows, float* dout, float* out) {
  const int64_t ld = d.v_row();
  load_tile(dout, ld, d.dout.at(0, example, row), d.dout.dtype, d.dout.stride[2], d.dout.stride[3], rows, d.v_dim);
  if (out != nullptr)
    load_tile(out, ld, d.out.at(0, example, row), d.out.dtype, d.out.stride[2], d.out.stride[3], rows, d.v_dim);
  float* const bias = dout + rows * ld;  // one row more is there
  const bool biased = out != nullptr && d.out_bias.data != nullptr;
  if (biased) load_out_bias(d, bias);
  for (int64_t r = 0; r < rows; ++r) {
    if (hidden(d, example, row + r)) std::memset(dout + r * ld, 0, ld * sizeof(float));
    for (int64_t e = 0; biased && e < d.v_dim; ++e) out[r * ld + e] -= bias[e];
  }
}

void store_dqueries(const Decode& d, int64_t example, int64_t row, int64_t rows, const float* xhat,
                    const float* factors, float* gradient, float* position_sums, bool first) {
  const int64_t ld = d.k_row(), position_channels = d.channels - d.x_channels;
  for (int64_t r = 0; r < rows; ++r) {
    float* line = gradient + r * ld;
    for (int64_t c = d.channels; c < d.channels + kWidth; ++c) line[c] = 0.0f;
    if (d.eps >= 0.0f) normalise_gradient(line, xhat + r * ld, line, d.channels, factors[r]);
  }
  if (d.dx.data != nullptr)
    store_tile(d.dx.at(0, d.shared() ? 0 : example, row), d.dx.dtype, d.dx.stride[2], d.dx.stride[3], gradient, ld,
               rows, d.x_channels);
  if (position_sums == nullptr) return;
  const int64_t sums_ld = padded_row(position_channels);
  for (int64_t r = 0; r < rows; ++r) {
    float* to = position_sums + r * sums_ld;
    if (first)
      std::memcpy(to, gradient + r * ld + d.x_channels, position_channels * sizeof(float));
    else
      add(to, gradient + r * ld + d.x_channels, position_channels);
  }
}

void store_dposition(const Decode& d, int64_t row, int64_t rows, const float* position_sums) {
  const int64_t columns = d.channels - d.x_channels;
  store_tile(d.dposition.at(0, 0, row), d.dposition.dtype, d.dposition.stride[2], d.dposition.stride[3], position_sums,
             padded_row(columns), rows, columns);
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels = {load_keys, store_key_gradients, pack_keys,      unpack_gradients, load_queries,
                                      store_out, load_results,        store_dqueries, store_dposition,  add};

}  // namespace mmk::MMK_ISA
