#include <cuda_runtime.h>

#include "cuda/common/target.h"

namespace factorizer {
namespace cuda {

std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  return {driver, runtime};
}

}  // namespace cuda
}  // namespace factorizer
