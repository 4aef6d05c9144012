// Rank 1 on nonnegative X (M x N) and v0: all the iterations in terms of small sums over the columns.
//
// Where the projections do not act, one iteration is
//   u = (a + e) / (b + e),  d = uᵀu,  k = 1 / (d + e),  v = k (Xᵀu + e),
// with a = X v and b = vᵀv of the v before, and the next a and b need no look at X:
//   a = k (G u + e r),  b = k² (uᵀG u + 2 e uᵀr + e² N),  G = X Xᵀ,  r = X 1.
// HALS is this with e = eps, exactly. MU is it with e = 0, up to eps below rounding.
#pragma once

#include <cmath>

#include "common/base.h"

namespace factorizer {

// Sums over the columns of X, and the first a and b (of v0). All memory is the caller's.
struct Moments {
  double* g;  // M x M
  double* r;  // M
  double* a;  // M
  double b;
};

// What iteration t leaves, t = 1..T; index 0 holds a and b of v0.
struct RankOneTrace {
  double* u;          // (T + 1) x M
  double* a;          // (T + 1) x M: X v_t
  double* b;          // T + 1: v_tᵀ v_t
  double* k;          // T + 1
  double* inverse_b;  // T + 1: 1 / (b_{t-1} + e)

  FK_INLINE static i64 size(i64 rows, i64 iters) { return (iters + 1) * (2 * rows + 3); }

