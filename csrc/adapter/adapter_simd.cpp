// Adapters, compiled once per instruction set. A block of rows passes through the whole chain while it lies in the
// second cache level; the weights are packed once a call.
#include <cmath>

#include "adapter/adapter.h"
#include "common/activation.h"
#include "common/gemm.h"
#include "common/rows.h"
#include "common/tiles.h"

namespace mmk::MMK_ISA {
namespace {

// --- The weights as right operands ---------------------------------------------------------------------------------

struct Panels {
  int64_t channels, bottleneck;
  // Of z = u down^T and o = a up^T, of da = do up and du = dz down, and the biases; `up` and its bias have the scale.
  int64_t b_down, b_up, down, up, up_back, down_back, size;

  explicit Panels(const AdapterProblem& p) : channels(p.channels), bottleneck(p.bottleneck) {
    const int64_t wide = round_up(channels, kPanel), narrow = round_up(bottleneck, kPanel);
    b_down = 0;
    b_up = b_down + narrow;
    down = b_up + wide;
    up = down + (p.needs_hidden() ? channels * narrow : 0);
    up_back = up + (p.needs_y() ? bottleneck * wide : 0);
    down_back = up_back + (p.is_backward() && p.wants_bottleneck() ? channels * narrow : 0);
    size = down_back + (p.is_backward() && p.wants_sum() ? bottleneck * wide : 0);
  }
};

int64_t panels_space(const AdapterProblem& p) { return round_up(Panels(p).size, 16); }

// B(p, j) = source(row p, lane j), by panels.
void pack_panels(float* to, const Strided& source, int64_t row_stride, int64_t lane_stride, int64_t depth,
                 int64_t columns) {
  for (int64_t j = 0; j < columns; j += kPanel)
    load_tile(to + j * depth, kPanel, source.data + j * lane_stride * source.item_bytes(), source.dtype, row_stride,
              lane_stride, depth, std::min<int64_t>(kPanel, columns - j));
}

float element(const Strided& s, int64_t i, int64_t j) {
  float lane[kWidth];
  load_tile(lane, kWidth, s.at(0, 0, i, j), s.dtype, 0, 1, 1, 1);
  return lane[0];
}

void load_vector(float* to, const Strided& from, int64_t count) {
  if (from.data == nullptr)
    std::fill_n(to, round_up(count, kWidth), 0.0f);
  else
    load_tile(to, count, from.data, from.dtype, 0, from.stride[3], 1, count);
}

void pack(const AdapterProblem& p, const AdapterWeights& w, float* panels) {
  const Panels at(p);
  const int64_t channels = p.channels, bottleneck = p.bottleneck;
  const bool forth = at.up < at.up_back, back = at.up_back < at.down_back;
  load_vector(panels + at.b_down, w.b_down, bottleneck);
  load_vector(panels + at.b_up, w.b_up, channels);
  if (at.down < at.up) pack_panels(panels + at.down, w.down, w.down.stride[3], w.down.stride[2], channels, bottleneck);
  if (forth) pack_panels(panels + at.up, w.up, w.up.stride[3], w.up.stride[2], bottleneck, channels);
  if (back) pack_panels(panels + at.up_back, w.up, w.up.stride[2], w.up.stride[3], channels, bottleneck);
  if (at.down_back < at.size)
    pack_panels(panels + at.down_back, w.down, w.down.stride[2], w.down.stride[3], bottleneck, channels);
  if (w.scale.data == nullptr && w.factor == 1.0f) return;
  for (int64_t j = 0; j < channels; ++j) {
    const float scale = w.factor * (w.scale.data == nullptr ? 1.0f : element(w.scale, 0, j));
    const int64_t panel = j / kPanel * kPanel, lane = j % kPanel;
    panels[at.b_up + j] *= scale;
    for (int64_t i = 0; forth && i < bottleneck; ++i) panels[at.up + panel * bottleneck + i * kPanel + lane] *= scale;
    for (int64_t i = 0; back && i < round_up(bottleneck, kPanel); ++i)
      panels[at.up_back + (i / kPanel * channels + j) * kPanel + i % kPanel] *= scale;
  }
}

// --- A block of rows -----------------------------------------------------------------------------------------------

// Rows that pass through together: their three arrays share the second cache level with a part of the packed weights.
// Weights that do not fit there are worth more rows.
int64_t block_rows(const AdapterProblem& p) {
  const bool fits = p.channels * p.bottleneck <= 128 * 1024;
  const int64_t floats = fits ? std::clamp<int64_t>(second_cache() / 20, 25 * 1024, 50 * 1024) : 100 * 1024;
  return round_up(std::clamp<int64_t>(floats / padded_row(p.channels), 12, fits ? 96 : 120), kTileRows);
}

// The same for blocks of whole tiles and almost equal length: the last one of few rows would be slow.
int64_t even_block(const AdapterProblem& p, const AdapterPart& part) {
  const int64_t rows = part.end - part.begin;
  return round_up(ceil_div(rows, ceil_div(rows, block_rows(p))), kTileRows);
}

// Scratch memory of a worker: arrays of rows of C and of r elements, and single rows.
struct Scratch {
  int64_t wide, narrow;        // lengths of rows
  WideRows u, y, dy, dropped;  // of a block; y: o before dropout, or du; `dropped`: o, or its gradient
  float *z, *a, *da;           // (block, r)
  float *weight, *bias, *out_weight, *out_bias;  // (C)
  float* gate;                                   // (block)
  float* rows;                                   // four rows as they are read, where they are not dense

