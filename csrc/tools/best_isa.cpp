// Prints the best instruction set of this machine: what CMake compiles the kernels for.
#include <cstdio>

#include "cpu/common/isa.h"

int main() {
  std::puts(factorizer::has_avx512() ? "avx512" : factorizer::has_avx2() ? "avx2" : "baseline");
  return 0;
}
