// gelu(x + bias) on the CPU: what the binding tells the kernels of every instruction set.
#pragma once
#include "common/cpu.h"

namespace mmk {

struct Gelu {
  int64_t rows, columns;
  int64_t sizes[3];  // of the dimensions over which rows are numbered
  bool tanh;
  Strided x, bias, dout;  // data is null for what is absent
  char* out;              // contiguous, of x's dtype: the result, or dx; null: not wanted
};

struct GeluKernels {
  int64_t (*space)(int64_t columns);  // floats of scratch memory
  void (*forward)(const Gelu&, int64_t begin, int64_t end, float* space);
  // Adds to `sums`, `columns` floats, the gradient of the bias; null: not wanted.
  void (*backward)(const Gelu&, int64_t begin, int64_t end, float* sums, float* space);
};

}  // namespace mmk
