// Attention over adapters, compiled once per instruction set. What a row reads, A times C numbers, stays in cache.
#include <algorithm>
#include <cmath>

#include "adapter/fusion.h"
#include "common/dropout.h"
#include "common/rows.h"

namespace mmk::MMK_ISA {
namespace {

// Scratch: rows that are not dense, numbers of the adapters.
int64_t space(const AdapterFusion& f) {
  return (f.adapters + 2) * round_up(f.channels, 16) + 2 * round_up(f.adapters, 16);
}

template <class T>
struct Rows {
  const T *query, *dout;
  const T* const first;
  int64_t stride;  // of the outputs

  MMK_INLINE_LAMBDA inline const T* output(int64_t a) const { return first + a * stride; }

  Rows(const AdapterFusion& f, int64_t row, float* space)
      : query(one(f, f.query, row, space)),
        dout(f.dout.data == nullptr ? nullptr : one(f, f.dout, row, space + round_up(f.channels, 16))),
        first(outputs(f, row, space + 2 * round_up(f.channels, 16))) {}

 private:
  static const T* one(const AdapterFusion& f, const Strided& s, int64_t row, float* space) {
    return dense<T>(s.at(0, row / f.length, row % f.length), s.stride[3], f.channels, space);
  }

  const T* outputs(const AdapterFusion& f, int64_t row, float* space) {
    const Strided& s = f.outputs;
    const T* const from = reinterpret_cast<const T*>(s.at(row / f.length, row % f.length));
    stride = s.stride[2];
    if (s.stride[3] == 1 || f.channels == 1) return from;
    stride = round_up(f.channels, 16) * (sizeof(float) / sizeof(T));
    T* const to = reinterpret_cast<T*>(space);
    for (int64_t a = 0; a < f.adapters; ++a)
      for (int64_t c = 0; c < f.channels; ++c) to[a * stride + c] = from[a * s.stride[2] + c * s.stride[3]];
    return to;
  }
};

template <class T>
MMK_INLINE float dot(const T* a, const T* b, int64_t columns) {
  Sum sum;
  for_vectors(columns, [&](int64_t c, int k, auto lanes)
                           MMK_INLINE_LAMBDA { sum.part[k] += load(a + c, lanes) * load(b + c, lanes); });
  return sum.total();
}

// to = sum over a of factors[a] outputs[a]
template <class T>
MMK_INLINE void combine(T* to, const Rows<T>& rows, const float* factors, int64_t adapters, int64_t columns) {
  for_vectors(columns, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
    Vec sum{};
    for (int64_t a = 0; a < adapters; ++a) sum += load(rows.output(a) + c, lanes) * factors[a];
    store(to + c, sum, lanes);
  });
}

// What a row's scores are multiplied by: 0 where they are dropped.
struct Kept {
  const AdapterFusion& f;
  const DropoutRow words;

  Kept(const AdapterFusion& f, int64_t row)
      : f(f), words(f.dropout ? dropout_row(f.seed, static_cast<uint64_t>(row)) : DropoutRow{}) {}

  float operator()(int64_t a) const {
    if (!f.dropout) return 1.0f;
    return dropout_bits(words, static_cast<uint32_t>(a)) < f.threshold ? 0.0f : f.gain;
  }
};

template <class T>
void forward_of(const AdapterFusion& f, int64_t begin, int64_t end, float* space) {
  for (int64_t row = begin; row < end; ++row) {
    const Rows<T> rows(f, row, space);
    const Kept kept(f, row);
    float* const p = f.weights + row * f.adapters;
    float most = -__builtin_inff(), sum = 0.0f, offset = 0.0f;
    if (f.dropout && f.offset.data != nullptr)
      offset = to_float(*reinterpret_cast<const T*>(f.offset.at(0, 0, row / f.length, row % f.length)));
    for (int64_t a = 0; a < f.adapters; ++a) {
      const float factor = kept(a);
      p[a] = factor == 0.0f ? 0.0f : (dot(rows.query, rows.output(a), f.channels) + offset) * (factor * f.scale);
      most = p[a] > most ? p[a] : most;
    }
    for (int64_t a = 0; a < f.adapters; ++a) sum += p[a] = std::exp(p[a] - most);
    for (int64_t a = 0; a < f.adapters; ++a) p[a] /= sum;
    combine(reinterpret_cast<T*>(f.out) + row * f.channels, rows, p, f.adapters, f.channels);
  }
}

// dp_a = dout . u_a    ds_a = scale kept_a p_a (dp_a - sum p dp), 0 where the score is dropped
// dquery = sum ds_a u_a    du_a = p_a dout + ds_a query    doffset = sum ds_a
template <class T>
void backward_of(const AdapterFusion& f, int64_t begin, int64_t end, float* space) {
  float* const ds = space + (f.adapters + 2) * round_up(f.channels, 16);
  for (int64_t row = begin; row < end; ++row) {
    const Rows<T> rows(f, row, space);
    const Kept kept(f, row);
    const float* const p = f.weights + row * f.adapters;
    float mean = 0.0f, sum = 0.0f;
    for (int64_t a = 0; a < f.adapters; ++a) {
      ds[a] = dot(rows.dout, rows.output(a), f.channels);
      mean += p[a] * ds[a];
    }
    for (int64_t a = 0; a < f.adapters; ++a) {
      const float factor = kept(a);
      sum += ds[a] = factor == 0.0f ? 0.0f : factor * f.scale * (p[a] * (ds[a] - mean));
    }
    if (f.doffset != nullptr) set(reinterpret_cast<T*>(f.doffset) + row, sum);
    if (f.dquery != nullptr)
      combine(reinterpret_cast<T*>(f.dquery) + row * f.channels, rows, ds, f.adapters, f.channels);
    if (f.doutputs == nullptr) continue;
    T* const to = reinterpret_cast<T*>(f.doutputs) + row * f.adapters * f.channels;
    for (int64_t a = 0; a < f.adapters; ++a)
      for_vectors(f.channels, [&](int64_t c, int, auto lanes) MMK_INLINE_LAMBDA {
        store(to + a * f.channels + c, load(rows.dout + c, lanes) * p[a] + load(rows.query + c, lanes) * ds[a], lanes);
      });
  }
}

void forward(const AdapterFusion& f, int64_t begin, int64_t end, float* space) {
  const DType dtype = f.query.dtype;
  (dtype == DType::kFloat32    ? forward_of<float>
   : dtype == DType::kBFloat16 ? forward_of<BFloat16>
                               : forward_of<Half>)(f, begin, end, space);
}

void backward(const AdapterFusion& f, int64_t begin, int64_t end, float* space) {
  const DType dtype = f.query.dtype;
  (dtype == DType::kFloat32    ? backward_of<float>
   : dtype == DType::kBFloat16 ? backward_of<BFloat16>
                               : backward_of<Half>)(f, begin, end, space);
}

}  // namespace

extern const AdapterFusionKernels fusion_kernels;
const AdapterFusionKernels fusion_kernels = {space, forward, backward};

}  // namespace mmk::MMK_ISA