  int64_t size = 0;

  Scratch(const AdapterProblem& p, float* space) {
    const bool backward = p.is_backward();
    const int64_t block = block_rows(p);
    wide = padded_row(p.channels), narrow = padded_row(p.bottleneck);
    const auto take = [&](int64_t floats) {
      float* const piece = space == nullptr ? nullptr : space + size;
      size += round_up(floats, 16);
      return piece;
    };
    const auto take_rows = [&](bool needed) { return WideRows{take(needed ? block * wide : 0), wide}; };
    u = take_rows(true), y = take_rows(true), dy = take_rows(backward), dropped = take_rows(p.dropout);
    z = take(block * narrow), a = take(block * narrow), da = take(backward ? block * narrow : 0);
    weight = take(wide), bias = take(wide), out_weight = take(wide), out_bias = take(wide);
    gate = take(block), rows = take(4 * wide);
  }
};

int64_t space(const AdapterProblem& p) { return Scratch(p, nullptr).size; }

// The rows of a block. What is said of x, dout and results holds where they lie one behind the other.
struct Block {
  const AdapterProblem& p;
  int64_t begin, count;
  bool consecutive;

  int64_t row(int64_t i) const { return p.row(begin + i); }
  bool x_is_u() const { return consecutive && p.x_is_u(); }
  bool dout_is_dy() const { return consecutive && p.dout_is_dy(); }

