// Sums over a block's threads, in a fixed order: by shuffles in each warp, then warp after warp.
//
// The first warp works with the sums ("row work"); the block meets before and after. Where sums are one
// warp's (WARPS = 1), each row of a block's threads is a warp with sums of its own, and no warp waits for
// another.
#pragma once

#include "cuda/common/device.cuh"

namespace factorizer {
namespace cuda {

constexpr unsigned full_warp = 0xffffffffu;

FK_DEVICE int lane() { return threadIdx.x % 32; }
FK_DEVICE bool first_warp() { return threadIdx.x < 32; }

// The entries (j, k), j <= k, of a symmetric SIZE x SIZE matrix, numbered diagonal by diagonal, cyclically: a
// closed form, which folds into constants.
template <int SIZE>
struct Symmetric {
  static constexpr int count = SIZE * (SIZE + 1) / 2;

  FK_INLINE static int row(int i) { return i % SIZE; }
  FK_INLINE static int column(int i) { return (i / SIZE + i % SIZE) % SIZE; }
  FK_INLINE static int index(int j, int k) {
    const int low = j < k ? j : k, distance = j < k ? k - j : j - k;
    return 2 * distance <= SIZE && !(2 * distance == SIZE && low >= SIZE / 2)
               ? distance * SIZE + low
               : (SIZE - distance) * SIZE + low + distance;
  }
};

// v[0] = the sum over the warp of v[lane]: each step halves the values that a lane holds and doubles the
// lanes that they are summed over.
template <int HALF>
FK_DEVICE void fold(float (&v)[32]) {
  const bool upper = lane() & HALF;
  FK_UNROLL
  for (int i = 0; i < HALF; ++i) {
    const float given = __shfl_xor_sync(full_warp, upper ? v[i] : v[i + HALF], HALF);
    v[i] = (upper ? v[i + HALF] : v[i]) + given;
  }
  if constexpr (HALF > 1) fold<HALF / 2>(v);
}

// The threads of a sum meet.
template <int WARPS>
FK_DEVICE void meet() {
  if constexpr (WARPS == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// The sum over the warp, in every lane.
FK_DEVICE float over_warp(float x) {
  FK_UNROLL
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(full_warp, x, distance);
  return x;
}

// Up to COUNT sums over at most WARPS warps.
template <int COUNT, int WARPS>
struct Sums {
  float of[WARPS][COUNT];

  // of[0][i] = the sum over the block of value(i), i < N, for the first warp alone. value is called with
  // constants once the loops are unrolled, 32 of them at a time, so few of the values live in registers
  // together.
  template <int N = COUNT, class F>
  FK_DEVICE void take(F&& value) {
    take_from<0, N>(value, in_order);
    finish<N>();
  }

  // place(of_warp(), i, sum) a warp's sums FIRST .. N - 1 of value(i); finish() when all are there.
  template <int FIRST, int N, class F, class P>
  FK_DEVICE void take_from(F&& value, P&& place) {
    static_assert(N <= COUNT, "room for the sums");
    FK_UNROLL
    for (int first = FIRST; first < N; first += 32) {
      constexpr bool few = N - FIRST <= 16;  // twice as many lanes for each
      float v[32];
      FK_UNROLL
      for (int i = 0; i < 32; ++i) v[i] = first + i < N ? value(first + i) : 0.0f;
      fold<few ? 8 : 16>(v);
      if (few) v[0] += __shfl_xor_sync(full_warp, v[0], 16);
      if (lane() < (few ? 16 : 32) && first + lane() < N) place(of_warp(), first + lane(), v[0]);
    }
  }
  FK_DEVICE static void in_order(float* sums, int i, float sum) { sums[i] = sum; }
  FK_DEVICE float* of_warp() { return of[threadIdx.x / 32]; }
  template <int N = COUNT>
  FK_DEVICE void finish() {
    meet<WARPS>();
    if (WARPS > 1 && first_warp() && blockDim.x > 32) {
      for (int i = lane(); i < N; i += 32) {
        float total = of[0][i];
        for (u32 warp = 1; warp < blockDim.x / 32; ++warp) total += of[warp][i];
        of[0][i] = total;
      }
      __syncwarp();
    }
  }
};

}  // namespace cuda
}  // namespace factorizer
