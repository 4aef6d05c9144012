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
  throw std::runtime_error(std::string("factorizer_kernels, backend 'cuda', ") + operation + ": " +
                           cudaGetErrorString(status));
}

// The target's device is the current one while this lives.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* operation) : device_(device) {
    check(cudaGetDevice(&previous_), operation);
    if (device_ != previous_) check(cudaSetDevice(device_), operation);
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// One operator's launches, in their order.
class Launcher {
 public:
  Launcher(const Target& target, const char* operation)
      : guard_(target.device, operation),
        stream_(static_cast<cudaStream_t>(target.stream)),
        operation_(operation) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), i64 blocks, int threads,
                  const Arguments&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...), operation_);
  }

 private:
  DeviceGuard guard_;
  cudaStream_t stream_;
  const char* operation_;
};

}  // namespace cuda
}  // namespace factorizer