  // Its rows of x or dout, or of a result, as float32.
  WideRows in(const Strided& s) const {
    return WideRows{reinterpret_cast<float*>(s.data), p.row_stride(s)}.from(row(0));
  }
  WideRows in(char* result) const { return WideRows{reinterpret_cast<float*>(result), p.channels}.from(row(0)); }
};

template <class T>
MMK_INLINE const T* row_of(const AdapterProblem& p, const Strided& s, int64_t row, float* space) {
  return s.data == nullptr ? nullptr
                           : dense<T>(s.at(0, row / p.length, row % p.length), s.stride[3], p.channels, space);
}

struct Statistics {
  float mean, rstd;
};

MMK_INLINE Statistics statistics_of(const float* values, float total, int64_t columns, float eps) {
  const float scale = 1.0f / static_cast<float>(columns), mean = total * scale;
  Sum squares;
  for_vectors(columns, [&](int64_t c, int i, auto lanes) MMK_INLINE_LAMBDA {
    const Vec d = only(load(values + c, lanes) - mean, lanes);
    squares.part[i] += d * d;
  });
  return {mean, 1.0f / std::sqrt(squares.total() * scale + eps)};
}

// u, and what is added to the branch: residuals and, with `bias`, the bias of the up-projection times the gate.
template <class T>
void input_rows(const Block& block, const Scratch& s, const float* bias, bool wants_y, bool saved) {
  const AdapterProblem& p = block.p;
  const int64_t columns = p.channels;
  const bool wants_u = !block.x_is_u();
  if (!wants_u && !wants_y) return;
  const bool normed = p.norm_weight.data != nullptr, x_again = p.skip & 1, input_again = p.skip & 2;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t row = block.row(i);
    const T* x = row_of<T>(p, p.x, row, s.rows);
    const T* input = row_of<T>(p, p.input_residual, row, s.rows + s.wide);
    const T* residual = row_of<T>(p, p.residual, row, s.rows + 2 * s.wide);
    float *const u = s.u.row(i), *const y = s.y.row(i);
    const float gate = s.gate[i];
    Sum total;
    for_vectors(columns, [&](int64_t c, int k, auto lanes) MMK_INLINE_LAMBDA {
      Vec sum = load(x + c, lanes), added = bias == nullptr ? Vec{} : load(bias + c) * gate;
      if (residual != nullptr) added += load(residual + c, lanes);
      if (x_again) added += sum;
      if (input != nullptr) {
        const Vec v = load(input + c, lanes);
        if (input_again) added += v;
        sum += v;
      }
      if (wants_u) store(u + c, sum, lanes);
      if (wants_y) store(y + c, added, lanes);
      total.part[k] += sum;
    });
    if (!normed) continue;
    if (!saved) {
      const Statistics found = statistics_of(u, total.total(), columns, p.eps);
      p.mean[row] = found.mean, p.rstd[row] = found.rstd;
    }
    const float mean = p.mean[row], rstd = p.rstd[row];
    const bool again = wants_y && (p.skip & 4);
    for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      const Vec v = (load(u + c, lanes) - mean) * rstd * load(s.weight + c) + load(s.bias + c);
      store(u + c, v, lanes);
      if (again) store(y + c, load(y + c, lanes) + v, lanes);
    });
  }
}

// z = u down^T + b_down, or what the forward saved of it, and a = gate act(z).
void bottleneck(const Block& block, const Scratch& s, const Panels& at, const float* panels) {
  const AdapterProblem& p = block.p;
  if (p.needs_hidden())
    gemm<false>({s.u.data, s.u.stride, panels + at.down, kPanel, at.channels * kPanel, s.z, s.narrow, kPanel},
                block.count, at.bottleneck, at.channels, false);
  for (int64_t i = 0; i < block.count; ++i) {
    float *const z = s.z + i * s.narrow, *const a = s.a + i * s.narrow;
    float* const saved = p.saved == nullptr ? nullptr : p.saved + block.row(i) * p.saved_row();
    const float gate = s.gate[i];
    for_vectors(at.bottleneck, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      Vec v;
      if (p.needs_hidden()) {
        v = load(z + c) + load(panels + at.b_down + c);
        if (saved != nullptr) store(saved + c, v, lanes);
      } else {
        v = load(saved + c, lanes);
      }
      store(z + c, v);
      store(a + c, activated(p.activation, v) * gate);
    });
  }
}

DropoutRow dropout_of(const AdapterProblem& p, int64_t row) { return dropout_row(p.seed, static_cast<uint64_t>(row)); }

// y += o.
void add_branch(const Block& block, const Scratch& s, const Panels& at, const float* panels) {
  const AdapterProblem& p = block.p;
  const WideRows& o = p.dropout ? s.dropped : s.y;
  gemm<false>({s.a, s.narrow, panels + at.up, kPanel, at.bottleneck * kPanel, o.data, o.stride, kPanel}, block.count,
              at.channels, at.bottleneck, !p.dropout);
  if (!p.dropout) return;
  for (int64_t i = 0; i < block.count; ++i) {
    const DropoutRow random = dropout_of(p, block.row(i));
    const float* const branch = o.row(i);
    float* const y = s.y.row(i);
    for_vectors(at.channels, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      const Vec v = load(branch + c) + load(panels + at.b_up + c) * s.gate[i];
      store(y + c, load(y + c, lanes) + dropped(random, c, p.threshold, p.gain, v), lanes);
    });
  }
}

void load_gates(const Block& block, const Scratch& s) {
  const AdapterProblem& p = block.p;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t row = block.row(i);
    s.gate[i] = p.gate.data == nullptr ? 1.0f : element(p.gate, row / p.length, row % p.length);
  }
}

void load_norms(const AdapterProblem& p, const Scratch& s) {
  load_vector(s.weight, p.norm_weight, p.channels), load_vector(s.bias, p.norm_bias, p.channels);
  load_vector(s.out_weight, p.out_weight, p.channels), load_vector(s.out_bias, p.out_bias, p.channels);
}

