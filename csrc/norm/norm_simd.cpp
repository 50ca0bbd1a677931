// Rows of LayerNorm, compiled once per instruction set. A row is read once from memory: what follows finds it in cache.
#include <cmath>

#include "common/rows.h"
#include "norm/norm.h"

namespace mmk::MMK_ISA {
namespace {

int64_t row_floats(int64_t columns) { return round_up(columns, 16); }
int64_t space(int64_t columns) { return 6 * row_floats(columns); }

const char* row_of(const Norm& n, int64_t example, int64_t t) {
  return t < n.first ? n.x[0].at(0, example, t) : n.x[1].at(0, example, t - n.first);
}
int64_t step_of(const Norm& n, int64_t t) { return n.x[t < n.first ? 0 : 1].stride[3]; }

// As T holds it: what is normalised is the sum that the backward finds. A row whose values differ by less than they are
// rounded by would otherwise get gradients of any size.
template <class T>
MMK_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == sizeof(float))
    return v;
  else
    return widen(T{}, narrow(T{}, v));
}

template <class T, bool kResidual>
void forward_rows(const Norm& n, int64_t begin, int64_t end, float* space) {
  const int64_t columns = n.columns, size = row_floats(columns);
  // The sum in float32. Without a residual, float32 rows are read where they are.
  float* const wide = space;
  Parameter gains(n.gain, columns, 1.0f, space + size), biases(n.bias, columns, 0.0f, space + 2 * size);
  Parameter residual_biases(n.residual_bias, columns, 0.0f, space + 3 * size);
  const float scale = 1.0f / static_cast<float>(columns);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t example = r / n.length, t = r % n.length;
    const int64_t own = n.parameter_row(example);
    const float *gain = gains.of(own), *bias = biases.of(own);
    const T* x = dense<T>(row_of(n, example, t), step_of(n, t), columns, space + 4 * size);
    T* out = reinterpret_cast<T*>(n.out) + r * columns;
    Sum total;
    const float* v = wide;
    if constexpr (kResidual) {
      const T* residual = dense<T>(n.residual.at(0, example, t), n.residual.stride[3], columns, space + 5 * size);
      const float* residual_bias = residual_biases.of(example);
      T* sum = reinterpret_cast<T*>(n.sum) + r * columns;
      for_vectors(columns, [&](int64_t c, int i, auto lanes) MMK_INLINE_LAMBDA {
        const Vec s = rounded<T>(load(x + c, lanes) + (load(residual + c, lanes) + load(residual_bias + c, lanes)));
        total.part[i] += s;
        store(wide + c, s, lanes);
        store(sum + c, s, lanes);
      });
    } else {
      if constexpr (sizeof(T) == sizeof(float)) v = reinterpret_cast<const float*>(x);
      for_vectors(columns, [&](int64_t c, int i, auto lanes) MMK_INLINE_LAMBDA {
        const Vec s = load(x + c, lanes);
        total.part[i] += s;
        if constexpr (sizeof(T) < sizeof(float)) store(wide + c, s, lanes);
      });
    }
    const float mean = total.total() * scale;
    Sum squares;
    for_vectors(columns, [&](int64_t c, int i, auto lanes) MMK_INLINE_LAMBDA {
      const Vec d = only(load(v + c, lanes) - mean, lanes);
      squares.part[i] += d * d;
    });
    const float rstd = 1.0f / std::sqrt(squares.total() * scale + n.eps);
    for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      const Vec normed = (load(v + c, lanes) - mean) * rstd;
      store(out + c, normed * load(gain + c, lanes) + load(bias + c, lanes), lanes);
    });
    n.mean[r] = mean;
    n.rstd[r] = rstd;
  }
}