  RankOneTrace() = default;
  FK_INLINE RankOneTrace(double* memory, i64 rows, i64 iters)
      : u(memory),
        a(u + (iters + 1) * rows),
        b(a + (iters + 1) * rows),
        k(b + iters + 1),
        inverse_b(k + iters + 1) {}
};

// term(0) + .. + term(count - 1), in four sums: in one, each addition would wait for the one before.
template <class Count, class Term>
FK_INLINE double sum_of(Count count, Term&& term) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  i64 i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += term(i + lane);
  }
  for (; i < count; ++i) sums[0] += term(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// out = G w + add
template <class Count>
FK_INLINE void multiply_add(Count rows, const double* __restrict g, const double* __restrict w,
                            const double* __restrict add, double* __restrict out) {
  const i64 count = rows;
#pragma GCC unroll 1
  for (i64 m = 0; m < count; ++m) {
    double even = add[m], odd = 0.0;
    for (i64 j = 0; j + 1 < count; j += 2) {
      even += g[j * count + m] * w[j];
      odd += g[(j + 1) * count + m] * w[j + 1];
    }
    if (count % 2 != 0) even += g[(count - 1) * count + m] * w[count - 1];
    out[m] = even + odd;
  }
}

// One matrix; `work` holds 2 rows. applies: false where, for MU, eps is not negligible against the tolerance
// times the sums it stands beside: there the caller iterates on X itself.
struct RankOneMatrix {
  Moments moments;
  RankOneTrace trace;
  double* work;
  bool applies = true;
};

// Iteration t, of one matrix.
template <class Count>
FK_INLINE void rank_one_iteration(Count rows, double columns, i64 t, bool hals, double eps, double tolerance,
                                  RankOneMatrix& matrix) {
  const double e = hals ? eps : 0.0;
  RankOneTrace& trace = matrix.trace;
  const Moments& moments = matrix.moments;
  double* w = matrix.work;
  double* ekr = matrix.work + rows;
  double* u = trace.u + t * rows;
  double* a = trace.a + t * rows;
  const double* a_before = a - rows;
  const double inverse_b = 1.0 / (trace.b[t - 1] + e);
  for (i64 m = 0; m < rows; ++m) u[m] = (a_before[m] + e) * inverse_b;
  const double d = sum_of(rows, [&](i64 m) { return u[m] * u[m]; });
  const double k = 1.0 / (d + e);
  const double ek = e * k;
  // w = k u first: k alone may overflow what k² is multiplied with.
  for (i64 m = 0; m < rows; ++m) w[m] = k * u[m];
  for (i64 m = 0; m < rows; ++m) ekr[m] = ek * moments.r[m];
  multiply_add(rows, moments.g, w, ekr, a);
  trace.b[t] = ek * ek * columns + sum_of(rows, [&](i64 m) { return w[m] * (a[m] + ekr[m]); });
  trace.k[t] = k;
  trace.inverse_b[t] = inverse_b;
  if (!hals) {
    // U's numerators u_m a_m / u_m and V's denominators v_n d, both in the root mean square.
    const double numerator = sum_of(rows, [&](i64 m) { return a_before[m] * a_before[m]; });
    const double ugu = sum_of(rows, [&](i64 m) { return w[m] * (a[m] - ekr[m]); });
    const double scale = std::fmin(std::sqrt(numerator / rows), d * std::sqrt(ugu / columns));
    if (!(eps <= tolerance * scale)) matrix.applies = false;
  }
}

// Runs the iterations of some matrices side by side: in one, each number waits for the one before.
template <class Count>
FK_INLINE void rank_one_forward(Count rows, double columns, i64 iters, bool hals, double eps,
                                double tolerance, RankOneMatrix* const* matrices, i64 count) {
  for (i64 i = 0; i < count; ++i) {
    const RankOneMatrix& matrix = *matrices[i];
    for (i64 m = 0; m < rows; ++m) matrix.trace.a[m] = matrix.moments.a[m];
    matrix.trace.b[0] = matrix.moments.b;
  }
  for (i64 t = 1; t <= iters; ++t) {
    for (i64 i = 0; i < count; ++i) {
      rank_one_iteration(rows, columns, t, hals, eps, tolerance, *matrices[i]);
    }
  }
}

// dX = s X + dr 1ᵀ + k u dvᵀ + da v0ᵀ and dv0 = Xᵀ da + 2 db v0, with dv the gradient of the last v.
struct RankOneGradient {
  double* s;   // M x M
  double* dr;  // M
  double* da;  // M; zero where the iterations before `first` are constants
  double db;
  double* work;  // 3 M

  FK_INLINE static i64 size(i64 rows) { return rows * rows + 5 * rows; }

  RankOneGradient() = default;
  FK_INLINE RankOneGradient(double* memory, i64 rows)
      : s(memory), dr(s + rows * rows), da(dr + rows), db(0.0), work(da + rows) {}
};

// Of one matrix: du, the gradient of the last u on its own; h = X dv; dv_v = dvᵀ v.
struct RankOneAdjoint {
  const RankOneMatrix* matrix;
  const double *du, *h;
  double dv_v;
  RankOneGradient out;
};

// Through u_t = (a + e) / (b + e): from the gradient of u_t to those of the a and b before it.
template <class Count>
FK_INLINE void rank_one_through_u(Count rows, i64 t, RankOneAdjoint& adjoint) {
  const RankOneTrace& trace = adjoint.matrix->trace;
  const double* u = trace.u + t * rows;
  double *du = adjoint.out.work, *da = du + rows;
  double db = 0.0;
  for (i64 m = 0; m < rows; ++m) {
    da[m] = du[m] * trace.inverse_b[t];
    db -= da[m] * u[m];
  }
  adjoint.out.db = db;
}

// Through a = k (G u + e r), b = k² (uᵀG u + 2 e uᵀr + e² N), k = 1 / (uᵀu + e) of iteration t, to the
// gradient of u_t.
template <class Count>
FK_INLINE void rank_one_through_v(Count rows, i64 t, double e, RankOneAdjoint& adjoint) {
  const RankOneTrace& trace = adjoint.matrix->trace;
  RankOneGradient& out = adjoint.out;
  const double* u = trace.u + t * rows;
  const double* a = trace.a + t * rows;
  const double k = trace.k[t], db = out.db;
  double *du = out.work, *da = du + rows, *g_da = da + rows;
  double da_a = 0.0;
  for (i64 m = 0; m < rows; ++m) {
    da_a += da[m] * a[m];
    g_da[m] = 0.0;
  }
  for (i64 j = 0; j < rows; ++j) {
    for (i64 m = 0; m < rows; ++m) g_da[m] += adjoint.matrix->moments.g[j * rows + m] * da[j];
  }
  for (i64 i = 0; i < rows; ++i) {
    const double left = k * da[i] + k * db * (k * u[i]);
    for (i64 j = 0; j < rows; ++j) out.s[i * rows + j] += left * u[j];
    out.dr[i] += e * k * (da[i] + 2.0 * db * (k * u[i]));
  }
  const double dd = -k * (da_a + 2.0 * db * trace.b[t]);
  for (i64 m = 0; m < rows; ++m) du[m] = k * (g_da[m] + 2.0 * db * a[m]) + 2.0 * dd * u[m];
}

// What is left once iteration first + 1 is differentiated.
template <class Count>
FK_INLINE void rank_one_finish(Count rows, i64 first, double e, RankOneAdjoint& adjoint) {
  RankOneGradient& out = adjoint.out;
  const double* da = out.work + rows;
  // G is symmetric: each of its gradient's terms stands there as its transpose too.
  for (i64 i = 0; i < rows; ++i) {
    for (i64 j = 0; j <= i; ++j) {
      out.s[j * rows + i] = out.s[i * rows + j] = out.s[i * rows + j] + out.s[j * rows + i];
    }
  }
  if (first == 0) {
    for (i64 m = 0; m < rows; ++m) out.da[m] = da[m];
    return;
  }
  // The v before the first differentiated iteration is a constant: v = k (Xᵀu + e), a = X v.
  const RankOneTrace& trace = adjoint.matrix->trace;
  const double* u = trace.u + first * rows;
  const double k = trace.k[first];
  for (i64 i = 0; i < rows; ++i) {
    for (i64 j = 0; j < rows; ++j) out.s[i * rows + j] += da[i] * (k * u[j]);
    out.dr[i] += e * k * da[i];
    out.da[i] = 0.0;
  }
  out.db = 0.0;
}

// Differentiates iterations first + 1 .. iters, of some matrices side by side.
template <class Count>
FK_INLINE void rank_one_backward(Count rows, i64 iters, i64 first, bool hals, double eps,
                                 RankOneAdjoint* const* adjoints, i64 count) {
  const double e = hals ? eps : 0.0;
  for (i64 n = 0; n < count; ++n) {
    RankOneAdjoint& adjoint = *adjoints[n];
    const RankOneTrace& trace = adjoint.matrix->trace;
    for (i64 i = 0; i < rows * rows; ++i) adjoint.out.s[i] = 0.0;
    for (i64 m = 0; m < rows; ++m) adjoint.out.dr[m] = 0.0;
    const double k = trace.k[iters];
    const double* u = trace.u + iters * rows;
    double* du = adjoint.out.work;
    for (i64 m = 0; m < rows; ++m) {
      du[m] = adjoint.du[m] + k * adjoint.h[m] - 2.0 * k * adjoint.dv_v * u[m];
    }
    rank_one_through_u(rows, iters, adjoint);
  }
  for (i64 t = iters - 1; t > first; --t) {
    for (i64 n = 0; n < count; ++n) {
      rank_one_through_v(rows, t, e, *adjoints[n]);
      rank_one_through_u(rows, t, *adjoints[n]);
    }
  }
  for (i64 n = 0; n < count; ++n) rank_one_finish(rows, first, e, *adjoints[n]);
}

}  // namespace factorizer
