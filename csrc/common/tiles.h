// Strided arrays of any dtype in, dense float32 tiles in cache out, and back. A tile has rows of lanes: `lane` runs
// along the vector. Either dimension may be the contiguous one in memory; if none is, elements are gathered.
#pragma once
#include "common/cpu.h"
#include "common/simd.h"

namespace mmk::MMK_ISA {

// tile[r * ld + l] = scale * source[r * row_stride + l * lane_stride]; lanes up to the next multiple of kWidth become
// 0.
template <class T>
static void load_tile(float* tile, int64_t ld, const T* source, int64_t row_stride, int64_t lane_stride, int64_t rows,
                      int64_t lanes, float scale) {
  const int64_t padded = round_up(lanes, kWidth);
  int64_t first = 0;  // rows before it are done
  if (lane_stride == 1 || lanes == 1) {
    for (; first < rows; ++first) {
      const T* from = source + first * row_stride;
      float* to = tile + first * ld;
      int64_t l = 0;
      for (; l + kWidth <= lanes; l += kWidth) store(to + l, load(from + l) * scale);
      for (; l < lanes; ++l) to[l] = to_float(from[l]) * scale;
      for (; l < padded; ++l) to[l] = 0.0f;
    }
  } else if (row_stride == 1) {
    for (; first + kWidth <= rows; first += kWidth) {
      for (int64_t l = 0; l < padded; l += kWidth) {
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          if (l + i < lanes) {
            const T* from = source + first + (l + i) * lane_stride;
            __builtin_prefetch(from + 8 * kWidth);
            block[i] = load(from) * scale;
          } else {
            block[i] = Vec{};
          }
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) store(tile + (first + i) * ld + l, block[i]);
      }
    }
  }
  for (; first < rows; ++first)
    for (int64_t l = 0; l < padded; ++l)
      tile[first * ld + l] = l < lanes ? to_float(source[first * row_stride + l * lane_stride]) * scale : 0.0f;
}

// destination[r * row_stride + l * lane_stride] = tile[r * ld + l].
template <class T>
static void store_tile(T* destination, int64_t row_stride, int64_t lane_stride, const float* tile, int64_t ld,
                       int64_t rows, int64_t lanes) {
  int64_t first = 0;
  if (lane_stride == 1 || lanes == 1) {
    for (; first < rows; ++first) {
      const float* from = tile + first * ld;
      T* to = destination + first * row_stride;
      int64_t l = 0;
      for (; l + kWidth <= lanes; l += kWidth) store(to + l, load(from + l));
      for (; l < lanes; ++l) set(to + l, from[l]);
    }
  } else if (row_stride == 1) {
    for (; first + kWidth <= rows; first += kWidth) {
      for (int64_t l = 0; l < lanes; l += kWidth) {
        Vec block[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) block[i] = load(tile + (first + i) * ld + l);
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
          if (l + i < lanes) store(destination + first + (l + i) * lane_stride, block[i]);
      }
    }
  }
  for (; first < rows; ++first)
    for (int64_t l = 0; l < lanes; ++l) set(destination + first * row_stride + l * lane_stride, tile[first * ld + l]);
}

static void load_tile(float* tile, int64_t ld, const char* source, DType dtype, int64_t row_stride, int64_t lane_stride,
                      int64_t rows, int64_t lanes, float scale = 1.0f) {
  if (dtype == DType::kFloat32)
    load_tile(tile, ld, reinterpret_cast<const float*>(source), row_stride, lane_stride, rows, lanes, scale);
  else if (dtype == DType::kBFloat16)
    load_tile(tile, ld, reinterpret_cast<const BFloat16*>(source), row_stride, lane_stride, rows, lanes, scale);
  else
    load_tile(tile, ld, reinterpret_cast<const Half*>(source), row_stride, lane_stride, rows, lanes, scale);
}

[[maybe_unused]] static void store_tile(char* destination, DType dtype, int64_t row_stride, int64_t lane_stride,
                                        const float* tile, int64_t ld, int64_t rows, int64_t lanes) {
  if (dtype == DType::kFloat32)
    store_tile(reinterpret_cast<float*>(destination), row_stride, lane_stride, tile, ld, rows, lanes);
  else if (dtype == DType::kBFloat16)
    store_tile(reinterpret_cast<BFloat16*>(destination), row_stride, lane_stride, tile, ld, rows, lanes);
  else
    store_tile(reinterpret_cast<Half*>(destination), row_stride, lane_stride, tile, ld, rows, lanes);
}

}  // namespace mmk::MMK_ISA
