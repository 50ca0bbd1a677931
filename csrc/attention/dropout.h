// How a call's dropout becomes that of an Attention, for the families that are one.
#pragma once
#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "common/check.h"

namespace mmk {

inline void set_dropout(Attention& a, const std::optional<Tensor>& seed, double dropout_p) {
  STD_TORCH_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p is ", dropout_p, "; it must be in [0, 1)");
  if (dropout_p == 0.0) return;
  STD_TORCH_CHECK(seed.has_value(), "seed is None; with dropout_p > 0 it must be an int64 tensor of one element");
  check_dtype(*seed, "seed", ScalarType::Long);
  check_shape(*seed, "seed", {1});
  a.dropout = true;
  a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  a.drop_below = static_cast<uint32_t>(std::min(std::nearbyint(dropout_p * 0x1p32), 4294967295.0));
  a.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
}

}  // namespace mmk
