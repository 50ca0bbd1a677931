// What the binding of LayerNorm tells the CUDA kernels. Plain data: the binding is compiled without CUDA headers, the
// kernels without torch's.
#pragma once
#include "common/rows_cuda.h"

namespace mmk::norm {

constexpr int kMostColumns = 8192;  // a block holds a row in its registers

struct Rows {  // (B, T, C), strides in elements
  const void* data = nullptr;
  int64_t example = 0, row = 0, column = 0;
  bool by_four = false;  // four neighbouring elements may come in one load
};

struct Norm {
  int64_t rows, length;  // rows are numbered over (B, length)
  int64_t first;         // of an example's rows those before it are x[0]'s
  int columns;
  float eps;
  Rows x[2];  // forward: the rows; backward: what was normalised
  Rows residual, dout, dsum;
  DeviceParameter residual_bias, gain, bias;
  const int64_t* index = nullptr;  // of every example its row of gain and bias; null: its own number
  void *out, *sum, *dx;            // contiguous
  float *mean, *rstd;
  float* sums[3];                   // (parts, C): of the gradients of gain, bias, residual's bias; null: not wanted
  int64_t group_rows, parts, size;  // rows of a group, its parts, rows of a part
};

}  // namespace mmk::norm

extern "C" {
int mmk_norm_forward(mmk::Dtype dtype, const mmk::norm::Norm* norm, void* stream);
int mmk_norm_backward(mmk::Dtype dtype, const mmk::norm::Norm* norm, int64_t parts, void* stream);
}