template <class T>
void forward_of(const AdapterProblem& p, const AdapterPart& part, float* space) {
  Scratch s(p, space);
  const Panels at(p);
  const int64_t columns = p.channels, step = even_block(p, part);
  const bool normed = p.out_weight.data != nullptr, consecutive = p.are_consecutive(part.begin, part.end);
  const bool in_place = !normed && consecutive && p.sums_in_place();
  load_norms(p, s);
  for (int64_t begin = part.begin; begin < part.end; begin += step) {
    const Block block{p, begin, std::min(step, part.end - begin), consecutive};
    if (block.x_is_u()) s.u = block.in(p.x);
    if (in_place) s.y = block.in(p.out);
    load_gates(block, s);
    input_rows<T>(block, s, part.panels == nullptr || p.dropout ? nullptr : part.panels + at.b_up, true, false);
    if (part.panels != nullptr) {
      bottleneck(block, s, at, part.panels);
      add_branch(block, s, at, part.panels);
    } else if (p.saved != nullptr) {
      for (int64_t i = 0; i < block.count; ++i) std::fill_n(p.saved + block.row(i) * p.saved_row(), p.bottleneck, 0.0f);
    }
    for (int64_t i = 0; i < block.count && !in_place; ++i) {
      const int64_t row = block.row(i);
      const float* const y = s.y.row(i);
      T* const out = reinterpret_cast<T*>(p.out) + row * columns;
      if (!normed) {
        for_vectors(columns,
                    [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA { store(out + c, load(y + c, lanes), lanes); });
        continue;
      }
      float* const saved = p.saved != nullptr && p.saves_y() ? p.saved + row * p.saved_row() + p.bottleneck : nullptr;
      Sum total;
      for_vectors(columns, [&](int64_t c, int k, auto lanes) MMK_INLINE_LAMBDA {
        const Vec v = load(y + c, lanes);
        total.part[k] += v;
        if (saved != nullptr) store(saved + c, v, lanes);
      });
      const Statistics found = statistics_of(y, total.total(), columns, p.out_eps);
      p.out_mean[row] = found.mean, p.out_rstd[row] = found.rstd;
      for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
        const Vec normed = (load(y + c, lanes) - found.mean) * found.rstd;
        store(out + c, normed * load(s.out_weight + c) + load(s.out_bias + c), lanes);
      });
    }
  }
}

// --- Backward ------------------------------------------------------------------------------------------------------

// With g = dout weight and xhat = (v - mean) rstd:   put(c, rstd (g - avg(g) - xhat avg(g xhat)), lanes). g waits in
// `space`, which may be dout. Adds to the sums of the weight and of the bias, which may be null. `v_of(c, lanes)` is v.
template <class T, class F, class Put>
MMK_INLINE void norm_backward(const T* dout, const F& v_of, float mean, float rstd, const float* weight,
                              int64_t columns, float* space, float* sums, int64_t sums_row, const Put& put) {
  Sum first, second;
  for_vectors(columns, [&](int64_t c, int k, auto lanes) MMK_INLINE_LAMBDA {
    const Vec normed = (v_of(c, lanes) - mean) * rstd, incoming = load(dout + c, lanes);
    const Vec g = only(incoming * load(weight + c), lanes);
    first.part[k] += g;
    second.part[k] += only(g * normed, lanes);
    if (sums != nullptr) {
      store(sums + c, load(sums + c, lanes) + incoming * normed, lanes);
      store(sums + sums_row + c, load(sums + sums_row + c, lanes) + incoming, lanes);
    }
    // Rounded once: a product that went into a fused multiply-add would differ from what the average was taken of.
    store(space + c, g, lanes);
  });
  const float scale = 1.0f / static_cast<float>(columns), mean_g = first.total() * scale,
              mean_gx = second.total() * scale;
  for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
    const Vec normed = (v_of(c, lanes) - mean) * rstd;
    put(c, ((load(space + c, lanes) - mean_g) - normed * mean_gx) * rstd, lanes);
  });
}

