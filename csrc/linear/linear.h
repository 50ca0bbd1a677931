// Matrix products on the CPU: what the binding tells the kernels of every instruction set.
#pragma once
#include "common/cpu.h"

namespace mmk {

// A part of C = A B + bias. The last two strides of `a` (rows x depth) and `b` (depth x columns) count.
struct Product {
  int64_t rows, columns, depth;
  Strided a, b;
  Strided c;      // the part's first element; stride 1 along its rows
  Strided bias;   // (columns), or data is null
  float* a_sums;  // (rows): the sums of A's rows; null: not wanted
};

struct LinearKernels {
  int64_t (*space)(int64_t rows, int64_t columns);  // floats of scratch memory
  void (*multiply)(const Product&, float* space);
};

}  // namespace mmk
