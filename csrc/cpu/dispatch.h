// The CPU kernels for the processor that runs this: chosen once, when first used.
#pragma once

#include "problem.h"

namespace factorizer {

struct CpuKernels {
  const char* isa;
  void (*swin_nmf_forward)(const SwinNMF&);
  void (*swin_nmf_backward)(const SwinNMF&);
  void (*sw_matricize)(const Matricize&);
  void (*sw_dematricize)(const Matricize&);
};

// FACTORIZER_KERNELS_ISA=baseline|avx2|avx512 in the environment asks for less than the processor has.
const CpuKernels& cpu_kernels();

}  // namespace factorizer