// dy, and the gradient of o, which is dy but for dropout; their sums for the bias of the up-projection.
template <class T>
void output_rows(const Block& block, const Scratch& s, const AdapterSums& at, float* sums, bool branch) {
  const AdapterProblem& p = block.p;
  const int64_t columns = p.channels;
  const bool in_dout = block.dout_is_dy();
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t row = block.row(i);
    const T* dout = row_of<T>(p, p.dout, row, s.rows + 3 * s.wide);
    float* const dy = s.dy.row(i);
    T* const dresidual = p.dresidual == nullptr ? nullptr : reinterpret_cast<T*>(p.dresidual) + row * columns;
    float *const to = p.dropout ? s.dropped.row(i) : nullptr, *const db_up = sums + at.b_up, gate = s.gate[i];
    const bool wants_b_up = branch && p.wants_b_up;
    const DropoutRow random = p.dropout ? dropout_of(p, row) : DropoutRow{};
    const auto put = [&](int64_t c, Vec v, auto lanes) MMK_INLINE_LAMBDA {
      if (!in_dout) store(dy + c, v, lanes);
      if (dresidual != nullptr) store(dresidual + c, v, lanes);
      if (to != nullptr && branch) store(to + c, v = dropped(random, c, p.threshold, p.gain, v), lanes);
      if (wants_b_up) store(db_up + c, load(db_up + c, lanes) + v * gate, lanes);
    };
    if (p.out_weight.data != nullptr) {
      const float* const y = p.needs_y() ? s.y.row(i) : p.saved + row * p.saved_row() + p.bottleneck;
      norm_backward(
          dout, [&](int64_t c, auto lanes) MMK_INLINE_LAMBDA { return load(y + c, lanes); }, p.out_mean[row],
          p.out_rstd[row], s.out_weight, columns, dy, p.wants_out_norm ? sums + at.out_norm : nullptr, at.row, put);
    } else if (!in_dout || dresidual != nullptr || to != nullptr || wants_b_up) {
      for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA { put(c, load(dout + c, lanes), lanes); });
    }
  }
}

// dz, in place of da, and what has it: the gradients of the gate and of b_down.
void bottleneck_backward(const Block& block, const Scratch& s, const Panels& at, const float* panels,
                         const WideRows& gradient, float* db_down) {
  const AdapterProblem& p = block.p;
  gemm<false>(
      {gradient.data, gradient.stride, panels + at.up_back, kPanel, at.channels * kPanel, s.da, s.narrow, kPanel},
      block.count, at.bottleneck, at.channels, false);
  for (int64_t i = 0; i < block.count; ++i) {
    const float *const z = s.z + i * s.narrow, gate = s.gate[i];
    float* const da = s.da + i * s.narrow;
    if (p.dgate != nullptr) {
      const float* const of_row = gradient.row(i);
      Sum sum;
      for_vectors(at.bottleneck, [&](int64_t c, int k, auto lanes) MMK_INLINE_LAMBDA {
        sum.part[k] += only(load(da + c) * activated(p.activation, load(z + c)), lanes);
      });
      for_vectors(at.channels, [&](int64_t c, int k, auto lanes) MMK_INLINE_LAMBDA {
        sum.part[k] += only(load(of_row + c, lanes) * load(panels + at.b_up + c), lanes);
      });
      p.dgate[block.row(i)] = sum.total();
    }
    for_vectors(at.bottleneck, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      const Vec dz = load(da + c) * slope(p.activation, load(z + c)) * gate;
      store(da + c, dz);
      if (db_down != nullptr) store(db_down + c, load(db_down + c, lanes) + dz, lanes);
    });
  }
}

