#include "common/ptx.cuh"
#include "common/rows_cuda.h"

namespace mmk {
namespace {

constexpr int kSlices = 8;

// 32 columns a block; a warp adds every eighth part, and the first one what the warps have.
__global__ void sum_rows_kernel(const float* partial, float* out, int64_t parts, int64_t columns, const int64_t* index,
                                int64_t examples) {
  auto* sums = reinterpret_cast<float*>(shared_memory());
  const int64_t blocks = (columns + 31) / 32, group = blockIdx.x / blocks;
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32;
  const int64_t c = blockIdx.x % blocks * 32 + lane;
  float sum = 0.0f;
  const int64_t begin = index ? 0 : group * parts, end = index ? examples * parts : begin + parts;
  if (c < columns)
    for (int64_t p = begin + slice; p < end; p += kSlices)
      if (!index || index[p / parts] == group) sum += partial[p * columns + c];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (slice != 0 || c >= columns) return;
  sum = 0.0f;
  for (int s = 0; s < kSlices; ++s) sum += sums[s * 32 + lane];
  out[group * columns + c] = sum;
}

}  // namespace
}  // namespace mmk

int mmk_sum_rows(const float* partial, float* out, int64_t groups, int64_t parts, int64_t columns, const int64_t* index,
                 int64_t examples, void* stream) {
  const auto blocks = static_cast<unsigned>(groups * ((columns + 31) / 32));
  return mmk::launch(mmk::sum_rows_kernel, dim3(blocks), dim3(32 * mmk::kSlices), 32 * mmk::kSlices * 4, stream,
                     partial, out, parts, columns, index, examples);
}
