// What the binding of gelu(x + bias) tells the CUDA kernels.
#pragma once
#include "common/rows_cuda.h"

namespace mmk::activation {

struct Matrix {  // (rows, columns), strides in elements
  const void* data = nullptr;
  int64_t row = 0, column = 0;
  bool by_four = false;  // four neighbouring elements may come in one load
};

struct Gelu {
  int64_t rows, columns;
  Matrix x, dout;
  DeviceParameter bias;
  void* out;     // contiguous: the result, or dx (null: not wanted)
  float* sums;   // (parts, columns): of the gradient of bias; null: not wanted
  int64_t size;  // rows of a part
  bool tanh;
};

}  // namespace mmk::activation

extern "C" {
int mmk_gelu_forward(mmk::Dtype dtype, const mmk::activation::Gelu* gelu, void* stream);
int mmk_gelu_backward(mmk::Dtype dtype, const mmk::activation::Gelu* gelu, int64_t parts, void* stream);
}
