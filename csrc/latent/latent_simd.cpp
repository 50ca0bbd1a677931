// The latent family's keys: a block of the input, normalised on its way into cache; and the projections around the
// core. Compiled once per instruction set.
#include <algorithm>

#include "common/dots.h"
#include "common/gemm.h"
#include "common/tiles.h"
#include "latent/latent.h"
#include "latent/norm_rows.h"

namespace mmk::MMK_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// May vectors read rows of `columns` where they are?
bool readable(const Strided& s, int64_t columns) {
  return s.dtype == DType::kFloat32 && s.stride[3] == 1 && columns % kWidth == 0;
}

constexpr int kTogether = 4;  // rows: processors fetch several that lie in memory faster than one

// Sums of rows, of their squares, and of their products with kCount others. Fetches the rows that follow.
template <int kCount, bool kMoments>
void row_products(const float* const (&rows)[kTogether], const float* few, int64_t few_row, int64_t channels,
                  float (*moments)[2], float* products) {
  constexpr int kSums = kCount + 2 * kMoments;
  const int64_t ahead = kMoments ? rows[kTogether - 1] - rows[0] + channels : 0;
  Vec sums[kSums][kTogether]{};
  for (int64_t c = 0; c < channels; c += kWidth)
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r) {
      const Vec x = load(rows[r] + c);
      __builtin_prefetch(rows[r] + c + ahead);
#pragma GCC unroll 3
      for (int n = 0; n < kCount; ++n) sums[n][r] += x * load(few + n * few_row + c);
      if constexpr (kMoments) sums[kCount][r] += x, sums[kCount + 1][r] += x * x;
    }
#pragma GCC unroll 5
  for (int n = 0; n < kSums; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; ++r)
      (n < kCount ? products[n * kFewRow + r] : moments[r][n - kCount]) = sum(sums[n][r]);
}

// Leaves rows as they lie, multiplies them, and finds what normalises them. False where some have to be normalised
// first, because their means are so large that what would be taken off the products is most of them.
bool multiply_raw(const LatentAttention& p, int64_t batch, KeyBlock& block, float* space) {
  RawKeys& raw = *block.raw;
  float *mean = space, *factor = space + kBlockKeys;
  block.k = reinterpret_cast<const float*>(p.x.at(0, batch, block.begin));
  block.k_row = p.x.stride[2];
  for (int64_t i = 0; i < block.count; i += kTogether) {
    const float* rows[kTogether];
    float moments[kTogether][2];
    for (int r = 0; r < kTogether; ++r) rows[r] = block.k + smaller(i + r, block.count - 1) * block.k_row;
    row_products<1, true>(rows, raw.rows, raw.row, p.channels, moments, raw.products + i);
    if (raw.count > 1)  // 2 or 4
      (raw.count == 2 ? row_products<1, false> : row_products<3, false>)(rows, raw.rows + raw.row, raw.row, p.channels,
                                                                         moments, raw.products + kFewRow + i);
    for (int r = 0; r < kTogether; ++r) {
      const float average = moments[r][0] / p.channels, variance = moments[r][1] / p.channels - average * average;
      if (!(average * average <= variance)) return false;
      mean[i + r] = average, factor[i + r] = 1.0f / std::sqrt(variance + p.eps);
    }
  }
  block.v = block.k, block.v_row = block.k_row;
  raw.mean = mean, raw.factor = factor;
  return true;
}

void load_keys(const Attention& a, int64_t batch, int64_t, KeyBlock& block, float* space) {
  constexpr int64_t kTileFloats = 4096;  // loaded, then normalised while in the first cache level
  const auto& p = static_cast<const LatentAttention&>(a);
  const int64_t channels = p.channels, ld = padded_row(a.qk_dim);
  const int64_t most_rows = smaller(16, std::max<int64_t>(kTileFloats / ld, 1));
  const bool in_place = p.eps >= 0.0f && p.position.data == nullptr && readable(p.x, channels);
  float* factors = space + kBlockKeys * ld;
  if (block.raw != nullptr && block.count == block.end - block.begin && multiply_raw(p, batch, block, space)) return;
  for_stretches(block, [&](int64_t i, int64_t offset, int64_t length) {
    for (int64_t done = 0; done < length; done += most_rows) {
      const int64_t rows = smaller(most_rows, length - done), key = block.begin + offset + done;
      float* tile = space + (i + done) * ld;
      if (!in_place)
        load_tile(tile, ld, p.x.at(0, batch, key), p.x.dtype, p.x.stride[2], p.x.stride[3], rows, p.x_channels);
      if (p.position.data != nullptr)
        load_tile(tile + p.x_channels, ld, p.position.at(0, 0, key), p.position.dtype, p.position.stride[2],
                  p.position.stride[3], rows, channels - p.x_channels);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = tile + r * ld;
        const float* from = in_place ? reinterpret_cast<const float*>(p.x.at(0, batch, key + r)) : row;
        if (p.eps >= 0.0f) factors[i + done + r] = normalise(from, row, channels, p.eps);
        for (int64_t c = channels; c % kWidth != 0; ++c) row[c] = 0.0f;
        if (!a.dropout) continue;
        row[channels] = 1.0f;
        for (int64_t c = channels + 1; c % kWidth != 0; ++c) row[c] = 0.0f;
      }
    }
  });
  block.k = block.v = space;
  block.k_row = block.v_row = ld;
}

