// LayerNorm without gain and shift of single rows in cache, and its gradient.
#pragma once
#include <cmath>

#include "common/simd.h"

namespace mmk::MMK_ISA {

// (row - mean) / sqrt(variance + eps) in place, returns the factor. The variance is taken around the mean just
// computed: nothing cancels. Lanes from `channels` to the next multiple of kWidth are 0 before and after.
static float normalise(float* row, int64_t channels, float eps) {
  Vec total{};
  for (int64_t c = 0; c < channels; c += kWidth) total += load(row + c);
  const float mean = sum(total) / channels;
  Vec squares{};
  int64_t c = 0;
  for (; c + kWidth <= channels; c += kWidth) {
    const Vec centred = load(row + c) - mean;
    squares += centred * centred;
    store(row + c, centred);
  }
  float rest = 0;
  for (; c < channels; ++c) {
    row[c] -= mean;
    rest += row[c] * row[c];
  }
  const float factor = 1.0f / std::sqrt((sum(squares) + rest) / channels + eps);
  for (c = 0; c < channels; c += kWidth) store(row + c, load(row + c) * factor);
  return factor;
}

// The gradient d of the normalised row xhat becomes that of the raw one. Lanes of d beyond the channels are 0 before
// and anything after.
static void normalise_gradient(float* d, const float* xhat, int64_t channels, float factor) {
  Vec total{}, product{};
  for (int64_t c = 0; c < channels; c += kWidth) {
    total += load(d + c);
    product += load(d + c) * load(xhat + c);
  }
  const float mean = sum(total) / channels, slope = sum(product) / channels;
  for (int64_t c = 0; c < channels; c += kWidth) store(d + c, (load(d + c) - mean - load(xhat + c) * slope) * factor);
}

}  // namespace mmk::MMK_ISA
