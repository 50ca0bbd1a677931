// What the binding of AdapterFusion's attention tells the CUDA kernels. Plain data: the binding is compiled without
// CUDA headers, the kernels without torch's.
#pragma once
#include "common/rows_cuda.h"

namespace mmk::adapter {

constexpr int kMostFused = 4096;  // adapters: the backward has two numbers of each in shared memory

// (B, T, C), (B, T, A, C) or (B, T); strides in elements. Columns lie one after another, and where C has a multiple of
// 16 bytes all rows begin at one.
struct FusedRows {
  const void* data = nullptr;
  int64_t example = 0, row = 0, adapter = 0;
};

struct Fusion {
  int64_t rows, length;  // rows are numbered over (B, T)
  int adapters, channels;
  float scale;
  FusedRows query, outputs, offset, dout;
  const int64_t* seed = nullptr;  // null: no dropout
  uint32_t threshold;
  float gain;      // of what is not dropped
  float* weights;  // contiguous, like the results: (B, T, A)
  void* out;
  void *dquery, *doutputs, *doffset;  // null: not wanted
};

}  // namespace mmk::adapter

extern "C" {
int mmk_adapter_fusion_forward(mmk::Dtype dtype, const mmk::adapter::Fusion* fusion, void* stream);
int mmk_adapter_fusion_backward(mmk::Dtype dtype, const mmk::adapter::Fusion* fusion, void* stream);
}
