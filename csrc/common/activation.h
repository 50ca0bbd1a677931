// Activations by number, their slopes, and dropout by counter, a vector at a time.
#pragma once
#include "common/dropout.h"
#include "common/gelu.h"

namespace mmk::MMK_ISA {

// 0 none, 1 relu, 2 gelu by erf, 3 gelu by tanh, 4 swish, 5 leaky relu, 6 tanh.

constexpr float kLeak = 0.01f;

MMK_INLINE Vec magnitude(Vec x) { return x > 0.0f ? x : -x; }

// By the odd series below 1/2, where 1 - 2 / (1 + e^2x) would cancel.
MMK_INLINE Vec tanh(Vec x) {
  const Vec square = x * x;
  Vec series = square * 3.592128e-3f - 8.863235e-3f;
  series = series * square + 2.186949e-2f;
  series = series * square - 5.396825e-2f;
  series = series * square + 1.3333333e-1f;
  series = series * square - 3.3333333e-1f;
  series = x + x * square * series;
  const Vec whole = 1.0f - 2.0f / (1.0f + exp(x + x));
  return square < 0.25f ? series : whole;
}

MMK_INLINE Vec activated(int64_t kind, Vec x) {
  if (kind == 1) return x < 0.0f ? Vec{} : x;
  if (kind == 2) return ByErf::value(x);
  if (kind == 3) return ByTanh::value(x);
  if (kind == 4) return x / (1.0f + exp(-x));
  if (kind == 5) return x < 0.0f ? x * kLeak : x;
  return kind == 6 ? tanh(x) : x;
}

MMK_INLINE Vec slope(int64_t kind, Vec x) {
  if (kind == 1) return x <= 0.0f ? Vec{} : splat(1.0f);
  if (kind == 2) return ByErf::slope(x);
  if (kind == 3) return ByTanh::slope(x);
  if (kind == 4) {
    const Vec e = exp(-magnitude(x)), large = 1.0f / (1.0f + e), small = e * large;
    return (x > 0.0f ? large : small) + x * (large * small);
  }
  if (kind == 5) return x <= 0.0f ? splat(kLeak) : splat(1.0f);
  if (kind != 6) return splat(1.0f);
  const Vec e = exp(-2.0f * magnitude(x)), sum = 1.0f + e;
  return 4.0f * e / (sum * sum);
}

MMK_INLINE IntVec lanes_from(int64_t first) {
  IntVec lanes;
  for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<int32_t>(first) + i;
  return lanes;
}

// `v` times the gain where elements column to column + kWidth of a row survive, else 0.
MMK_INLINE Vec dropped(DropoutRow row, int64_t column, uint32_t threshold, float gain, Vec v) {
  const UintVec m = reinterpret_cast<UintVec>(lanes_from(column));
  return dropout_bits(UintVec{} + row.low, UintVec{} + row.high, m) < threshold ? Vec{} : v * gain;
}

}  // namespace mmk::MMK_ISA
