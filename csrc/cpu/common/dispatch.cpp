#include "cpu/common/dispatch.h"

#include <cstdlib>
#include <cstring>

namespace factorizer {

#define FK_DECLARE(name, Problem) void name(const Problem&);
#define FK_NAME(name, Problem) name,
#define FK_SET(ISA)                                            \
  namespace ISA {                                              \
  FK_CPU_KERNELS(FK_DECLARE)                                   \
  constexpr CpuKernels kernels{#ISA, FK_CPU_KERNELS(FK_NAME)}; \
  }

FK_SET(baseline)
#ifdef FK_HAVE_AVX2
FK_SET(avx2)
#endif
#ifdef FK_HAVE_AVX512
FK_SET(avx512)
#endif
#undef FK_DECLARE
#undef FK_NAME
#undef FK_SET

namespace {

bool allowed(const char* isa) {
  const char* wanted = std::getenv("FACTORIZER_KERNELS_ISA");
  return wanted == nullptr || std::strcmp(wanted, isa) == 0;
}

const CpuKernels& choose() {
#ifdef FK_HAVE_AVX512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::kernels;
  }
#endif
#ifdef FK_HAVE_AVX2
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return avx2::kernels;
  }
#endif
  return baseline::kernels;
}

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = choose();
  return kernels;
}

}  // namespace factorizer