// ds from du, which lies in y, and the gradients of x and input_residual.
template <class T>
void sum_rows(const Block& block, const Scratch& s, const AdapterSums& at, float* sums) {
  const AdapterProblem& p = block.p;
  const int64_t columns = p.channels;
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t row = block.row(i);
    float* const du = s.y.row(i);
    const float* const dy = s.dy.row(i);
    const auto of = [&](char* result) {
      return result == nullptr ? nullptr : reinterpret_cast<T*>(result) + row * columns;
    };
    T *const dx = of(p.dx), *const dinput = of(p.dinput_residual);
    const bool x_again = p.skip & 1, input_again = p.skip & 2;
    const auto put = [&](int64_t c, Vec ds, auto lanes) MMK_INLINE_LAMBDA {
      if (dx != nullptr) store(dx + c, x_again ? ds + load(dy + c, lanes) : ds, lanes);
      if (dinput != nullptr) store(dinput + c, input_again ? ds + load(dy + c, lanes) : ds, lanes);
    };
    if (p.norm_weight.data != nullptr) {
      const T* x = row_of<T>(p, p.x, row, s.rows);
      const T* input = row_of<T>(p, p.input_residual, row, s.rows + s.wide);
      const auto s_of = [&](int64_t c, auto lanes) MMK_INLINE_LAMBDA {
        const Vec v = load(x + c, lanes);
        return input == nullptr ? v : v + load(input + c, lanes);
      };
      if (p.skip & 4)
        for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
          store(du + c, load(du + c, lanes) + load(dy + c, lanes), lanes);
        });
      norm_backward(du, s_of, p.mean[row], p.rstd[row], s.weight, columns, du, p.wants_norm ? sums + at.norm : nullptr,
                    at.row, put);
    } else {
      for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA { put(c, load(du + c, lanes), lanes); });
    }
  }
}

template <class T>
void backward_of(const AdapterProblem& p, const AdapterPart& part, const AdapterRows& rows, float* space) {
  Scratch s(p, space);
  const Panels at(p);
  const AdapterSums sums(p.channels, p.bottleneck);
  const float* const panels = part.panels;
  const int64_t columns = p.channels, step = even_block(p, part);
  const bool branch = panels != nullptr, out_norm = p.out_weight.data != nullptr;
  // Is y made again, from the bottleneck, and is that needed for anything else?
  const bool makes_y = out_norm && p.needs_y(), again = branch && (makes_y || p.wants_bottleneck() || p.wants_up);
  // du is summed where it is wanted if nothing is done to it.
  char* const result = p.norm_weight.data != nullptr || (p.dx != nullptr && p.dinput_residual != nullptr) ? nullptr
                       : p.dx != nullptr ? p.dx
                                         : p.dinput_residual;
  const bool consecutive = p.are_consecutive(part.begin, part.end);
  const bool in_place = result != nullptr && consecutive && p.sums_in_place(),
             add_dy = p.skip & (result == p.dx ? 1 : 2);
  load_norms(p, s);
  std::fill_n(part.rest, sums.rest, 0.0f);
  for (int64_t begin = part.begin; begin < part.end; begin += step) {
    const Block block{p, begin, std::min(step, part.end - begin), consecutive};
    const int64_t place = begin - rows.begin;
    if (rows.u.data != nullptr) s.u = rows.u.from(place);
    if (rows.gradient.data != nullptr) (p.dropout ? s.dropped : s.dy) = rows.gradient.from(place);
    if (block.x_is_u()) s.u = block.in(p.x);
    if (block.dout_is_dy()) s.dy = block.in(p.dout);
    if (rows.a != nullptr) s.a = rows.a + place * s.narrow;
    if (rows.dz != nullptr) s.da = rows.dz + place * s.narrow;
    load_gates(block, s);
    if ((again && (p.needs_hidden() || p.wants_down)) || makes_y)
      input_rows<T>(block, s, !branch || p.dropout ? nullptr : panels + at.b_up, makes_y, true);
    if (again) bottleneck(block, s, at, panels);
    if (branch && makes_y) add_branch(block, s, at, panels);
    output_rows<T>(block, s, sums, part.rest, branch);
    if (branch && p.wants_bottleneck())
      bottleneck_backward(block, s, at, panels, p.dropout ? s.dropped : s.dy,
                          p.wants_b_down ? part.rest + sums.b_down : nullptr);
    if (!p.wants_sum()) continue;
    const WideRows du = in_place ? block.in(result) : s.y;
    for (int64_t i = 0; i < block.count && (!branch || (in_place && add_dy)); ++i) {
      if (in_place && add_dy)
        std::copy_n(s.dy.row(i), columns, du.row(i));
      else
        std::fill_n(du.row(i), columns, 0.0f);
    }
    if (branch)
      gemm<false>({s.da, s.narrow, panels + at.down_back, kPanel, p.bottleneck * kPanel, du.data, du.stride, kPanel},
                  block.count, columns, p.bottleneck, in_place && add_dy);
    if (!in_place) sum_rows<T>(block, s, sums, part.rest);
  }
  if (!branch && p.dgate != nullptr)
    for (int64_t i = part.begin; i < part.end; ++i) p.dgate[p.order[i]] = 0.0f;
}

