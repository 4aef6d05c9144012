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

// The instruction set of the kernels in use: the best of those compiled that the processor has, or, where it
// is among them, the one of FACTORIZER_KERNELS_ISA in the environment. Null: there is none.
const char* cpu_isa();

// Those compiled, a comma after each.
const char* compiled_isas();

// The kernels in use; throws std::runtime_error where there are none.
const CpuKernels& cpu_kernels();

}  // namespace factorizer
