// The kernels' launches, one for each file beside this one; swin_nmf.cu puts them together.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/nmf/swin_nmf.h"
#include "cuda/windows/tile.cuh"

namespace factorizer {
namespace cuda {

// dX = s X + w dvᵀ + dr 1ᵀ + da v0ᵀ of a window at rank 1: what its backward leaves for the gathering.
struct alignas(16) Coefficients {
  float s[max_rows][max_rows], w[max_rows], dr[max_rows], da[max_rows];
};

// Iterations that the rank-1 kernels keep on chip.
constexpr int max_rank_one_iters = 64;

// Where the rows of a matrix' factor begin.
FK_DEVICE const float* of_matrix(const Factor& factor, i64 matrix) {
  return static_cast<const float*>(factor.data) + matrix * factor.stride;
}

// rank_one.cu. Forward: y of one copy, or u and v. Backward: dx of one copy, or coefficients and dv.
void rank_one_forward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                      const Map& x, const Factor& v0, const Map& y, float* u, float* v);
void rank_one_backward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                       const Map& x, const Map& dy, const Factor& v0, const Map& dx,
                       Coefficients* coefficients, float* dv, float* du0, float* dv0);

// iterations_forward.cu, iterations_backward_*.cu: any solver and rank; FIRST is the first of four. Backward:
// one copy's dx, added to dx where copy > 0; from dy, or from du and dv where dv is not null.
void iterations_forward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                        const Map& x, const Factor& u0, const Factor& v0, const Map& y, float* u, float* v);
template <int FIRST>
void iterations_backward(const Launcher& launch, const DeviceWindows& windows, const NMFOptions& options,
                         u32 copy, i64 programs, const Map& x, const Factor& u0, const Factor& v0,
                         const Map& dy, const float* du, const float* dv, const Map& dx, float* du0,
                         float* dv0, float* tape);

inline int iterations_threads(const DeviceWindows& windows) {
  return round_up((windows.columns + chunk - 1) / chunk, 32);
}

// float32 elements of a block's tape for one iteration: V, then U, A and B.
FK_INLINE i64 tape_size(i64 rank, i64 threads) {
  return rank * chunk * threads + (2 * max_rows * rank + rank * rank + 3) / 4 * 4;
}

// compose.cu: each voxel of the map once, from the windows of all the copies that hold it.
void gather_products(const Launcher& launch, const DeviceWindows& windows, i64 rank, const float* u,
                     const float* v, const Map& y);
void gather_gradients(const Launcher& launch, const DeviceWindows& windows, const Map& x, const Factor& v0,
                      const Coefficients* coefficients, const float* dv, const Map& dx);

}  // namespace cuda
}  // namespace factorizer
