// Stands for the CPU kernels in the emulated module, which nobody calls there.
#include <stdexcept>

#include "cpu/common/dispatch.h"
#include "cpu/common/parallel.h"

namespace factorizer {

const CpuKernels& cpu_kernels() {
#define FK_NONE(name, Problem) [](const Problem&) { throw std::logic_error("no CPU kernels here"); },
  static const CpuKernels none{"none: the emulated module holds the CUDA kernels alone",
                               FK_CPU_KERNELS(FK_NONE)};
#undef FK_NONE
  return none;
}
const char* cpu_isa() { return cpu_kernels().isa; }
const char* compiled_isas() { return ""; }

void set_team_launcher(TeamLauncher) {}

}  // namespace factorizer
