// CUDA on a CPU, as much of it as csrc/cuda uses: with this folder first on the include path, an ordinary C++
// compiler builds the same kernel sources, and they run, thread by thread. For tests: nothing here is fast.
//
// A launch runs its blocks one after another, so __shared__ can be static. A block's threads are fibers; each
// runs until it has to meet others, at a barrier or a shuffle. Where some of those whom it has to meet can
// never come there, the launch fails, and says who waits where. What cannot be seen here: races between
// threads that do not meet, out-of-bounds accesses, and what the hardware does with an unlucky schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901
};
using cudaStream_t = struct EmulatedStream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
};

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// What threads meet for: a barrier of the block, or an exchange in a warp, that is the same for all its
// lanes.
enum class Meeting { none, block, warp, shuffle, shuffle_xor };

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel);

// Waits for the others; of an exchange, returns the value that lane `source` brought along.
std::uint64_t meet(Meeting meeting, unsigned mask, int parameter, int source, std::uint64_t value);

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

template <class T>
T exchange(Meeting meeting, unsigned mask, int parameter, int source, T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(meeting, mask, parameter, source, bits);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::Meeting::block, 0, 0, 0, 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulation::meet(emulation::Meeting::warp, mask, 0, emulation::lane(), 0);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int from = emulation::lane() / width * width + source % width;
  return emulation::exchange(emulation::Meeting::shuffle, mask, width, from, value);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::exchange(emulation::Meeting::shuffle_xor, mask, lanes, emulation::lane() ^ lanes, value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulation::run(*config, [&] { kernel(Parameters(arguments)...); });
}
