// Work over torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "common/cpu.h"

namespace mmk {

// Waking threads costs as much as this many operations of one.
inline int64_t threads_for(double operations) { return operations < 2e6 ? 1 : torch::stable::get_num_threads(); }

// Calls f(part, worker) for every part; workers take the next part when they are free.
template <class F>
void for_parts(int64_t parts, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t part; (part = next++) < parts;) f(part, worker);
  };
  if (std::min(threads, parts) <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, std::min(threads, parts), 1, work);
}

// What to cut a product of so many rows and columns into: several parts for a thread where there is enough, so that one
// that is slowed down does not hold up the others. The columns are cut first: A is copied for every part of them, B,
// which often has to be transposed, for every one of the rows.
struct ProductCut {
  int64_t rows, columns;

  ProductCut(int64_t whole_rows, int64_t whole_columns, int64_t most_columns, int64_t threads) {
    int64_t by_row = ceil_div(whole_rows, 2048), by_column = ceil_div(whole_columns, most_columns);
    while (by_row * by_column < 4 * threads) {
      if (whole_columns / (by_column + 1) >= 192)
        ++by_column;
      else if (whole_rows / (by_row + 1) >= 384)
        ++by_row;
      else
        break;
    }
    rows = round_up(ceil_div(whole_rows, by_row), 12), columns = round_up(ceil_div(whole_columns, by_column), 32);
  }
};

}  // namespace mmk
