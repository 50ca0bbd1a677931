// Into how many parts the keys are split. The same function as mmkernels/ops/_shared/waves.py, which explains the
// model. `merge`: what a split costs at the end.
#pragma once
#include <algorithm>
#include <cstdint>

namespace mmk {

inline int64_t split_keys(int64_t tiles, int64_t blocks, int64_t slots, double merge = 0.25) {
  constexpr double kStart = 2.0;
  constexpr int64_t kMaxSplits = 256;
  auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t best = 1;
  double best_cost = -1;
  for (int64_t splits = 1; splits <= std::max<int64_t>(1, std::min(blocks, kMaxSplits)); ++splits) {
    const int64_t steps = ceil_div(blocks, splits);
    if (steps > 0 && ceil_div(blocks, steps) != splits) continue;
    const double cost =
        static_cast<double>(ceil_div(tiles * splits, slots)) * (steps + kStart) + (splits > 1 ? merge * splits : 0.0);
    if (best_cost < 0 || cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

}  // namespace mmk
