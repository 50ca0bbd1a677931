// The latent family's keys: a block of the input, normalised on its way into cache; and the projections around the
// core. Compiled once per instruction set.
#include "common/gemm.h"
#include "common/tiles.h"
#include "latent/latent.h"
#include "latent/norm_rows.h"

namespace mmk::MMK_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void load_keys(const Attention& a, int64_t batch, int64_t, KeyBlock& block, float* space) {
  const auto& p = static_cast<const LatentAttention&>(a);
  const int64_t channels = p.channels, ld = padded_row(a.qk_dim);
  float* factors = space + kBlockKeys * ld;
  for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
    constexpr int64_t kRows = 16;  // loaded, then normalised while in the first cache level
    for (int64_t done = 0; done < length; done += kRows) {
      const int64_t rows = smaller(kRows, length - done), key = block.begin + offset + done;
      float* tile = space + (i + done) * ld;
      load_tile(tile, ld, p.x.at(0, batch, key), p.x.dtype, p.x.stride[2], p.x.stride[3], rows, p.x_channels);
      if (p.position.data != nullptr)
        load_tile(tile + p.x_channels, ld, p.position.at(0, 0, key), p.position.dtype, p.position.stride[2],
                  p.position.stride[3], rows, channels - p.x_channels);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = channels; c % kWidth != 0; ++c) tile[r * ld + c] = 0.0f;
      for (int64_t r = 0; p.eps >= 0.0f && r < rows; ++r)
        factors[i + done + r] = normalise(tile + r * ld, channels, p.eps);
      for (int64_t r = 0; a.dropout && r < rows; ++r) {
        tile[r * ld + channels] = 1.0f;
        for (int64_t c = channels + 1; c % kWidth != 0; ++c) tile[r * ld + c] = 0.0f;
      }
    }
  });
  block.k = block.v = space;
  block.k_row = block.v_row = ld;
}

// The gradient of the normalised rows, turned into that of the raw ones and stored.
void store_key_gradients(const Attention& a, int64_t batch, int64_t, const KeyBlock& block, const float* space,
                         float* dk, float*) {
  const auto& p = static_cast<const LatentAttention&>(a);
  const int64_t channels = p.channels, ld = padded_row(a.qk_dim);
  const float* factors = space + kBlockKeys * ld;
  for (int64_t i = 0; p.eps >= 0.0f && i < block.count; ++i) {
    if (a.dropout) dk[i * ld + channels] = 0.0f;
    normalise_gradient(dk + i * ld, space + i * ld, channels, factors[i]);
  }
  const int64_t length = block.end - block.begin, position_channels = channels - p.x_channels;
  auto write = [&](const Strided& to, int64_t example, int64_t first, int64_t columns) {
    if (block.count < length) std::memset(to.at(0, example, block.begin), 0, length * columns * to.item_bytes());
    for_stretches(block, [&](int64_t i, int64_t offset, int64_t rows) {
      store_tile(to.at(0, example, block.begin + offset), to.dtype, columns, 1, dk + i * ld + first, ld, rows, columns);
    });
  };
  if (p.dx.data != nullptr) write(p.dx, batch, 0, p.x_channels);
  if (p.dposition.data == nullptr) return;
  if (!p.add_dposition) return write(p.dposition, 0, p.x_channels, position_channels);
  for (int64_t i = 0; i < block.count; ++i) {
    float* to = reinterpret_cast<float*>(p.dposition.at(0, 0, block.begin + block.offset[i]));
    for (int64_t c = 0; c < position_channels; ++c) to[c] += dk[i * ld + p.x_channels + c];
  }
}

// --- The projections around the core -------------------------------------------------------------------------------

int64_t projection_space(const Projections& p) {
  const int64_t wide = padded_row(p.channels), qk = padded_row(p.qk_dim), v = padded_row(p.v_dim);
  const int64_t absorb = p.qk_dim * wide + kChunkRows * qk, project = p.channels * v + kChunkRows * v + v;
  return wide + (absorb > project ? absorb : project) + 64;
}

void load_line(float* line, const Strided& source, int64_t first, int64_t length) {
  load_tile(line, 0, source.at(0, 0, 0, first), source.dtype, 0, source.stride[3], 1, length);
}

void absorb(const Projections& p, int64_t batch, int64_t head, int64_t row, float* space) {
  const int64_t rows = smaller(kChunkRows, p.queries - row), wide = padded_row(p.channels), ld = padded_row(p.qk_dim);
  float* line = space;
  float* weight = line + wide;
  float* q = weight + p.qk_dim * wide;
  load_tile(weight, wide, p.w_k.at(0, 0, head * p.qk_dim), p.w_k.dtype, p.w_k.stride[2], p.w_k.stride[3], p.qk_dim,
            p.channels);
  if (p.gain.data != nullptr) {
    load_line(line, p.gain, 0, p.channels);
    for (int64_t d = 0; d < p.qk_dim; ++d)
      for (int64_t c = 0; c < p.channels; c += kWidth)
        store(weight + d * wide + c, load(weight + d * wide + c) * load(line + c));
  }
  load_tile(q, ld, p.q.at(0, batch, row, head * p.qk_dim), p.q.dtype, p.q.stride[2], p.q.stride[3], rows, p.qk_dim);
  float* to = p.absorbed + ((batch * p.heads + head) * p.queries + row) * wide;
  gemm<false>({q, ld, weight, wide, kPanel, to, wide, kPanel}, rows, p.channels, p.qk_dim, false);
}

void project(const Projections& p, int64_t batch, int64_t head, int64_t row, float* space) {
  const int64_t rows = smaller(kChunkRows, p.queries - row), wide = padded_row(p.channels), ld = padded_row(p.v_dim);
  const int64_t first = (batch * p.heads + head) * p.queries + row;
  float* line = space;
  float* weight = line + wide;
  float* constant = weight + p.channels * ld;
  float* out = constant + ld;
  load_tile(weight, ld, p.w_v.at(0, 0, head * p.v_dim), p.w_v.dtype, p.w_v.stride[3], p.w_v.stride[2], p.channels,
            p.v_dim);
  std::memset(constant, 0, ld * sizeof(float));
  if (p.b_v.data != nullptr) load_line(constant, p.b_v, head * p.v_dim, p.v_dim);
  if (p.shift.data != nullptr) {
    load_line(line, p.shift, 0, p.channels);
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t e = 0; e < p.v_dim; e += kWidth)
        store(constant + e, load(constant + e) + load(weight + c * ld + e) * line[c]);
  }
  if (p.gain.data != nullptr) {
    load_line(line, p.gain, 0, p.channels);
    for (int64_t c = 0; c < p.channels; ++c)
      for (int64_t e = 0; e < p.v_dim; e += kWidth) store(weight + c * ld + e, load(weight + c * ld + e) * line[c]);
  }
  gemm<false>({p.core + first * wide, wide, weight, ld, kPanel, out, ld, kPanel}, rows, p.v_dim, p.channels, false);
  for (int64_t r = 0; r < rows; ++r) {
    if (p.lse[first + r] == -__builtin_inff()) continue;  // no key: the row stays zero
    for (int64_t e = 0; e < p.v_dim; e += kWidth) store(out + r * ld + e, load(out + r * ld + e) + load(constant + e));
  }
  store_tile(p.out.at(0, batch, row, head * p.v_dim), p.out.dtype, p.out.stride[2], 1, out, ld, rows, p.v_dim);
}

}  // namespace

extern const LatentKernels latent_kernels;
const LatentKernels latent_kernels = {load_keys, store_key_gradients, projection_space, absorb, project};

}  // namespace mmk::MMK_ISA
