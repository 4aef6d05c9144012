// The kernels' entry points, one set for each instruction set that they are compiled for.
#pragma once

#include <type_traits>

#include "problem.h"

namespace factorizer {

#define FK_DECLARE_KERNELS(ISA)           \
  namespace ISA {                         \
  void swin_nmf_forward(const SwinNMF&);  \
  void swin_nmf_backward(const SwinNMF&); \
  void sw_matricize(const Matricize&);    \
  void sw_dematricize(const Matricize&);  \
  }

FK_DECLARE_KERNELS(baseline)
FK_DECLARE_KERNELS(avx2)
FK_DECLARE_KERNELS(avx512)
#undef FK_DECLARE_KERNELS

}  // namespace factorizer
