// Launches: on a device, on a stream, with every error an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/base.h"
#include "cuda/common/target.h"

namespace factorizer {
namespace cuda {

inline void check(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it, so that a later call does not report it
  std::string words =
      std::string("factorizer_kernels, backend 'cuda', ") + operation + ": " + cudaGetErrorString(status);
  // A kernel's first launch loads its code, which a capture may forbid.
  if (status == cudaErrorStreamCaptureUnsupported || status == cudaErrorStreamCaptureInvalidated) {
    words += ": make the same call once before the graph is captured";
  }
  throw std::runtime_error(words);
}

// One operator's launches, in their order. The target's device is the current one: the caller sees to it,
// since cudaSetDevice, to go back to a device that nobody uses, would create a context there.
class Launcher {
 public:
  Launcher(const Target& target, const char* operation)
      : stream_(static_cast<cudaStream_t>(target.stream)), operation_(operation) {
    int current = 0;
    check(cudaGetDevice(&current), operation);
    if (current != target.device) {
      throw std::invalid_argument(std::string(operation) + ": its device must be the current one");
    }
  }

  // threads: a multiple of 32, or as many rows of them as the second number says.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), i64 blocks, dim3 threads,
                  const Arguments&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = threads;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), operation_);
  }

 private:
  cudaStream_t stream_;
  const char* operation_;
};

}  // namespace cuda
}  // namespace factorizer
