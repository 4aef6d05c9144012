#include "cpu/common/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cpu/common/isa.h"

namespace factorizer {

#define FK_DECLARE(name, Problem) void name(const Problem&);
#define FK_NAME(name, Problem) name,
#define FK_SET(ISA)                                            \
  namespace ISA {                                              \
  FK_CPU_KERNELS(FK_DECLARE)                                   \
  constexpr CpuKernels kernels{#ISA, FK_CPU_KERNELS(FK_NAME)}; \
  }

#ifdef FK_HAVE_BASELINE
FK_SET(baseline)
#endif
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

bool wanted(const char* isa) {
  const char* name = std::getenv("FACTORIZER_KERNELS_ISA");
  return name == nullptr || *name == '\0' || std::strcmp(name, isa) == 0;
}

const CpuKernels* choose() {
#ifdef FK_HAVE_AVX512
  if (wanted("avx512") && has_avx512()) return &avx512::kernels;
#endif
#ifdef FK_HAVE_AVX2
  if (wanted("avx2") && has_avx2()) return &avx2::kernels;
#endif
#ifdef FK_HAVE_BASELINE
  if (wanted("baseline")) return &baseline::kernels;
#endif
  return nullptr;
}

const CpuKernels* chosen() {
  static const CpuKernels* const kernels = choose();
  return kernels;
}

}  // namespace

const char* compiled_isas() {
  return ""
#ifdef FK_HAVE_BASELINE
         "baseline,"
#endif
#ifdef FK_HAVE_AVX2
         "avx2,"
#endif
#ifdef FK_HAVE_AVX512
         "avx512,"
#endif
      ;
}

const char* cpu_isa() { return chosen() ? chosen()->isa : nullptr; }

const CpuKernels& cpu_kernels() {
  if (!chosen()) throw std::runtime_error("the module was compiled for other processors than this one");
  return *chosen();
}

}  // namespace factorizer
