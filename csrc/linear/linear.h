// Matrix products on the CPU: what the binding tells the kernels of every instruction set.
#pragma once
#include "common/cpu.h"

namespace mmk {

// A part of C = A B + bias. The last two strides of `a` (rows x depth) and `b` (depth x columns) count.
struct Product {
  int64_t rows, columns, depth;
  Strided a, b;
  Strided c;                      // the part's first element; stride 1 along its rows
  Strided bias;                   // (columns), or data is null
  float* a_sums;                  // (rows): the sums of A's rows; null: not wanted
  const float* packed = nullptr;  // b for all parts of A's rows, from `pack`; null: each packs what it needs
};

struct LinearKernels {
  int64_t (*space)(const Product&);  // floats of scratch memory
  void (*multiply)(const Product&, float* space);
  int64_t (*packed_space)(const Product&);  // floats of `packed`
  void (*pack)(const Product&, int64_t first, int64_t last,
               float* packed);  // columns of b, multiples of 32 but the last
};

}  // namespace mmk
