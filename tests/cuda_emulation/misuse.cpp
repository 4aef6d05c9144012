// Kernels that a device would hang on or answer at random: the emulation must refuse each.
#include "cuda_runtime.h"

namespace {

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void half_a_shuffle() {
  if (threadIdx.x % 2 == 0) __shfl_sync(0xffffffffu, 1.0f, 0);
}

__global__ void barrier_beside_shuffle() {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

__global__ void two_distances() { __shfl_xor_sync(0xffffffffu, 1.0f, threadIdx.x % 2 == 0 ? 1 : 2); }

__global__ void from_outside_the_mask() {
  if (threadIdx.x % 32 < 8) __shfl_xor_sync(0xffu, 1.0f, 8);
}

__global__ void proper() {
  if (threadIdx.x % 32 < 8) __shfl_xor_sync(0xffu, 1.0f, 4);
  __syncthreads();
}

}  // namespace

// The error of launching one of them; the last is as it should be.
extern "C" __attribute__((visibility("default"))) int emulation_misuse(int which) {
  void (*const kernels[])() = {half_a_barrier, half_a_shuffle,        barrier_beside_shuffle,
                               two_distances,  from_outside_the_mask, proper};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(64);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernels[which]);
  cudaGetLastError();
  return error;
}
