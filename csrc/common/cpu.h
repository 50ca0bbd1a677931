// What the CPU kernels of all instruction sets and their callers share: strided arrays, sizes. No torch here.
#pragma once
#include <unistd.h>

#include <cstdint>
#include <utility>

namespace mmk {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// An array of up to 4 dimensions with strides in elements; unused dimensions come first and have stride 0.
struct Strided {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};

  int64_t item_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
  char* at(int64_t i, int64_t j, int64_t k = 0, int64_t l = 0) const {
    return data + (i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3]) * item_bytes();
  }
};

// The same array with its last two dimensions exchanged.
inline Strided transposed(Strided s) {
  std::swap(s.stride[2], s.stride[3]);
  return s;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Row length in floats for `columns` of them: whole panels of up to 32, and an odd number of cache lines, so that rows
// of one column do not compete for the same cache set.
inline int64_t padded_row(int64_t columns) { return round_up(columns, 32) + 16; }

// Bytes of a core's second cache level; where the system does not say, what most have.
inline int64_t second_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return 1 << 20;
}

}  // namespace mmk
