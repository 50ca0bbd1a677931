// GELU and its slope, by tanh and by erf. Both forms are y times a probability, which comes from one exponential and is
// exact to the last places where it is small too: no 1 + tanh, no 1 + erf that would cancel.
#pragma once
#include "common/simd.h"

namespace mmk::MMK_ISA {

// 1 + tanh(u) = 2 sigmoid(2u), with u = sqrt(2/pi) (y + 0.044715 y^3).
struct ByTanh {
  static constexpr float kLinear = 1.5957691216057308f, kCubic = kLinear * 0.044715f;  // of 2u

  MMK_INLINE Vec value(Vec y) { return y / (1.0f + exp(-y * (y * y * kCubic + kLinear))); }

  MMK_INLINE Vec slope(Vec y) {
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

  MMK_INLINE Parts parts(Vec y) {
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

  MMK_INLINE Vec value(Vec y) { return y * parts(y).probability; }

  MMK_INLINE Vec slope(Vec y) {
    const Parts p = parts(y);
    return p.probability + y * p.density;
  }
};

}  // namespace mmk::MMK_ISA
