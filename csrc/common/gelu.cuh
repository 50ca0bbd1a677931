// GELU and its derivative, by erf or by tanh; the formulas are those of activation/gelu_simd.cpp.
#pragma once
#include <cmath>

#include "common/ptx.cuh"

namespace mmk {

constexpr float kGeluLinear = 1.5957691216057308f,
                kGeluCubic = kGeluLinear * 0.044715f;  // of 2 sqrt(2/pi) (y + 0.044715 y^3)

constexpr float kNormalDensity = 0.3989422804f;  // at 0

// The normal distribution at y, where e = exp(-y^2/2).
__device__ __forceinline__ float normal_probability(float y, float e) {
  const float u = 1.0f / (fabsf(y) * 0.4f + 1.0f);
  float w = u * 0.03210155f - 0.17619535f;
  w = w * u + 0.38083178f;
  w = w * u - 0.37203285f;
  w = w * u + 0.117794f;
  w = w * u - 0.02591531f;
  w = w * u + 0.09101176f;
  w = w * u + 0.13320881f;
  w = w * u + 0.15961935f;
  w = w * u + 0.1595763f;
  const float tail = e * (u * w);
  return y > 0.0f ? 1.0f - tail : tail;
}

template <bool kTanh>
__device__ __forceinline__ float gelu(float y) {
  if constexpr (kTanh) return y / (1.0f + expf(-y * (y * y * kGeluCubic + kGeluLinear)));
  return y * normal_probability(y, expf(y * y * -0.5f));
}

template <bool kTanh>
__device__ __forceinline__ float gelu_slope(float y) {
  const float square = y * y;
  if constexpr (kTanh) {
    const float e = expf(-y * (square * kGeluCubic + kGeluLinear)), sigmoid = 1.0f / (1.0f + e);
    const float near = (e * sigmoid) * (y * sigmoid) * (square * (3.0f * kGeluCubic) + kGeluLinear);
    return sigmoid + (square > 100.0f ? y * 0.0f : near);
  }
  const float e = expf(square * -0.5f);
  return normal_probability(y, e) + y * (e * kNormalDensity);
}

}  // namespace mmk
