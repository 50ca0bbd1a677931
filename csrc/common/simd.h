// Vectors of the instruction set that a *_simd.cpp file is compiled for, by GCC's and Clang's vector extensions.
// Everything lives in a namespace of that set: the same names exist once per set in one library.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

#define MMK_INLINE static inline __attribute__((always_inline))

namespace mmk::MMK_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kWidth)));
using IntVec = int32_t __attribute__((vector_size(4 * kWidth)));
using UintVec = uint32_t __attribute__((vector_size(4 * kWidth)));
using ShortVec = uint16_t __attribute__((vector_size(2 * kWidth)));

MMK_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would have to turn -0 into 0

MMK_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

MMK_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// e^x to about 1e-7 relative; 0 below -87.3 (where the result would be subnormal), inf above 88.7, NaN stays NaN.
MMK_INLINE Vec exp(Vec x) {
  const Vec input = x;
  x = x > 89.0f ? splat(89.0f) : x;
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are round(x / ln 2)
  const Vec n = shifted - 12582912.0f;
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.0f);
  y = y * reinterpret_cast<Vec>(exponent);
  return input < -87.3f ? Vec{} : y;
}

// --- 16-bit floats -------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

MMK_INLINE ShortVec load_bits(const void* p) {
  ShortVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

MMK_INLINE Vec widen(BFloat16, ShortVec bits) {
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, UintVec) << 16);
}

MMK_INLINE ShortVec narrow(BFloat16, Vec v) {
  const UintVec u = reinterpret_cast<UintVec>(v);
  const UintVec rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  return __builtin_convertvector(v != v ? UintVec{} + 0x7FC0 : rounded, ShortVec);
}

#if defined(__AVX512F__)
MMK_INLINE Vec widen(Half, ShortVec bits) { return (Vec)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)bits); }
MMK_INLINE ShortVec narrow(Half, Vec v) {
  return (ShortVec)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
MMK_INLINE Vec widen(Half, ShortVec bits) { return (Vec)_mm256_cvtph_ps((__m128i)bits); }
MMK_INLINE ShortVec narrow(Half, Vec v) { return (ShortVec)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
MMK_INLINE Vec widen(Half, ShortVec bits) {
  const UintVec h = __builtin_convertvector(bits, UintVec), magnitude = (h & 0x7FFF) << 13;
  // The exponents differ by 112: multiplying also normalises the subnormal ones.
  const UintVec finite = reinterpret_cast<UintVec>(reinterpret_cast<Vec>(magnitude) * 0x1p112f);
  const UintVec value = magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : finite;
  return reinterpret_cast<Vec>(value | (h & 0x8000) << 16);
}

MMK_INLINE ShortVec narrow(Half, Vec v) {
  const UintVec bits = reinterpret_cast<UintVec>(v), sign = bits & 0x80000000u, u = bits ^ sign;
  const UintVec special = u > 0x7F800000u ? UintVec{} + 0x7E00 : UintVec{} + 0x7C00;
  // Subnormal results: adding 0.5 makes the processor round at the right bit.
  const UintVec subnormal = reinterpret_cast<UintVec>(reinterpret_cast<Vec>(u) + 0.5f) - 0x3F000000;
  const UintVec normal = (u - (112u << 23) + 0xFFF + ((u >> 13) & 1)) >> 13;
  const UintVec finite = u < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector((u >= 0x47800000u ? special : finite) | sign >> 16, ShortVec);
}
#endif

MMK_INLINE Vec load(const BFloat16* p) { return widen(BFloat16{}, load_bits(p)); }
MMK_INLINE Vec load(const Half* p) { return widen(Half{}, load_bits(p)); }

template <class T>
MMK_INLINE void store(T* p, Vec v) {
  const ShortVec bits = narrow(T{}, v);
  std::memcpy(p, &bits, sizeof(bits));
}

MMK_INLINE float to_float(float x) { return x; }

template <class T>
MMK_INLINE float to_float(T x) {
  return widen(T{}, ShortVec{} + x.bits)[0];
}

MMK_INLINE void set(float* p, float x) { *p = x; }

template <class T>
MMK_INLINE void set(T* p, float x) {
  p->bits = narrow(T{}, splat(x))[0];
}

// --- Transposition of kWidth vectors -------------------------------------------------------------------------------

// Lane j is lane from[j] of the 2 kWidth lanes of a and b.
MMK_INLINE Vec shuffle(Vec a, Vec b, IntVec from) {
#ifdef __clang__
  Vec result;
  for (int j = 0; j < kWidth; ++j) result[j] = from[j] < kWidth ? a[from[j]] : b[from[j] - kWidth];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Combines all lanes by halves: a chain of log2(kWidth) steps.
template <int kStep = kWidth / 2, class F>
MMK_INLINE float across(Vec v, F combine) {
  IntVec from;
  for (int j = 0; j < kWidth; ++j) from[j] = (j + kStep) % kWidth;
  v = combine(v, shuffle(v, v, from));
  if constexpr (kStep > 1) return across<kStep / 2>(v, combine);
  return v[0];
}

MMK_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
MMK_INLINE float sum(Vec v) {
  return across(v, [](Vec a, Vec b) { return a + b; });
}
MMK_INLINE float largest(Vec v) { return across(v, larger); }

template <int kStep>
MMK_INLINE void transpose_step(Vec (&rows)[kWidth]) {
  IntVec low, high;
  for (int j = 0; j < kWidth; ++j) {
    low[j] = j & kStep ? kWidth + j - kStep : j;
    high[j] = j & kStep ? kWidth + j : j + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & kStep) continue;
    const Vec a = rows[i], b = rows[i + kStep];
    rows[i] = shuffle(a, b, low);
    rows[i + kStep] = shuffle(a, b, high);
  }
  if constexpr (kStep > 1) transpose_step<kStep / 2>(rows);
}

MMK_INLINE void transpose(Vec (&rows)[kWidth]) { transpose_step<kWidth / 2>(rows); }

// Lane j is the sum of rows[j].
template <int kStep = kWidth / 2>
MMK_INLINE Vec sums(Vec (&rows)[kWidth]) {
  IntVec own, other;  // one of the two is a blend, which costs next to nothing
  for (int j = 0; j < kWidth; ++j) {
    own[j] = j & kStep ? kWidth + j : j;
    other[j] = j & kStep ? kWidth + j - kStep : j + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStep; ++i)
    rows[i] = shuffle(rows[i], rows[i + kStep], own) + shuffle(rows[i], rows[i + kStep], other);
  if constexpr (kStep > 1) return sums<kStep / 2>(rows);
  return rows[0];
}

}  // namespace mmk::MMK_ISA
