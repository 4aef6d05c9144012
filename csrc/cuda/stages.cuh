// The kernels' launches, one for each file beside this one; swin_nmf.cu puts them together.
#pragma once

#include "launch.cuh"
#include "windows.cuh"

namespace factorizer {
namespace cuda {

// dX = s X + w dvᵀ + dr 1ᵀ + da v0ᵀ of a window at rank 1: what its backward leaves for the gathering.
struct alignas(16) Coefficients {
  float s[max_rows][max_rows], w[max_rows], dr[max_rows], da[max_rows];
};

constexpr int chunk = 4;  // columns that a thread moves together

// Iterations that the rank-1 kernels keep on chip.
constexpr int max_rank_one_iters = 64;

inline int round_up(i64 count, int multiple) {
  return static_cast<int>((count + multiple - 1) / multiple * multiple);
}

// rank_one.cu. Forward: y of one copy, or u and v. Backward: dx of one copy, or coefficients and dv.
void rank_one_forward(const Launcher& launch, const Cut& cut, const Options& options, const Map& x,
                      const Factor& v0, const Map& y, float* u, float* v);
void rank_one_backward(const Launcher& launch, const Cut& cut, const Options& options, const Map& x,
                       const Map& dy, const Factor& v0, const Map& dx, Coefficients* coefficients, float* dv,
                       float* du0, float* dv0);

// factorize_forward.cu, factorize_backward_*.cu: any solver and rank; FIRST is the first of four. Backward:
// one copy's dx, added to dx where copy > 0; from dy, or from du and dv where dv is not null.
void factorize_forward(const Launcher& launch, const Cut& cut, const Options& options, const Map& x,
                       const Factor& u0, const Factor& v0, const Map& y, float* u, float* v);
template <int FIRST>
void factorize_backward(const Launcher& launch, const Cut& cut, const Options& options, u32 copy,
                        i64 programs, const Map& x, const Factor& u0, const Factor& v0, const Map& dy,
                        const float* du, const float* dv, const Map& dx, float* du0, float* dv0, float* tape);

inline int factorize_threads(const Cut& cut) { return round_up((cut.columns + chunk - 1) / chunk, 32); }

// float32 elements of a block's tape for one iteration: V, then U, A and B.
FK_INLINE i64 tape_size(i64 rank, i64 threads) {
  return rank * chunk * threads + (2 * max_rows * rank + rank * rank + 3) / 4 * 4;
}

// gather.cu: each voxel of the map once, from the windows of all the copies that hold it.
void gather_products(const Launcher& launch, const Cut& cut, i64 rank, const float* u, const float* v,
                     const Map& y);
void gather_gradients(const Launcher& launch, const Cut& cut, const Map& x, const Factor& v0,
                      const Coefficients* coefficients, const float* dv, const Map& dx);

}  // namespace cuda
}  // namespace factorizer
