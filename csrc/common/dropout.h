// Dropout by counter. The same arithmetic as mmkernels/ops/_shared/dropout.py, which explains it.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MMK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMK_HOST_DEVICE inline
#endif

namespace mmk {

struct DropoutRow {
  uint32_t low, high;
};

MMK_HOST_DEVICE DropoutRow dropout_row(uint64_t seed, uint64_t row) {
  uint64_t z = seed + (row + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

// U: uint32_t, or a vector of it.
template <class U>
MMK_HOST_DEVICE U mix32(U u) {
  u = (u ^ (u >> 16)) * 0x7FEB352Du;
  u = (u ^ (u >> 15)) * 0x846CA68Bu;
  return u ^ (u >> 16);
}

// 32 random bits of key m in a row; the element is dropped when they are below the threshold.
template <class U>
MMK_HOST_DEVICE U dropout_bits(U low, U high, U m) {
  return mix32(mix32(low ^ (m * 0x9E3779B1u)) + high);
}
MMK_HOST_DEVICE uint32_t dropout_bits(DropoutRow row, uint32_t m) { return dropout_bits(row.low, row.high, m); }

}  // namespace mmk
