// The CUDA kernels' host side: the same problems as on the CPU (problem.h), and what a launch needs beside.
#pragma once

#include <utility>

#include "problem.h"

namespace factorizer {
namespace cuda {

// What the kernels serve; factorizer_kernels/_native_cuda.py states the same rule in Python.
constexpr int max_rows = 8;        // head_dim
constexpr int max_columns = 1024;  // voxels of a window
constexpr int max_rank = 8;
constexpr int max_copies = 16;  // shifts

// Where to run: a device's index and a stream of that device.
struct Target {
  int device;
  void* stream;
};

// What a call needs beside its tensors. It is the caller's memory, so that a call allocates nothing.
struct Plan {
  i64 work;      // float32 elements of scratch memory, on a multiple of 16 bytes
  i64 programs;  // of the backward: blocks that go through the windows, each with a share of the scratch
                 // memory
  bool sums_dx;  // of the backward: dx is summed over the copies in place, so it must be float32
};

// Throw std::invalid_argument where the problem is not served. factors: u and v are wanted, not y.
// processors: the device's multiprocessors. The problems need not have data yet.
Plan plan_forward(const SwinNMF& problem, bool factors);
Plan plan_backward(const SwinNMF& problem, i64 processors);

// Launch kernels and return; throw std::runtime_error, naming the operator, where CUDA reports an error. The
// gradients of u0 and v0 are one share for each matrix, to be summed by the caller.
void swin_nmf_forward(const SwinNMF& problem, float* work, const Target& target);
void swin_nmf_backward(const SwinNMF& problem, const Plan& plan, float* work, DType dx_dtype,
                       const Target& target);

// CUDA's versions of the driver (0: there is none) and of the runtime in this module, as in 13000.
std::pair<int, int> versions();

}  // namespace cuda
}  // namespace factorizer
