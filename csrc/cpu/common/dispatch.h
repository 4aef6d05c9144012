// The CPU kernels for the processor that runs this: chosen once, when first used.
#pragma once

#include "cpu/common/kernels.def"

namespace factorizer {

#define FK_PROBLEM(name, Problem) struct Problem;
FK_CPU_KERNELS(FK_PROBLEM)
#undef FK_PROBLEM

struct CpuKernels {
  const char* isa;
#define FK_POINTER(name, Problem) void (*name)(const Problem&);
  FK_CPU_KERNELS(FK_POINTER)
#undef FK_POINTER
};

// FACTORIZER_KERNELS_ISA=baseline|avx2|avx512 in the environment asks for less than the processor has.
const CpuKernels& cpu_kernels();

}  // namespace factorizer
