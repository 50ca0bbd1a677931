// LayerNorm with its residual addition on the CPU: what the binding tells the kernels of every instruction set.
#pragma once
#include "common/cpu.h"

namespace mmk {

// Rows are numbered over (batch, length): row r is (r / length, r % length). Tensors (B, T, C) use the last three
// strides of a Strided, parameters the last two, of which the first is 0 where all examples share them.
struct Norm {
  int64_t batch, length, columns;
  int64_t first;  // how many rows of an example lie in x[0]; the others are those of x[1]
  float eps;
  Strided x[2];                                 // forward: the rows; backward: what was normalised
  Strided residual, residual_bias, gain, bias;  // data is null for what is absent
  const int64_t* index;                         // of every example its row of gain and bias; null: its own number
  char *out, *sum;                              // contiguous, of x's dtype
  float *mean, *rstd;
  Strided dout, dsum;
  char* dx;         // contiguous, of x's dtype; null: not wanted
  bool wants_rows;  // dx, or its sum over rows, which is the gradient of the residual's bias

  int64_t parameter_row(int64_t example) const { return index == nullptr ? example : index[example]; }
};

struct NormKernels {
  int64_t (*space)(int64_t columns);  // floats of scratch memory
  void (*forward)(const Norm&, int64_t begin, int64_t end, float* space);
  // Adds to `sums`, three rows of `columns` floats: gradients of gain, of bias, of the residual's bias. Null: none is
  // wanted.
  void (*backward)(const Norm&, int64_t begin, int64_t end, float* sums, float* space);
};

}  // namespace mmk
