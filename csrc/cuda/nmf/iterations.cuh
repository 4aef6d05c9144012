// The iterations as they are written in the reference, for one window in one block: four columns of X and of
// V in each thread, U and the Gram matrices in shared memory.
//
// An iteration sums A = XV and B = VᵀV over the block, the first warp makes the new U of them (a lane for
// each row), and every thread its columns of the new V.
#pragma once

#include <type_traits>

#include "cuda/common/sums.cuh"
#include "cuda/nmf/stages.cuh"
#include "cuda/windows/tile.cuh"
#include "math/factor_update.h"

namespace factorizer {
namespace cuda {

constexpr int most_iterations_warps = max_columns / chunk / 32;

// A column of a factor, as factor_update.h wants it.
template <int R>
struct Components {
  float (&at)[R];

  FK_DEVICE float get(i64 r) const { return at[r]; }
  FK_DEVICE void set(i64 r, float value) { at[r] = value; }
};

template <int R>
FK_DEVICE void update(bool hals, float eps, const float* gram, float (&f)[R], float (&projection)[R],
                      float (&out)[R]) {
  const Components<R> old{f}, c{projection};
  Components<R> made{out};
  if (hals) {
    hals_update<float>(R, eps, gram, old, c, made);
  } else {
    mu_update<float>(R, eps, gram, old, c, made);
  }
}

// df becomes the gradient of f; dc that of the projection. dq: see factor_update.h, of MU alone.
template <int R>
FK_DEVICE void update_backward(bool hals, float eps, const float* gram, float (&f)[R], float (&f_new)[R],
                               float (&projection)[R], float (&df)[R], float (&dc)[R], float (&dq)[R]) {
  const Components<R> old{f}, made{f_new}, c{projection};
  Components<R> of_f{df}, of_c{dc}, of_q{dq};
  if (hals) {
    hals_update_backward<float>(R, eps, gram, made, of_f, of_c);
  } else {
    mu_update_backward<float>(R, eps, gram, old, made, c, of_f, of_c, of_q);
  }
}

// One column's share of dD_jk + dD_kj, the gradient of the update's Gram matrix.
template <int R>
FK_DEVICE float gram_gradient(bool hals, int j, int k, const float (&f)[R], const float (&f_new)[R],
                              const float (&dc)[R], const float (&dq)[R]) {
  const int low = j < k ? j : k, high = j < k ? k : j;
  if (!hals) return f[low] * dq[high] + f[high] * dq[low];
  return -(f_new[low] * dc[high] + (low == high ? f_new : f)[high] * dc[low]);
}

template <int R>
struct Shared {
  using Pairs = Symmetric<R>;
  static constexpr int projections = max_rows * R;  // A_mr is sum m R + r, and the pairs of B follow

  Sums<projections + Pairs::count, most_iterations_warps> sums;
  float u[max_rows][R];
  float gram[R * R];

  // The first warp alone, as the two below.
  FK_DEVICE void load_u(const DeviceWindows& windows, const float* u0) {
    const int m = lane();
    if (m >= max_rows) return;
    FK_UNROLL
    for (int r = 0; r < R; ++r) u[m][r] = m < windows.rows ? u0[r * windows.rows + m] : 0.0f;
  }
  FK_DEVICE void gram_from_sums(float (&to)[R * R]) {
    for (int p = lane(); p < R * R; p += 32) to[p] = sums.of[0][projections + Pairs::index(p / R, p % R)];
    __syncwarp();
  }
  FK_DEVICE void gram_of_u() {
    for (int p = lane(); p < R * R; p += 32) {
      float sum = 0.0f;
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) sum += u[m][p / R] * u[m][p % R];
      gram[p] = sum;
    }
    __syncwarp();
  }
};

// v = the chunk of v0; zero past its end.
template <int R>
FK_DEVICE void load_factor(const DeviceWindows& windows, const float* rows, float (&v)[chunk][R]) {
  FK_UNROLL
  for (int r = 0; r < R; ++r) {
    float row[chunk];
    load_row(windows, rows + static_cast<i64>(r) * windows.columns, 0, row);
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) v[c][r] = row[c];
  }
}

template <int R>
FK_DEVICE void store_factor(const DeviceWindows& windows, float* rows, const float (&v)[chunk][R]) {
  FK_UNROLL
  for (int r = 0; r < R; ++r) {
    float row[chunk];
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) row[c] = v[c][r];
    store_row(windows, rows + static_cast<i64>(r) * windows.columns, 0, row);
  }
}

// Xᵀf for column c.
template <int R>
FK_DEVICE void project(const float (&x)[max_rows][chunk], int c, const float (&f)[max_rows][R],
                       float (&out)[R]) {
  FK_UNROLL
  for (int r = 0; r < R; ++r) {
    out[r] = 0.0f;
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) out[r] += x[m][c] * f[m][r];
  }
}

// One iteration: U, then V. keep is called by the first warp, with the sums, before U is replaced.
template <int R, class Keep>
FK_DEVICE void iterate(const DeviceWindows& windows, bool hals, float eps, const float (&x)[max_rows][chunk],
                       float (&v)[chunk][R], Shared<R>& shared, Keep&& keep) {
  using Pairs = Symmetric<R>;
  constexpr int projections = Shared<R>::projections;
  shared.sums.take([&](int i) {
    float sum = 0.0f;
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      sum += i < projections ? x[i / R][c] * v[c][i % R]
                             : v[c][Pairs::row(i - projections)] * v[c][Pairs::column(i - projections)];
    }
    return sum;
  });
  if (first_warp()) {
    shared.gram_from_sums(shared.gram);
    keep();
    if (lane() < max_rows) {
      const int m = lane();
      float f[R], a[R], made[R];
      FK_UNROLL
      for (int r = 0; r < R; ++r) {
        f[r] = shared.u[m][r];
        a[r] = shared.sums.of[0][m * R + r];
      }
      update(hals, eps, shared.gram, f, a, made);
      FK_UNROLL
      for (int r = 0; r < R; ++r) shared.u[m][r] = m < windows.rows ? made[r] : 0.0f;
    }
    __syncwarp();
    shared.gram_of_u();
  }
  __syncthreads();
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    float projection[R], made[R];
    project(x, c, shared.u, projection);
    update(hals, eps, shared.gram, v[c], projection, made);
    const bool exists = column_of(windows, 0, c) < windows.columns;
    FK_UNROLL
    for (int r = 0; r < R; ++r) v[c][r] = exists ? made[r] : 0.0f;
  }
}

// Calls f with the rank, of FIRST to LAST, as a constant.
template <int FIRST, int LAST, class F>
void with_rank(i64 rank, F&& f) {
  if constexpr (FIRST < LAST) {
    if (rank > FIRST) return with_rank<FIRST + 1, LAST>(rank, f);
  }
  f(std::integral_constant<int, FIRST>{});
}

}  // namespace cuda
}  // namespace factorizer
