// Which instruction set the CPU kernels use. Files named *_simd.cpp are compiled once per set (MMK_ISA = base, v3, v4:
// the levels of the x86-64 psABI, AVX2 with FMA and AVX-512); other processors have only `base`.
#pragma once
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace mmk {

enum class Isa { kBase, kV3, kV4 };

inline const char* isa_name(Isa isa) { return isa == Isa::kV4 ? "v4" : isa == Isa::kV3 ? "v3" : "base"; }

// The widest set that this processor and its operating system support.
inline Isa supported_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
    return Isa::kBase;
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::kV4 : Isa::kV3;
#else
  return Isa::kBase;
#endif
}

// Who made the processor: "amd", "intel" or "".
inline const char* cpu_vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "";
}

// The set in use: the supported one, or a narrower one that MMKERNELS_CPU_ISA names. Read once per process.
inline Isa chosen_isa() {
  static const Isa chosen = [] {
    const Isa best = supported_isa();
    const char* wish = std::getenv("MMKERNELS_CPU_ISA");
    if (wish == nullptr) return best;
    for (Isa isa : {Isa::kBase, Isa::kV3, Isa::kV4})
      if (std::strcmp(wish, isa_name(isa)) == 0 && isa <= best) return isa;
    return best;
  }();
  return chosen;
}

}  // namespace mmk

// In namespace mmk: declares the table of kernels `table` that a *_simd.cpp file defines for every instruction set, and
// `function()`, which is the one of the set in use.
#if defined(__x86_64__)
#define MMK_KERNELS_IN_USE(Type, table, function)     \
  namespace base {                                    \
  extern const Type table;                            \
  }                                                   \
  namespace v3 {                                      \
  extern const Type table;                            \
  }                                                   \
  namespace v4 {                                      \
  extern const Type table;                            \
  }                                                   \
  static const Type& function() {                     \
    const Isa isa = chosen_isa();                     \
    if (isa == Isa::kV4) return v4::table;            \
    return isa == Isa::kV3 ? v3::table : base::table; \
  }
#else
#define MMK_KERNELS_IN_USE(Type, table, function) \
  namespace base {                                \
  extern const Type table;                        \
  }                                               \
  static const Type& function() { return base::table; }
#endif
