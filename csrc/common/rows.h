// Rows of any length, walked by vectors: whole ones, and a last one of which only some lanes count.
#pragma once
#include "common/cpu.h"
#include "common/simd.h"

namespace mmk::MMK_ISA {

#define MMK_INLINE_LAMBDA __attribute__((always_inline))

// Which lanes of a vector lie in the row.
struct Whole {};
struct Rest {
  int64_t lanes;
};

template <class T>
MMK_INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
MMK_INLINE Vec load(const T* p, Rest rest) {
  T lanes[kWidth] = {};
  for (int64_t i = 0; i < rest.lanes; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
MMK_INLINE void store(T* p, Vec v, Whole) {
  store(p, v);
}
template <class T>
MMK_INLINE void store(T* p, Vec v, Rest rest) {
  T lanes[kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < rest.lanes; ++i) p[i] = lanes[i];
}

// v with zeros outside of the row.
MMK_INLINE Vec only(Vec v, Whole) { return v; }
MMK_INLINE Vec only(Vec v, Rest rest) {
  IntVec lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(rest.lanes) ? v : Vec{};
}

// A sum of which four vectors are under way at a time: an addition takes as many cycles.
struct Sum {
  Vec part[4] = {};
  MMK_INLINE_LAMBDA inline float total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

// f(column, place, lanes) for every vector of a row; `place`, 0 to 3, is the part of a Sum to add to.
template <class F>
MMK_INLINE void for_vectors(int64_t columns, const F& f) {
  int64_t c = 0;
  for (; c + 4 * kWidth <= columns; c += 4 * kWidth) {
    f(c, 0, Whole{});
    f(c + kWidth, 1, Whole{});
    f(c + 2 * kWidth, 2, Whole{});
    f(c + 3 * kWidth, 3, Whole{});
  }
  for (; c + kWidth <= columns; c += kWidth) f(c, 0, Whole{});
  if (c < columns) f(c, 0, Rest{columns - c});
}

// A row with stride 1: where it lies, or copied to `space`, which has room for as many elements.
template <class T>
MMK_INLINE const T* dense(const char* row, int64_t stride, int64_t columns, float* space) {
  const T* from = reinterpret_cast<const T*>(row);
  if (stride == 1 || columns == 1) return from;
  T* to = reinterpret_cast<T*>(space);
  for (int64_t c = 0; c < columns; ++c) to[c] = from[c * stride];
  return to;
}

// A parameter as a row of float32, of all examples or of each of them; `fill` stands where there is none. For examples
// in their order: the row is prepared when the example changes.
class Parameter {
 public:
  Parameter(const Strided& s, int64_t columns, float fill, float* space) : s_(s), columns_(columns), space_(space) {
    if (s.data != nullptr) return;
    for (int64_t c = 0; c < columns; ++c) space[c] = fill;
    row_ = space;
  }

  MMK_INLINE_LAMBDA inline const float* of(int64_t example) {
    if (s_.data != nullptr && (row_ == nullptr || (example != example_ && s_.stride[2] != 0))) prepare(example);
    return row_;
  }

 private:
  void prepare(int64_t example) {
    char* from = s_.at(0, 0, example, 0);
    example_ = example;
    row_ = space_;
    if (s_.dtype == DType::kFloat32)
      row_ = dense<float>(from, s_.stride[3], columns_, space_);
    else if (s_.dtype == DType::kBFloat16)
      widen(reinterpret_cast<const BFloat16*>(from));
    else
      widen(reinterpret_cast<const Half*>(from));
  }

  template <class T>
  void widen(const T* from) {
    for (int64_t c = 0; c < columns_; ++c) space_[c] = to_float(from[c * s_.stride[3]]);
  }

  const Strided& s_;
  const int64_t columns_;
  float* space_;
  const float* row_ = nullptr;
  int64_t example_ = -1;
};

}  // namespace mmk::MMK_ISA
