// AdapterFusion's attention over the outputs of adapters on the CPU.
#pragma once
#include "common/cpu.h"

namespace mmk {

// Rows are numbered over (batch, length); arrays of rows use the last three strides of a Strided, `outputs` (B,T,A,C)
// all.
struct AdapterFusion {
  int64_t length, adapters, channels;
  float scale;
  bool dropout;
  uint64_t seed;
  uint32_t threshold;
  float gain;                            // of what is not dropped
  Strided query, outputs, dout, offset;  // offset: by its last two strides
  char* out;                             // contiguous, like the gradients
  float* weights;                        // (rows, A)
  char *dquery, *doutputs, *doffset;     // null: not wanted
};

struct AdapterFusionKernels {
  int64_t (*space)(const AdapterFusion&);
  void (*forward)(const AdapterFusion&, int64_t begin, int64_t end, float* space);
  void (*backward)(const AdapterFusion&, int64_t begin, int64_t end, float* space);
};

}  // namespace mmk
