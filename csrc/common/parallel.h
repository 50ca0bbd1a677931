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

}  // namespace mmk