// With g = dout gain and xhat = (s - mean) rstd:   ds = dsum + rstd (g - avg(g) - xhat avg(g xhat))
template <class T, bool kSum, bool kParameters>
void backward_rows(const Norm& n, int64_t begin, int64_t end, float* sums, float* space) {
  const int64_t columns = n.columns, size = row_floats(columns);
  Parameter gains(n.gain, columns, 1.0f, space);
  // g, rounded once: a product that went into a fused multiply-add would differ from what the average was taken of, and
  // rows of one value would get gradients.
  float* const gradient = space + 4 * size;
  const float scale = 1.0f / static_cast<float>(columns);
  float *dgain = sums, *dbias = sums + columns, *dresidual_bias = sums + 2 * columns;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t example = r / n.length, t = r % n.length;
    const float* gain = gains.of(n.parameter_row(example));
    const T* s = dense<T>(row_of(n, example, t), step_of(n, t), columns, space + size);
    const T* dout = dense<T>(n.dout.at(0, example, t), n.dout.stride[3], columns, space + 2 * size);
    const T* dsum = nullptr;
    if constexpr (kSum) dsum = dense<T>(n.dsum.at(0, example, t), n.dsum.stride[3], columns, space + 3 * size);
    const float mean = n.mean[r], rstd = n.rstd[r];
    Sum first, second;
    for_vectors(columns, [&](int64_t c, int i, auto lanes) MMK_INLINE_LAMBDA {
      const Vec normed = (load(s + c, lanes) - mean) * rstd, incoming = load(dout + c, lanes);
      const Vec g = incoming * load(gain + c, lanes);
      first.part[i] += g;
      second.part[i] += only(g * normed, lanes);
      store(gradient + c, g, lanes);
      if constexpr (kParameters) {
        store(dgain + c, load(dgain + c, lanes) + incoming * normed, lanes);
        store(dbias + c, load(dbias + c, lanes) + incoming, lanes);
      }
    });
    if (!n.wants_rows) continue;
    const float mean_g = first.total() * scale, mean_gx = second.total() * scale;
    T* dx = n.dx == nullptr ? nullptr : reinterpret_cast<T*>(n.dx) + r * columns;
    for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
      const Vec normed = (load(s + c, lanes) - mean) * rstd;
      Vec ds = ((load(gradient + c, lanes) - mean_g) - normed * mean_gx) * rstd;
      if constexpr (kSum) ds += load(dsum + c, lanes);
      if (dx != nullptr) store(dx + c, ds, lanes);
      if constexpr (kParameters) store(dresidual_bias + c, load(dresidual_bias + c, lanes) + ds, lanes);
    });
  }
}

template <class T>
void forward_of(const Norm& n, int64_t begin, int64_t end, float* space) {
  n.residual.data == nullptr ? forward_rows<T, false>(n, begin, end, space)
                             : forward_rows<T, true>(n, begin, end, space);
}

template <class T>
void backward_of(const Norm& n, int64_t begin, int64_t end, float* sums, float* space) {
  if (n.dsum.data == nullptr)
    sums == nullptr ? backward_rows<T, false, false>(n, begin, end, sums, space)
                    : backward_rows<T, false, true>(n, begin, end, sums, space);
  else
    sums == nullptr ? backward_rows<T, true, false>(n, begin, end, sums, space)
                    : backward_rows<T, true, true>(n, begin, end, sums, space);
}

void forward(const Norm& n, int64_t begin, int64_t end, float* space) {
  const DType dtype = n.x[0].dtype;
  (dtype == DType::kFloat32    ? forward_of<float>
   : dtype == DType::kBFloat16 ? forward_of<BFloat16>
                               : forward_of<Half>)(n, begin, end, space);
}

void backward(const Norm& n, int64_t begin, int64_t end, float* sums, float* space) {
  const DType dtype = n.x[0].dtype;
  (dtype == DType::kFloat32    ? backward_of<float>
   : dtype == DType::kBFloat16 ? backward_of<BFloat16>
                               : backward_of<Half>)(n, begin, end, sums, space);
}

}  // namespace

extern const NormKernels norm_kernels;
const NormKernels norm_kernels = {space, forward, backward};

}  // namespace mmk::MMK_ISA
