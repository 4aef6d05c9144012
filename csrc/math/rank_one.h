// Rank 1 on nonnegative X (M x N) and v0: all the iterations in terms of small sums over the columns.
//
// Where the projections do not act, one iteration is
//   u = (a + e) / (b + e),  d = uᵀu,  k = 1 / (d + e),  v = k (Xᵀu + e),
// with a = X v and b = vᵀv of the v before, and the next a and b need no look at X:
//   a = k (G u + e r),  b = k² (uᵀG u + 2 e uᵀr + e² N),  G = X Xᵀ,  r = X 1.
// HALS is this with e = eps, exactly. MU is it with e = 0, up to eps below rounding.
//
// Every number here is a Real: one matrix' or, where Real is a vector, in each lane another matrix', all of
// one shape: in a single matrix each number would wait for the one before.
#pragma once

#include "common/base.h"

namespace factorizer {

// What the iterations of one matrix, or of some side by side, begin with and leave. Numbers: a pointer to
// Real, or what is indexed like one.
template <class Numbers>
struct RankOneNumbers {
  // Of the iterations; the caller brings g, r (where e is not 0) and, at index 0, a and b, those of v0.
  Numbers g;          // M x M: G, a symmetric matrix
  Numbers r;          // M
  Numbers u;          // (T + 1) x M: u of iteration t = 1..T
  Numbers a;          // (T + 1) x M: X v_t
  Numbers b;          // T + 1: v_tᵀ v_t
  Numbers k;          // T + 1
  Numbers inverse_b;  // T + 1: 1 / (b_{t-1} + e)
  Numbers applies;    // 1 or, where eps is not negligible for MU, 0: there the caller iterates on X itself

  // Of their backward: the caller brings the gradient of the last u on its own, h = X dv and dvᵀ v, with dv
  // the gradient of the last v. Then dX = s X + dr 1ᵀ + k u dvᵀ + da v0ᵀ and dv0 = Xᵀ da + 2 db v0.
  Numbers du;    // M
  Numbers h;     // M
  Numbers dv_v;  // 1
  Numbers s;     // M x M
  Numbers dr;    // M
  Numbers da;    // M; zero where the iterations before `first` are constants
  Numbers db;    // 1

  Numbers work;  // 3 M