// --- Gradients of the weights --------------------------------------------------------------------------------------

constexpr int64_t kCopied = 96;  // columns

// panels (columns / kPanel, depth, kPanel) = rows from `from` on. Several at a time come from memory faster.
void copy_panels(const float* from, int64_t row, int64_t depth, int64_t columns, float* panels) {
  constexpr int64_t kRows = 4;
  for (int64_t i = 0; i < depth; i += kRows) {
    const int64_t rows = std::min(kRows, depth - i);
    int64_t c = 0;
    const auto copy = [&](int64_t r, auto lanes) MMK_INLINE_LAMBDA {
      store(panels + c / kPanel * depth * kPanel + (i + r) * kPanel + c % kPanel,
            load(from + (i + r) * row + c, lanes));
    };
    for (; c + kWidth <= columns; c += kWidth)
      if (rows == kRows)
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRows; ++r) copy(r, Whole{});
      else
        for (int64_t r = 0; r < rows; ++r) copy(r, Whole{});
    for (int64_t r = 0; c < columns && r < rows; ++r) copy(r, Rest{columns - c});
  }
}

// sums (r x columns) += narrow^T wide over the rows of a part. What rows of C elements leave far apart is copied
// together: read where it lies, once for every tile of the bottleneck, it would cost a page's address a row.
void product(const float* narrow, int64_t narrow_row, const float* wide, int64_t wide_row, int64_t rows,
             int64_t bottleneck, int64_t columns, float* sums, int64_t sums_row, bool accumulate) {
  alignas(64) float panels[kStretch * kCopied];
  const int64_t stretches = ceil_div(rows, kStretch);
  for (int64_t j = 0; j < columns; j += kCopied)
    for (int64_t s = 0; s < stretches; ++s) {
      const int64_t begin = s * rows / stretches, depth = (s + 1) * rows / stretches - begin;
      const int64_t width = std::min(kCopied, columns - j);
      copy_panels(wide + begin * wide_row + j, wide_row, depth, width, panels);
      gemm<true>({narrow + begin * narrow_row, narrow_row, panels, kPanel, depth * kPanel, sums + j, sums_row, kPanel},
                 bottleneck, width, depth, accumulate || s > 0);
    }
}

// Sums of a part after those of the one before it: the order is that of the rows, whoever takes which columns when.
void products(const AdapterProblem& p, const AdapterRows& rows, const AdapterPart* parts, int64_t count, int64_t first,
              int64_t last, bool accumulate, float* down, float* up) {
  const int64_t sums_row = AdapterSums(p.channels, p.bottleneck).row, narrow = padded_row(p.bottleneck);
  for (const AdapterPart* part = parts; part < parts + count; ++part, accumulate = true) {
    const int64_t depth = part->end - part->begin, place = part->begin - rows.begin;
    const Block all{p, part->begin, depth, p.are_consecutive(part->begin, part->end)};
    if (up != nullptr) {
      const WideRows gradient = all.dout_is_dy() && !p.dropout ? all.in(p.dout) : rows.gradient.from(place);
      product(rows.a + place * narrow, narrow, gradient.data + first, gradient.stride, depth, p.bottleneck,
              last - first, up + first, sums_row, accumulate);
    }
    if (down != nullptr) {
      const WideRows u = all.x_is_u() ? all.in(p.x) : rows.u.from(place);
      product(rows.dz + place * narrow, narrow, u.data + first, u.stride, depth, p.bottleneck, last - first,
              down + first, sums_row, accumulate);
    }
  }
}