// The gradient of a raw row is a sum of few rows, of itself and of a constant.
void store_raw_gradients(const LatentAttention& p, int64_t batch, const KeyBlock& block) {
  const RawKeys& raw = *block.raw;
  float* const dx = reinterpret_cast<float*>(p.dx.at(0, batch, block.begin));
  float weights[2 * kRawQueries][kTogether];
  for (int64_t i = 0; i < block.count; i += kTogether) {
    const float* x[kTogether];
    float* to[kTogether];
    float own[kTogether], constant[kTogether];
    for (int64_t r = 0; r < kTogether; ++r) {
      const int64_t key = smaller(i + r, block.count - 1);
      x[r] = block.k + key * block.k_row, to[r] = dx + key * p.dx.stride[2];
      for (int64_t n = 0; n < raw.count; ++n) weights[n][r] = raw.products[n * kFewRow + key] * raw.factor[key];
      own[r] = -raw.slope[key] * raw.factor[key] * raw.factor[key];
      constant[r] = -raw.level[key] * raw.factor[key] - own[r] * raw.mean[key];
    }
    for (int64_t c = 0; c < p.channels; c += kWidth) {
      Vec sums[kTogether];
#pragma GCC unroll 4
      for (int r = 0; r < kTogether; ++r) sums[r] = load(x[r] + c) * own[r] + constant[r];
      for (int64_t n = 0; n < raw.count; ++n) {
        const Vec v = load(raw.rows + n * raw.row + c);
#pragma GCC unroll 4
        for (int r = 0; r < kTogether; ++r) sums[r] += v * weights[n][r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < kTogether; ++r) store(to[r] + c, sums[r]);
    }
  }
}

// The gradient of the normalised rows, turned into that of the raw ones and stored.
void store_key_gradients(const Attention& a, int64_t batch, int64_t, const KeyBlock& block, const float* space,
                         float* dk, float*) {
  const auto& p = static_cast<const LatentAttention&>(a);
  if (block.is_raw()) return store_raw_gradients(p, batch, block);
  const int64_t channels = p.channels, ld = padded_row(a.qk_dim);
  const int64_t length = block.end - block.begin, position_channels = channels - p.x_channels;
  auto clear_hidden = [&](const Strided& to, int64_t example, int64_t columns) {
    if (block.count < length) std::memset(to.at(0, example, block.begin), 0, length * columns * to.item_bytes());
  };
  const bool in_place = p.eps >= 0.0f && p.dx.data != nullptr && position_channels == 0 && readable(p.dx, channels);
  if (in_place) clear_hidden(p.dx, batch, channels);
  const float* factors = space + kBlockKeys * ld;
  for (int64_t i = 0; i < block.count; ++i) {
    float *row = dk + i * ld, *to = row;
    if (a.dropout) row[channels] = 0.0f;
    if (in_place) to = reinterpret_cast<float*>(p.dx.at(0, batch, block.begin + block.offset[i]));
    if (p.eps >= 0.0f) normalise_gradient(row, space + i * ld, to, channels, factors[i]);
  }
  if (in_place) return;
  auto write = [&](const Strided& to, int64_t example, int64_t first, int64_t columns) {
    clear_hidden(to, example, columns);
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

// Rows are those of a head in all examples, so that few queries of many examples read the weights once.

int64_t projection_space(const Projections& p) {
  const int64_t wide = padded_row(p.channels), block = padded_row(kProjectionColumns), qk = padded_row(p.qk_dim);
  const int64_t absorb = p.qk_dim * block + kChunkRows * qk;
  const int64_t project = std::max(p.channels * block, kProjectionColumns * wide) + kChunkRows * wide;
  return 2 * wide + block + kChunkRows * block + std::max(absorb, project) + 64;
}

void load_line(float* line, const Strided& source, int64_t first, int64_t length) {
  load_tile(line, 0, source.at(0, 0, 0, first), source.dtype, 0, source.stride[3], 1, length);
}

void absorb(const Projections& p, int64_t examples, int64_t head, int64_t row, int64_t column, float* space) {
  const int64_t rows = smaller(kChunkRows, examples * p.queries - row), wide = padded_row(p.channels);
  const int64_t columns = smaller(kProjectionColumns, p.channels - column), ld = padded_row(kProjectionColumns);
  const int64_t q_ld = padded_row(p.qk_dim);
  float* gain = space;
  float* out = gain + ld;
  float* q = out + kChunkRows * ld;
  const float* weight = q + kChunkRows * q_ld;
  int64_t weight_row = ld;
  const Strided& w = p.w_k;
  if (readable(w, p.channels)) {
    weight = reinterpret_cast<const float*>(w.at(0, 0, head * p.qk_dim, column)), weight_row = w.stride[2];
  } else {
    load_tile(const_cast<float*>(weight), ld, w.at(0, 0, head * p.qk_dim, column), w.dtype, w.stride[2], w.stride[3],
              p.qk_dim, columns);
  }
  for (int64_t r = 0; r < rows; ++r)
    load_tile(q + r * q_ld, q_ld, p.q.at(0, (row + r) / p.queries, (row + r) % p.queries, head * p.qk_dim), p.q.dtype,
              0, p.q.stride[3], 1, p.qk_dim);
  gemm<false>({q, q_ld, weight, weight_row, kPanel, out, ld, kPanel}, rows, columns, p.qk_dim, false);
  if (p.gain.data != nullptr) load_line(gain, p.gain, column, columns);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t example = (row + r) / p.queries, query = (row + r) % p.queries;
    float* to = p.absorbed + ((example * p.heads + head) * p.queries + query) * wide + column;
    for (int64_t c = 0; c < columns; c += kWidth)
      store(to + c, p.gain.data == nullptr ? load(out + r * ld + c) : load(out + r * ld + c) * load(gain + c));
  }
}

void project(const Projections& p, int64_t examples, int64_t head, int64_t row, int64_t column, float* space) {
  const int64_t rows = smaller(kChunkRows, examples * p.queries - row), wide = padded_row(p.channels);
  const int64_t columns = smaller(kProjectionColumns, p.v_dim - column), ld = padded_row(kProjectionColumns);
  const int64_t first = head * p.v_dim + column;
  float* gain = space;
  float* shift = gain + wide;
  float* bias = shift + wide;
  float* out = bias + ld;
  float* in = out + kChunkRows * ld;
  float* const weight = in + kChunkRows * wide;
  if (p.gain.data != nullptr) load_line(gain, p.gain, 0, p.channels);
  if (p.shift.data != nullptr) load_line(shift, p.shift, 0, p.channels);
  if (p.b_v.data != nullptr) load_line(bias, p.b_v, first, columns);
  auto of_core = [&](int64_t r) {
    return ((row + r) / p.queries * p.heads + head) * p.queries + (row + r) % p.queries;
  };
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = p.core + of_core(r) * wide;
    float* to = in + r * wide;
    for (int64_t c = 0; c < p.channels; c += kWidth) {
      Vec value = load(from + c);
      if (p.gain.data != nullptr) value *= load(gain + c);
      if (p.shift.data != nullptr) value += load(shift + c);
      store(to + c, value);
    }
    for (int64_t c = p.channels; c % kWidth != 0; ++c) to[c] = 0.0f;
  }
  const Strided& w = p.w_v;
  if (rows <= 64) {  // a transposed copy of the weights would cost more than the better product saves
    const float* lines = weight;
    int64_t line = wide;
    if (readable(w, p.channels))
      lines = reinterpret_cast<const float*>(w.at(0, 0, first)), line = w.stride[2];
    else
      load_tile(weight, wide, w.at(0, 0, first), w.dtype, w.stride[2], w.stride[3], columns, p.channels);
    dots(in, wide, rows, lines, line, columns, out, ld, p.channels);
  } else {
    load_tile(weight, ld, w.at(0, 0, first), w.dtype, w.stride[3], w.stride[2], p.channels, columns);
    gemm<false>({in, wide, weight, ld, kPanel, out, ld, kPanel}, rows, columns, p.channels, false);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* line = out + r * ld;
    if (p.lse[of_core(r)] == -__builtin_inff())
      std::memset(line, 0, ld * sizeof(float));  // no key
    else
      for (int64_t e = 0; p.b_v.data != nullptr && e < columns; e += kWidth)
        store(line + e, load(line + e) + load(bias + e));
    store_tile(p.out.at(0, (row + r) / p.queries, (row + r) % p.queries, first), p.out.dtype, 0, 1, line, 0, 1,
               columns);
  }
}

}  // namespace

extern const LatentKernels latent_kernels;
const LatentKernels latent_kernels = {load_keys, store_key_gradients, projection_space, absorb, project};

}  // namespace mmk::MMK_ISA
