// swin_nmf on a CUDA device, the host's side: the same problems as on the CPU, and what a launch needs
// beside.
#pragma once

#include "cuda/common/target.h"
#include "cuda/windows/limits.h"
#include "problems/nmf.h"

namespace factorizer {
namespace cuda {

constexpr int max_rank = 8;

// What a call needs beside its tensors. It is the caller's memory, so that a call allocates nothing.
struct Plan {
  i64 work;      // float32 elements of scratch memory, on a multiple of 16 bytes
  i64 programs;  // of the backward: blocks that go through the windows, each with a share of the scratch
                 // memory
  bool sums_dx;  // of the backward: dx is summed over the shifts in place, so it must be float32
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

}  // namespace cuda
}  // namespace factorizer