template <class T>
void finish_of(const AdapterProblem& p, const AdapterGradient& g) {
  const AdapterSums at(p.channels, p.bottleneck);
  const AdapterWeights& w = g.weights;
  const int64_t r = p.bottleneck;
  const bool is_empty = g.count == 0;  // without rows there is no gradient, whatever the scale is
  const auto total = [&](int64_t place, auto lanes) MMK_INLINE_LAMBDA {
    Vec sum{};
    for (int64_t part = 0; part < g.count; ++part) sum += load(g.parts[part].rest + place, lanes);
    return sum;
  };
  const bool done = !is_empty && reinterpret_cast<const char*>(g.down) == g.ddown;
  for (int64_t i = 0; g.ddown != nullptr && !done && i < r; ++i) {
    T* const to = reinterpret_cast<T*>(g.ddown) + i * p.channels + g.first;
    const float* const sums = g.down + i * at.row + g.first;
    for_vectors(g.last - g.first, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      store(to + c, is_empty ? Vec{} : load(sums + c, lanes), lanes);
    });
  }
  for (int64_t first = g.first; first < g.last; first += kWidth) {
    const int64_t count = std::min<int64_t>(kWidth, g.last - first);
    float scales[kWidth], products[kWidth] = {};  // of the sums and the weight: what a factor on the weight has
    for (int64_t c = 0; c < count; ++c)
      scales[c] = is_empty ? 0.0f : w.factor * (w.scale.data == nullptr ? 1.0f : element(w.scale, 0, first + c));
    for (int64_t i = 0; (g.dup != nullptr || g.dscale != nullptr) && i < r; i += kPanel) {
      const int64_t width = std::min<int64_t>(kPanel, r - i);
      float sums[kWidth * kPanel] = {}, up[kPanel];
      if (!is_empty) load_tile(sums, kPanel, g.up + i * at.row + first, 1, at.row, kWidth, width, 1.0f);
      for (int64_t c = 0; c < count; ++c) {
        if (g.dup != nullptr) {
          T* const to = reinterpret_cast<T*>(g.dup) + (first + c) * r + i;
          for_vectors(width, [&](int64_t j, int, auto lanes)
                                 MMK_INLINE_LAMBDA { store(to + j, load(sums + c * kPanel + j) * scales[c], lanes); });
        }
        if (g.dscale == nullptr) continue;
        load_tile(up, kPanel, w.up.at(0, 0, first + c, i), w.up.dtype, 0, w.up.stride[3], 1, width);
        Sum product;
        for_vectors(round_up(width, kWidth), [&](int64_t j, int k, auto) MMK_INLINE_LAMBDA {
          product.part[k] += load(sums + c * kPanel + j) * load(up + j);
        });
        products[c] += product.total();
      }
    }
    if (g.db_up == nullptr && g.dscale == nullptr) continue;
    float db_up[kWidth];
    store(db_up, total(at.b_up + first, Whole{}));
    for (int64_t c = 0; c < count; ++c) {
      if (g.db_up != nullptr) g.db_up[first + c] = db_up[c] * scales[c];
      if (g.dscale == nullptr) continue;
      const float bias = w.b_up.data == nullptr ? 0.0f : db_up[c] * element(w.b_up, 0, first + c);
      g.dscale[first + c] = is_empty ? 0.0f : w.factor * (products[c] + bias);
    }
  }
  if (g.db_down != nullptr && g.first == 0)
    for_vectors(r, [&](int64_t i, int, auto lanes)
                       MMK_INLINE_LAMBDA { store(g.db_down + i, total(at.b_down + i, lanes), lanes); });
}

void forward(const AdapterProblem& p, const AdapterPart& part, float* space) {
  const DType dtype = p.x.dtype;
  (dtype == DType::kFloat32    ? forward_of<float>
   : dtype == DType::kBFloat16 ? forward_of<BFloat16>
                               : forward_of<Half>)(p, part, space);
}

void backward(const AdapterProblem& p, const AdapterPart& part, const AdapterRows& rows, float* space) {
  const DType dtype = p.x.dtype;
  (dtype == DType::kFloat32    ? backward_of<float>
   : dtype == DType::kBFloat16 ? backward_of<BFloat16>
                               : backward_of<Half>)(p, part, rows, space);
}

void finish(const AdapterProblem& p, const AdapterGradient& gradient) {
  const DType dtype = p.x.dtype;
  (dtype == DType::kFloat32    ? finish_of<float>
   : dtype == DType::kBFloat16 ? finish_of<BFloat16>
                               : finish_of<Half>)(p, gradient);
}

}  // namespace

extern const AdapterKernels adapter_kernels;
const AdapterKernels adapter_kernels = {panels_space, pack, space, forward, backward, products, finish};

}  // namespace mmk::MMK_ISA
