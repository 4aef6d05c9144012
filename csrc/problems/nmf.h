// The factorisation of every window of a feature map, and its adjoint: plain descriptions on raw pointers,
// the same for every backend. A batch of matrices is a 1-D map with one window as long as the map.
#pragma once

#include "problems/windows.h"

namespace factorizer {

struct NMFOptions {
  i64 rank;
  i64 num_iters;
  i64 grad_steps;  // <= num_iters; of the backward alone
  bool hals;       // else MU
  bool relu;       // act on x before the factorisation
  double eps;
};

// One factor of every matrix, transposed: rank rows, each of `extent` elements of the arithmetic's type
// (float, or double for float64). stride = 0: shared by all the matrices.
struct Factor {
  void* data = nullptr;
  i64 stride = 0;
};

// y = mean over the shifts of every window's U V^T, and its backward. x, dy, y and dx are of `dtype`;
// y and dx are contiguous. Pointers that are null are not wanted.
struct SwinNMF {
  DType dtype;
  Windows windows;
  NMFOptions options;
  int threads;
  Volume x;
  Factor u0, v0;

  // forward: y, or the factors of every matrix
  void* y = nullptr;
  Factor u, v;

  // backward: from dy, or from the gradients of the factors
  Volume dy;
  Factor du, dv;
  void* dx = nullptr;
  Factor du0, dv0;  // of u0's and v0's extent and sharing
};

}  // namespace factorizer
