// Adapters on the CPU: what the binding tells the kernels of every instruction set.
#pragma once
#include "common/cpu.h"

namespace mmk {

// Rows are numbered over (batch, length). Tensors (B,T,C) use the last three strides of a Strided, parameters the last;
// data is null for what is absent. csrc/schemas.h has the mathematics.
struct AdapterProblem {
  int64_t rows, length, channels, bottleneck;
  Strided x, input_residual, residual;
  Strided norm_weight, norm_bias, out_weight, out_bias;
  Strided gate;          // (B,T): the last two strides
  const int64_t* order;  // the rows by their adapters; null: as they come
  int64_t skip, activation;
  float eps, out_eps;
  bool dropout;
  uint64_t seed;
  uint32_t threshold;
  float gain;
  float *mean, *rstd, *out_mean, *out_rstd;  // (rows)
  float* saved;  // z and, with a norm of float32 results, y, that the forward leaves to the backward; or null
  char* out;     // contiguous, of x's dtype
  // Of the backward: null, or false, where not wanted. Gradients of rows are contiguous, of x's dtype.
  Strided dout;
  char *dx, *dinput_residual, *dresidual;
  float* dgate;  // (rows)
  bool wants_down, wants_b_down, wants_up, wants_b_up, wants_norm, wants_out_norm;

  bool is_backward() const { return dout.data != nullptr; }
  bool wants_sum() const { return dx != nullptr || dinput_residual != nullptr || wants_norm; }
  bool wants_bottleneck() const { return wants_sum() || wants_down || wants_b_down || dgate != nullptr; }
  bool saves_y() const { return out_weight.data != nullptr && x.dtype == DType::kFloat32; }
  int64_t saved_row() const { return bottleneck + (saves_y() ? channels : 0); }
  bool needs_hidden() const { return saved == nullptr || !is_backward(); }  // is z computed, or read?
  bool needs_y() const { return !is_backward() || (out_weight.data != nullptr && !(saved != nullptr && saves_y())); }

  int64_t row(int64_t i) const { return order == nullptr ? i : order[i]; }
  // Do rows order[begin] to order[end], which ascend within an adapter, lie one behind the other?
  bool are_consecutive(int64_t begin, int64_t end) const { return row(end - 1) - row(begin) == end - 1 - begin; }
  // Do the rows of `s` lie as products take them, float32 and evenly?
  bool is_even(const Strided& s) const {
    return s.dtype == DType::kFloat32 && s.stride[3] == 1 &&
           (length == 1 || length == rows || s.stride[1] == length * s.stride[2]);
  }
  int64_t row_stride(const Strided& s) const { return s.stride[length == 1 ? 1 : 2]; }
  bool x_is_u() const { return norm_weight.data == nullptr && input_residual.data == nullptr && is_even(x); }
  bool dout_is_dy() const { return out_weight.data == nullptr && is_even(dout); }
  // Can a product be summed in a result of x's size? It writes whole vectors.
  bool sums_in_place() const { return x.dtype == DType::kFloat32 && channels % 16 == 0; }
};

// One adapter; the last two strides of the weights count.
struct AdapterWeights {
  Strided down, b_down, up, b_up;
  Strided scale;  // stride 0 where channels share it
  float factor;
};

// Rows order[begin] to order[end] with one adapter, and what the backward sums over them.
struct AdapterPart {
  int64_t begin, end;
  int64_t adapter;      // -1: none
  const float* panels;  // its packed weights; null where there is none
  float* rest;          // AdapterSums has its size
};

// Rows of C elements, evenly spaced. Null: not wanted.
struct WideRows {
  float* data;
  int64_t stride;

  float* row(int64_t i) const { return data + i * stride; }
  WideRows from(int64_t i) const { return {data == nullptr ? nullptr : row(i), stride}; }
};

// What the rows of some parts, from order[begin] on, leave to the products that sum over them: u and the gradient of o,
// where they are not the rows of x and dout themselves, and a and dz (rows, r), in rows of padded length.
struct AdapterRows {
  int64_t begin;
  WideRows u, gradient;
  float *a, *dz;
};

// Sums of an adapter: of the products that make the gradients of `down` and of `up`, the latter transposed, (r, C)
// both, whose rows end at whole vectors of any instruction set, and, of a part, of the biases and norms. The product
// for `down` may lie in the gradient's own memory.
struct AdapterSums {
  int64_t row, size;                               // length of a row, size of a product
  int64_t b_up = 0, b_down, norm, out_norm, rest;  // places in `rest`; of a norm the weight, then the bias

  AdapterSums(int64_t channels, int64_t bottleneck)
      : row(round_up(channels, 16)),
        size(bottleneck * row),
        b_down(row),
        norm(b_down + round_up(bottleneck, 16)),
        out_norm(norm + 2 * row),
        rest(out_norm + 2 * row) {}
};

// What has been summed of one adapter becomes gradients: columns `first` to `last`. Null: not wanted.
struct AdapterGradient {
  AdapterWeights weights;
  const AdapterPart* parts;
  int64_t count, first, last;
  const float *down, *up;           // the products' sums, if there are parts
  char *ddown, *dup;                // contiguous, of x's dtype
  float *db_down, *db_up, *dscale;  // dscale: (C)
};

struct AdapterKernels {
  int64_t (*panels_space)(const AdapterProblem&);
  void (*pack)(const AdapterProblem&, const AdapterWeights&, float* panels);
  int64_t (*space)(const AdapterProblem&);
  void (*forward)(const AdapterProblem&, const AdapterPart&, float* space);
  void (*backward)(const AdapterProblem&, const AdapterPart&, const AdapterRows&, float* space);
  // Adds the products of `count` parts of one adapter to its sums (null: not wanted), columns `first` to `last` of C.
  void (*products)(const AdapterProblem&, const AdapterRows&, const AdapterPart* parts, int64_t count, int64_t first,
                   int64_t last, bool accumulate, float* down, float* up);
  void (*finish)(const AdapterProblem&, const AdapterGradient&);
};

}  // namespace mmk
