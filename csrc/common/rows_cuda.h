// What families of row kernels share: rows cut into parts that sum for themselves, and the addition of these sums.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/cuda_device.h"

namespace mmk {

enum class Dtype : int { fp32, bf16, fp16 };

// A parameter of a layer (example is 0) or of each example; strides in elements. data is null where there is none.
struct DeviceParameter {
  const void* data = nullptr;
  bool is_fp32 = false, by_four = false;
  int64_t example = 0, column = 0;
};

// `groups` equal groups of rows, each cut into `count` parts: as row_parts in mmkernels/ops/_shared/kernels.py.
struct DeviceRowParts {
  int64_t rows, groups, count, size;  // rows of a group; parts of a group; rows of a part

  DeviceRowParts(int64_t all, int64_t groups) : rows(all / groups), groups(groups) {
    const int64_t most = std::max<int64_t>(1, 2 * std::max(1, mmk_multiprocessors()) / groups);
    const int64_t wish = std::min(std::max<int64_t>(1, rows / 8), most);
    size = std::max<int64_t>(1, (rows + wish - 1) / wish);
    count = (rows + size - 1) / size;
  }
};

}  // namespace mmk

extern "C" {
// out[g][c] = sum of partial[(g parts + p) columns + c] over the parts p, in an order that never changes. With `index`
// there are `parts` of each of `examples`, and group g has those of the examples whose index is g.
int mmk_sum_rows(const float* partial, float* out, int64_t groups, int64_t parts, int64_t columns, const int64_t* index,
                 int64_t examples, void* stream);
}
