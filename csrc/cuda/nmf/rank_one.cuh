// Rank 1 on nonnegative X and v0, as in math/rank_one.h, by one warp: lane l keeps row l % 8 of everything.
//
// float32 throughout: with e of the order of eps, u = (a + e) / (b + e), k = 1 / (uᵀu + e) and w = k u come
// before any product of them, so that nothing under- or overflows that would not in the iterations
// themselves.
#pragma once

#include "cuda/common/sums.cuh"
#include "cuda/nmf/stages.cuh"

namespace factorizer {
namespace cuda {

// The sum over the rows, in every lane.
FK_DEVICE float over_rows(float x) {
  FK_UNROLL
  for (int distance = max_rows / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(full_warp, x, distance);
  return x;
}

FK_DEVICE float row_of(float x, int m) { return __shfl_sync(full_warp, x, m, max_rows); }

// This lane's row of the sums over the columns: G = X Xᵀ, r = X 1, a = X v0, b = v0ᵀv0.
struct Moments {
  // The sums, of G one triangle; and how they lie in memory, G whole, so that a lane's row is read at once.
  static constexpr int pairs = Symmetric<max_rows>::count, count = pairs + 2 * max_rows + 1;
  static constexpr int of_r = max_rows * max_rows, of_a = of_r + max_rows, of_b = of_a + max_rows;
  static constexpr int places = (of_b + 4) / 4 * 4;  // rows are read in fours
  float g[max_rows], r, a, b;

  // Sum i of the count.
  FK_DEVICE static void put(float* sums, int i, float sum) {
    if (i >= pairs) {
      sums[of_r + i - pairs] = sum;
      return;
    }
    const int j = Symmetric<max_rows>::row(i), k = Symmetric<max_rows>::column(i);
    sums[j * max_rows + k] = sums[k * max_rows + j] = sum;
  }
  FK_DEVICE explicit Moments(const float* sums) {
    const int m = lane() % max_rows;
    FK_UNROLL
    for (int j = 0; j < max_rows; j += 4) {
      float four[4];
      read(sums + m * max_rows + j, four);
      FK_UNROLL
      for (int i = 0; i < 4; ++i) g[j + i] = four[i];
    }
    r = sums[of_r + m];
    a = sums[of_a + m];
    b = sums[of_b];
  }
  FK_DEVICE float times_g(float x) const {
    float sum = 0.0f;
    FK_UNROLL
    for (int j = 0; j < max_rows; ++j) sum += g[j] * row_of(x, j);
    return sum;
  }
};

// What follows from u: k = 1 / (uᵀu + eps), w = k u, e = k eps, so that v = Xᵀw + e.
struct Step {
  float u, k, w, e;

  FK_DEVICE Step(float of_u, float eps) : u(of_u) {
    k = 1.0f / (over_rows(u * u) + eps);
    w = k * u;
    e = k * eps;
  }
};

// What the backward needs of each iteration t = 1, 2, ...: the u it made, the a and b it made it of.
struct Trace {
  float u[max_rank_one_iters][max_rows], a[max_rank_one_iters][max_rows], b[max_rank_one_iters];
};

// The last iteration's u. iters > 0; trace may be null.
FK_DEVICE Step solve_rank_one(int rows, u32 columns, int iters, float eps, const Moments& moments,
                              Trace* trace) {
  const int m = lane() % max_rows;
  float a = moments.a, b = moments.b;
  for (int t = 0;; ++t) {
    const Step step(m < rows ? (a + eps) / (b + eps) : 0.0f, eps);
    if (trace != nullptr && lane() < max_rows) {
      trace->u[t][m] = step.u;
      trace->a[t][m] = a;
      if (lane() == 0) trace->b[t] = b;
    }
    if (t + 1 == iters) return step;
    a = moments.times_g(step.w) + step.e * moments.r;
    b = over_rows(step.w * (a + step.e * moments.r)) + step.e * step.e * columns;
  }
}

// Leaves dX's coefficients and returns db: dv0 = Xᵀda + 2 db v0, with dv the gradient of the last v.
// Differentiates iterations first + 1 .. iters. dy_v: this row of dY v, h: of X dv; dv_v = dvᵀv.
FK_DEVICE float differentiate_rank_one(int iters, int first, float eps, const Moments& moments,
                                       const Trace& trace, float dy_v, float h, float dv_v,
                                       Coefficients& out) {
  const int m = lane() % max_rows;
  float s[max_rows] = {}, dr = 0.0f, da, db;
  const Step last(trace.u[iters - 1][m], eps);
  float du = dy_v + last.k * (h - 2.0f * dv_v * last.u);
  for (int t = iters - 1;; --t) {
    da = du / (trace.b[t] + eps);
    db = -over_rows(da * trace.u[t][m]);
    if (t == first) break;
    const Step step(trace.u[t - 1][m], eps);
    const float a = trace.a[t][m], b = trace.b[t];
    const float left = step.k * (da + db * step.w);
    FK_UNROLL
    for (int j = 0; j < max_rows; ++j) s[j] += left * row_of(step.u, j) + step.u * row_of(left, j);
    dr += step.e * (da + 2.0f * db * step.w);
    const float dd = -step.k * (over_rows(da * a) + 2.0f * db * b);
    du = step.k * (moments.times_g(da) + 2.0f * db * a) + 2.0f * dd * step.u;
  }
  if (first > 0) {  // the v before the first differentiated iteration is a constant of k, u and eps: a = X v
    const Step step(trace.u[first - 1][m], eps);
    FK_UNROLL
    for (int j = 0; j < max_rows; ++j) s[j] += da * row_of(step.w, j);
    dr += step.e * da;
    da = db = 0.0f;
  }
  if (lane() < max_rows) {
    FK_UNROLL
    for (int j = 0; j < max_rows; ++j) out.s[m][j] = s[j];
    out.w[m] = last.w;
    out.dr[m] = dr;
    out.da[m] = da;
  }
  return db;
}

// dx += the gradient of W columns of a window.
template <int W>
FK_DEVICE void add_gradient(const Coefficients& of, const float (&x)[max_rows][W], const float (&dv)[W],
                            const float (&v0)[W], float (&dx)[max_rows][W]) {
  FK_UNROLL
  for (int m = 0; m < max_rows; ++m) {
    FK_UNROLL
    for (int c = 0; c < W; ++c) {
      float sum = of.dr[m] + of.w[m] * dv[c] + of.da[m] * v0[c];
      FK_UNROLL
      for (int j = 0; j < max_rows; ++j) sum += of.s[m][j] * x[j][c];
      dx[m][c] += sum;
    }
  }
}

}  // namespace cuda
}  // namespace factorizer
