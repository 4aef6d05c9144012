// Which of the instruction sets that kernels are compiled for a processor has. The processor itself is asked:
// Clang 14's __builtin_cpu_supports knows no F16C, and on Windows it needs Clang's runtime library.
#pragma once

#ifdef __x86_64__
#include <cpuid.h>
#endif

namespace factorizer {

#ifdef __x86_64__
// Whether the system keeps the registers whose bits in XCR0 these are.
inline bool keeps_registers(unsigned wanted) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & wanted) == wanted;
}

// Whether leaf 7 of cpuid has these bits in ebx.
inline bool has_extended(unsigned wanted) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & wanted) == wanted;
}

inline bool has_avx2() {
  constexpr unsigned wanted = bit_AVX | bit_FMA | bit_F16C;
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & wanted) == wanted && has_extended(bit_AVX2) &&
         keeps_registers(0x06);  // the halves of ymm
}

inline bool has_avx512() {
  return has_avx2() && has_extended(bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL) &&
         keeps_registers(0xe6);  // masks, the halves of zmm, zmm16 to zmm31
}
#else
inline bool has_avx2() { return false; }
inline bool has_avx512() { return false; }
#endif

}  // namespace factorizer
