// LayerNorm without gain and shift of single rows in cache, and its gradient.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>

#include "common/cpu.h"
#include "common/simd.h"

namespace mmk::MMK_ISA {

// Calls add(c, first, second) for the whole vectors below `end`; returns the sums of the two. There are four of each:
// in a single chain every addition would wait for the last one.
template <class F>
MMK_INLINE std::pair<float, float> two_sums(int64_t end, const F& add) {
  Vec first[4]{}, second[4]{};
  int64_t c = 0;
  for (; c + 4 * kWidth <= end; c += 4 * kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add(c + i * kWidth, first[i], second[i]);
  for (; c + kWidth <= end; c += kWidth) add(c, first[0], second[0]);
  return {sum((first[0] + first[1]) + (first[2] + first[3])), sum((second[0] + second[1]) + (second[2] + second[3]))};
}

struct Moments {
  float mean, variance = 0.0f;

  // Squares around a value that lies a standard deviation off the mean lose half of their precision. From there on they
  // are taken again, around the mean.
  Moments(const float* row, int64_t channels) : mean(channels < kWidth ? row[0] : sum(load(row)) / kWidth) {
    const float offset = refine(row, channels);
    if (offset * offset > variance) refine(row, channels);
  }

 private:
  // Takes both around `mean`, which becomes the mean; returns how far it was away.
  float refine(const float* row, int64_t channels) {
    const float origin = mean;
    auto [total, squares] = two_sums(channels, [&](int64_t c, Vec& total, Vec& squares) {
      const Vec x = load(row + c) - origin;
      total += x;
      squares += x * x;
    });
    for (int64_t c = channels / kWidth * kWidth; c < channels; ++c) {
      const float x = row[c] - origin;
      total += x;
      squares += x * x;
    }
    const float offset = total / channels;
    mean = origin + offset;
    variance = std::max(squares / channels - offset * offset, 0.0f);
    return offset;
  }
};

// to = (from - mean) / sqrt(variance + eps), which may be the same row; returns the factor. Lanes from `channels` to
// the next multiple of kWidth are read and become anything.
static float normalise(const float* from, float* to, int64_t channels, float eps) {
  const Moments moments(from, channels);
  const float mean = moments.mean, factor = 1.0f / std::sqrt(moments.variance + eps);
  for (int64_t c = 0; c < channels; c += kWidth) {
    __builtin_prefetch(from + channels + c);  // most likely the next row
    store(to + c, (load(from + c) - mean) * factor);
  }
  return factor;
}

// The gradient d of the normalised row xhat becomes that of the raw one in `to`, which may be d. Lanes of d and xhat
// beyond the channels are 0 before, those of `to` anything after.
static void normalise_gradient(const float* d, const float* xhat, float* to, int64_t channels, float factor) {
  const auto [total, product] = two_sums(round_up(channels, kWidth), [&](int64_t c, Vec& total, Vec& product) {
    total += load(d + c);
    product += load(d + c) * load(xhat + c);
  });
  const float mean = total / channels, slope = product / channels;
  for (int64_t c = 0; c < channels; c += kWidth) store(to + c, (load(d + c) - mean - load(xhat + c) * slope) * factor);
}

}  // namespace mmk::MMK_ISA
