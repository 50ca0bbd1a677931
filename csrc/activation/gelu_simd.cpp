// Rows of gelu(x + bias), compiled once per instruction set. Both forms are y times a probability, which comes from one
// exponential and is exact to the last places where it is small too: no 1 + tanh, no 1 + erf that would cancel.
#include "activation/gelu.h"
#include "common/rows.h"

namespace mmk::MMK_ISA {
namespace {

int64_t space(int64_t columns) { return 3 * round_up(columns, 16); }

// 1 + tanh(u) = 2 sigmoid(2u), with u = sqrt(2/pi) (y + 0.044715 y^3).
struct ByTanh {
  static constexpr float kLinear = 1.5957691216057308f, kCubic = kLinear * 0.044715f;  // of 2u

  MMK_INLINE_LAMBDA static inline Vec value(Vec y) { return y / (1.0f + exp(-y * (y * y * kCubic + kLinear))); }

  MMK_INLINE_LAMBDA static inline Vec slope(Vec y) {
    const Vec square = y * y, e = exp(-y * (square * kCubic + kLinear));
    const Vec sigmoid = 1.0f / (1.0f + e);
    // The slope of the sigmoid is below 1e-36 beyond 10, where its factors leave the range of float32; an infinity
    // gives NaN, as from any form of this.
    const Vec far = y * 0.0f, near = (e * sigmoid) * (y * sigmoid) * (square * (3.0f * kCubic) + kLinear);
    return sigmoid + (y * y > 100.0f ? far : near);
  }
};

// The normal distribution: of -|y| it is exp(-y^2/2) w(|y|) with w(t) = erfcx(t / sqrt 2) / 2, which is smooth. w is u
// times a polynomial of u = 1 / (1 + 0.4 t), fitted for t in [0, 14] to 1.5e-8 of w; beyond, the exponential is 0.
struct ByErf {
  struct Parts {
    Vec probability, density;
  };

  MMK_INLINE_LAMBDA static inline Parts parts(Vec y) {
    const Vec t = y > 0.0f ? y : -y, e = exp(y * y * -0.5f), u = 1.0f / (t * 0.4f + 1.0f);
    Vec w = u * 0.03210155f - 0.17619535f;
    w = w * u + 0.38083178f;
    w = w * u - 0.37203285f;
    w = w * u + 0.117794f;
    w = w * u - 0.02591531f;
    w = w * u + 0.09101176f;
    w = w * u + 0.13320881f;
    w = w * u + 0.15961935f;
    w = w * u + 0.1595763f;
    const Vec tail = e * (u * w);
    return {y > 0.0f ? 1.0f - tail : tail, e * 0.3989422804f};
  }

  MMK_INLINE_LAMBDA static inline Vec value(Vec y) { return y * parts(y).probability; }

  MMK_INLINE_LAMBDA static inline Vec slope(Vec y) {
    const Parts p = parts(y);
    return p.probability + y * p.density;
  }
};

template <class T>
const T* row_of(const Gelu& g, const Strided& s, int64_t r, float* space) {
  const int64_t k = r % g.sizes[2], j = r / g.sizes[2] % g.sizes[1], i = r / g.sizes[2] / g.sizes[1];
  return dense<T>(s.at(i, j, k), s.stride[3], g.columns, space);
}

template <class T, class Form>
void forward_rows(const Gelu& g, int64_t begin, int64_t end, float* space) {
  const int64_t size = round_up(g.columns, 16);
  const float* bias = Parameter(g.bias, g.columns, 0.0f, space).of(0);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row_of<T>(g, g.x, r, space + size);
    T* out = reinterpret_cast<T*>(g.out) + r * g.columns;
    for_vectors(g.columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      store(out + c, Form::value(load(x + c, lanes) + load(bias + c, lanes)), lanes);
    });
  }
}

template <class T, class Form>
void backward_rows(const Gelu& g, int64_t begin, int64_t end, float* sums, float* space) {
  const int64_t size = round_up(g.columns, 16);
  const float* bias = Parameter(g.bias, g.columns, 0.0f, space).of(0);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = row_of<T>(g, g.x, r, space + size);
    const T* dout = row_of<T>(g, g.dout, r, space + 2 * size);
    T* dx = g.out == nullptr ? nullptr : reinterpret_cast<T*>(g.out) + r * g.columns;
    for_vectors(g.columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      const Vec d = load(dout + c, lanes) * Form::slope(load(x + c, lanes) + load(bias + c, lanes));
      if (dx != nullptr) store(dx + c, d, lanes);
      if (sums != nullptr) store(sums + c, load(sums + c, lanes) + d, lanes);
    });
  }
}

template <class T>
void forward_of(const Gelu& g, int64_t begin, int64_t end, float* space) {
  (g.tanh ? forward_rows<T, ByTanh> : forward_rows<T, ByErf>)(g, begin, end, space);
}

template <class T>
void backward_of(const Gelu& g, int64_t begin, int64_t end, float* sums, float* space) {
  (g.tanh ? backward_rows<T, ByTanh> : backward_rows<T, ByErf>)(g, begin, end, sums, space);
}

void forward(const Gelu& g, int64_t begin, int64_t end, float* space) {
  (g.x.dtype == DType::kFloat32    ? forward_of<float>
   : g.x.dtype == DType::kBFloat16 ? forward_of<BFloat16>
                                   : forward_of<Half>)(g, begin, end, space);
}

void backward(const Gelu& g, int64_t begin, int64_t end, float* sums, float* space) {
  (g.x.dtype == DType::kFloat32    ? backward_of<float>
   : g.x.dtype == DType::kBFloat16 ? backward_of<BFloat16>
                                   : backward_of<Half>)(g, begin, end, sums, space);
}

}  // namespace

extern const GeluKernels gelu_kernels;
const GeluKernels gelu_kernels = {space, forward, backward};

}  // namespace mmk::MMK_ISA
