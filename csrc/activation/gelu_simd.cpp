// Rows of gelu(x + bias), compiled once per instruction set.
#include "activation/gelu.h"
#include "common/gelu.h"
#include "common/rows.h"

namespace mmk::MMK_ISA {
namespace {

int64_t space(int64_t columns) { return 3 * round_up(columns, 16); }

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
