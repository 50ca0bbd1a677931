// Sums over rows that repeat to the bit whatever the number of threads is: parts of rows that depend on the sizes
// alone, each with sums of its own, which are added in order.
#pragma once
#include <algorithm>

#include "common/check.h"
#include "common/parallel.h"

namespace mmk {

// `rows` rows in `groups` equal groups, each of which is cut into parts.
struct RowParts {
  int64_t rows, groups, per_group, size;  // parts of a group, rows of a part

  RowParts(int64_t rows, int64_t groups) : rows(groups == 0 ? 0 : rows / groups), groups(groups) {
    // Sums of 32 rows and more are little beside the rows; 64 parts occupy as many threads.
    const int64_t most = std::max<int64_t>(64 / std::max<int64_t>(groups, 1), 1);
    size = std::max<int64_t>(ceil_div(this->rows, std::clamp<int64_t>(this->rows / 32, 1, most)), 1);
    per_group = ceil_div(this->rows, size);
  }

  int64_t count() const { return groups * per_group; }
  int64_t begin(int64_t part) const { return part / per_group * rows + part % per_group * size; }
  int64_t end(int64_t part) const { return std::min(begin(part) + size, (part / per_group + 1) * rows); }
};

// out[group][c] = sum over the parts of a group of sums[part * stride + c], first part first. With `index` parts are
// those of each of `examples`, and a group has the examples whose index it is.
inline void add_parts(float* out, const float* sums, int64_t groups, int64_t per_group, int64_t stride, int64_t columns,
                      int64_t threads, const int64_t* index = nullptr, int64_t examples = 0) {
  constexpr int64_t kColumns = 256;
  const int64_t chunks = ceil_div(columns, kColumns);
  for_parts(groups * chunks, threads, [&](int64_t i, int64_t) {
    const int64_t group = i / chunks, first = i % chunks * kColumns, count = std::min(kColumns, columns - first);
    float* to = out + group * columns + first;
    std::fill_n(to, count, 0.0f);
    const int64_t begin = index == nullptr ? group : 0, end = index == nullptr ? group + 1 : examples;
    for (int64_t example = begin; example < end; ++example) {
      if (index != nullptr && index[example] != group) continue;
      for (int64_t part = 0; part < per_group; ++part) {
        const float* from = sums + (example * per_group + part) * stride + first;
        for (int64_t c = 0; c < count; ++c) to[c] += from[c];
      }
    }
  });
}

}  // namespace mmk
