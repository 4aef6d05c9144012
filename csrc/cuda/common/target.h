// Where CUDA kernels run: the host's side, without a CUDA header.
#pragma once

#include <utility>

namespace factorizer {
namespace cuda {

// A device's index and a stream of that device.
struct Target {
  int device;
  void* stream;
};

// CUDA's versions of the driver (0: there is none) and of the runtime in this module, as in 13000.
std::pair<int, int> versions();

}  // namespace cuda
}  // namespace factorizer
