// Stands for the CPU kernels in the emulated module, which nobody calls there.
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace factorizer {

const CpuKernels& cpu_kernels() {
  static const CpuKernels none{
      "none: the emulated module holds the CUDA kernels alone",
      [](const SwinNMF&) { throw std::logic_error("no CPU kernels here"); },
      [](const SwinNMF&) { throw std::logic_error("no CPU kernels here"); },
      [](const Matricize&) { throw std::logic_error("no CPU kernels here"); },
      [](const Matricize&) { throw std::logic_error("no CPU kernels here"); },
  };
  return none;
}

void set_team_launcher(TeamLauncher) {}

}  // namespace factorizer
