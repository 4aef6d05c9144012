#include "dispatch.h"

#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace factorizer {
namespace {

#define FK_KERNELS(ISA) \
  CpuKernels { #ISA, ISA::swin_nmf_forward, ISA::swin_nmf_backward, ISA::sw_matricize, ISA::sw_dematricize }

bool allowed(const char* isa) {
  const char* wanted = std::getenv("FACTORIZER_KERNELS_ISA");
  return wanted == nullptr || std::strcmp(wanted, isa) == 0;
}

CpuKernels choose() {
#ifdef FK_HAVE_AVX512
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return FK_KERNELS(avx512);
  }
#endif
#ifdef FK_HAVE_AVX2
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return FK_KERNELS(avx2);
  }
#endif
  return FK_KERNELS(baseline);
}

#undef FK_KERNELS

}  // namespace

const CpuKernels& cpu_kernels() {
  static const CpuKernels kernels = choose();
  return kernels;
}

}  // namespace factorizer