  // take(count): so many of them.
  template <class Take>
  FK_INLINE RankOneNumbers(i64 rows, i64 iters, bool backward, Take&& take)
      : g(take(rows * rows)),
        r(take(rows)),
        u(take((iters + 1) * rows)),
        a(take((iters + 1) * rows)),
        b(take(iters + 1)),
        k(take(iters + 1)),
        inverse_b(take(iters + 1)),
        applies(take(1)),
        du(take(backward ? rows : 0)),
        h(take(backward ? rows : 0)),
        dv_v(take(backward ? 1 : 0)),
        s(take(backward ? rows * rows : 0)),
        dr(take(backward ? rows : 0)),
        da(take(backward ? rows : 0)),
        db(take(backward ? 1 : 0)),
        work(take(3 * rows)) {}
};

// term(0) + .. + term(count - 1), in four sums: in one, each addition would wait for the one before.
template <class Real, class Count, class Term>
FK_INLINE Real sum_of(Count count, Term&& term) {
  Real sums[4] = {};
  i64 i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int lane = 0; lane < 4; ++lane) sums[lane] += term(i + lane);
  }
  for (; i < count; ++i) sums[0] += term(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// f(m, to[m]), which sets or changes to[m] and nothing else. Not unrolled: where Real is a scalar, vectors
// would become scalar code.
template <class Real, class Count, class F>
FK_INLINE void each_row(Count rows, Real* __restrict to, F&& f) {
  const i64 count = rows;
#pragma GCC unroll 1
  for (i64 m = 0; m < count; ++m) f(m, to[m]);
}

// out = G w
template <class Real, class Count>
FK_INLINE void multiply_by_symmetric(Count rows, const Real* __restrict g, const Real* __restrict w,
                                     Real* __restrict out) {
  each_row(rows, out, [&](i64 m, Real& sum) {
    const i64 count = rows;
    Real even{}, odd{};
    for (i64 j = 0; j + 1 < count; j += 2) {
      even += g[j * count + m] * w[j];
      odd += g[(j + 1) * count + m] * w[j + 1];
    }
    if (count % 2 != 0) even += g[(count - 1) * count + m] * w[count - 1];
    sum = even + odd;
  });
}

template <class Real, class Count>
FK_INLINE void rank_one_iteration(Count rows, double columns, i64 t, bool hals, double eps, double tolerance,
                                  const RankOneNumbers<Real*>& x) {
  const double e = hals ? eps : 0.0;
  Real *w = x.work, *ekr = x.work + rows;
  Real *u = x.u + t * rows, *a = x.a + t * rows;
  const Real *r = x.r, *a_before = a - rows;
  const Real inverse_b = 1.0 / (x.b[t - 1] + e);
  each_row(rows, u, [&](i64 m, Real& out) { out = (a_before[m] + e) * inverse_b; });
  const Real d = sum_of<Real>(rows, [&](i64 m) { return u[m] * u[m]; });
  const Real k = 1.0 / (d + e), ek = e * k;
  // w = k u first: k alone may overflow what k² is multiplied with.
  each_row(rows, w, [&](i64 m, Real& out) { out = k * u[m]; });
  multiply_by_symmetric(rows, x.g, w, a);
  x.k[t] = k;
  x.inverse_b[t] = inverse_b;
  if (hals) {
    each_row(rows, ekr, [&](i64 m, Real& out) { out = ek * r[m]; });
    each_row(rows, a, [&](i64 m, Real& out) { out += ekr[m]; });
    x.b[t] = ek * ek * columns + sum_of<Real>(rows, [&](i64 m) { return w[m] * (a[m] + ekr[m]); });
    return;
  }
  x.b[t] = sum_of<Real>(rows, [&](i64 m) { return w[m] * a[m]; });
  // U's numerators u_m a_m / u_m and V's denominators v_n d, both in the mean square.
  const Real numerator = sum_of<Real>(rows, [&](i64 m) { return a_before[m] * a_before[m]; }) / double(rows);
  const Real denominator = d * (d * x.b[t]) / columns, least = (eps / tolerance) * (eps / tolerance) + Real{};
  const Real smaller = numerator < denominator ? numerator : denominator;
  x.applies[0] = least <= smaller ? x.applies[0] : Real{};
}

template <class Real, class Count>
FK_INLINE void rank_one_forward(Count rows, double columns, i64 iters, bool hals, double eps,
                                double tolerance, const RankOneNumbers<Real*>& x) {
  x.applies[0] = Real{} + 1.0;
  for (i64 t = 1; t <= iters; ++t) rank_one_iteration(rows, columns, t, hals, eps, tolerance, x);
}

// Through u_t = (a + e) / (b + e): from the gradient of u_t to those of the a and b before it.
template <class Real, class Count>
FK_INLINE void rank_one_through_u(Count rows, i64 t, const RankOneNumbers<Real*>& x) {
  const Real* u = x.u + t * rows;
  Real *du = x.work, *da = x.work + rows;
  const Real inverse_b = x.inverse_b[t];
  each_row(rows, da, [&](i64 m, Real& out) { out = du[m] * inverse_b; });
  x.db[0] = -sum_of<Real>(rows, [&](i64 m) { return da[m] * u[m]; });
}

// Through a = k (G u + e r), b = k² (uᵀG u + 2 e uᵀr + e² N), k = 1 / (uᵀu + e) of iteration t, to the
// gradient of u_t.
template <class Real, class Count>
FK_INLINE void rank_one_through_v(Count rows, i64 t, double e, const RankOneNumbers<Real*>& x) {
  const Real *u = x.u + t * rows, *a = x.a + t * rows;
  const Real k = x.k[t], db = x.db[0], e_k = e * k;
  Real *du = x.work, *da = du + rows, *g_da = da + rows, *dr = x.dr;
  multiply_by_symmetric(rows, x.g, da, g_da);
  const Real da_a = sum_of<Real>(rows, [&](i64 m) { return da[m] * a[m]; });
  for (i64 i = 0; i < rows; ++i) {
    const Real left = k * da[i] + k * db * (k * u[i]);
    Real* const s = x.s + i * rows;
    each_row(rows, s, [&](i64 j, Real& out) { out += left * u[j]; });
  }
  each_row(rows, dr, [&](i64 m, Real& out) { out += e_k * (da[m] + 2.0 * db * (k * u[m])); });
  const Real dd = -k * (da_a + 2.0 * db * x.b[t]);
  each_row(rows, du, [&](i64 m, Real& out) { out = k * (g_da[m] + 2.0 * db * a[m]) + 2.0 * dd * u[m]; });
}

// What is left once iteration first + 1 is differentiated.
template <class Real, class Count>
FK_INLINE void rank_one_finish(Count rows, i64 first, double e, const RankOneNumbers<Real*>& x) {
  const Real* da = x.work + rows;
  Real *dr = x.dr, *s = x.s;
  // G is symmetric: each of its gradient's terms stands there as its transpose too.
  for (i64 i = 0; i < rows; ++i) {
    for (i64 j = 0; j <= i; ++j) s[j * rows + i] = s[i * rows + j] = s[i * rows + j] + s[j * rows + i];
  }
  if (first == 0) {
    each_row(rows, x.da, [&](i64 m, Real& out) { out = da[m]; });
    return;
  }
  // The v before the first differentiated iteration is a constant: v = k (Xᵀu + e), a = X v.
  const Real* u = x.u + first * rows;
  const Real k = x.k[first];
  for (i64 i = 0; i < rows; ++i) {
    for (i64 j = 0; j < rows; ++j) s[i * rows + j] += da[i] * (k * u[j]);
  }
  each_row(rows, dr, [&](i64 m, Real& out) { out += e * k * da[m]; });
  each_row(rows, x.da, [&](i64, Real& out) { out = Real{}; });
  x.db[0] = Real{};
}

// Differentiates iterations first + 1 .. iters.
template <class Real, class Count>
FK_INLINE void rank_one_backward(Count rows, i64 iters, i64 first, bool hals, double eps,
                                 const RankOneNumbers<Real*>& x) {
  const double e = hals ? eps : 0.0;
  each_row(rows * rows, x.s, [&](i64, Real& out) { out = Real{}; });
  each_row(rows, x.dr, [&](i64, Real& out) { out = Real{}; });
  const Real *u = x.u + iters * rows, *du = x.du, *h = x.h;
  const Real k = x.k[iters], dv_v = x.dv_v[0];
  each_row(rows, x.work, [&](i64 m, Real& out) { out = du[m] + k * h[m] - 2.0 * k * dv_v * u[m]; });
  rank_one_through_u(rows, iters, x);
  for (i64 t = iters - 1; t > first; --t) {
    rank_one_through_v(rows, t, e, x);
    rank_one_through_u(rows, t, x);
  }
  rank_one_finish(rows, first, e, x);
}

}  // namespace factorizer
