// One update of a factor and its adjoint, for one lane of columns: the arithmetic of the solvers, once.
//
// A factor F has `rank` rows; the update takes the projections C (C_r = sum_m W_mr X_m for the other
// factor W) and the Gram matrix D = W^T W (rank x rank, row-major, symmetric):
//   MU:   F+_r = F_r C_r / (sum_j F_j D_jr + eps)
//   HALS: F+_r = max(0, (C_r - sum_{j<r} F+_j D_jr - sum_{j>r} F_j D_jr + eps) / (D_rr + eps)), r = 0, 1, ...
//
// `Lane` is what one instruction works on: a SIMD vector on a CPU, one number per thread on a GPU. A
// "Rows" gives row r of this lane: `Lane get(r)`, and where it is written, `void set(r, Lane)`.
#pragma once

#include "common/base.h"

namespace factorizer {

// NaN passes, as through torch.relu.
template <class Lane>
FK_INLINE Lane relu(Lane x) {
  return x < Lane{} ? Lane{} : x;
}

template <class T, class Rows, class Projections, class Out>
FK_INLINE void mu_update(i64 rank, T eps, const T* gram, const Rows& f, const Projections& c, Out& out) {
  FK_UNROLL
  for (i64 r = 0; r < rank; ++r) {
    auto q = f.get(0) * gram[r];
    FK_UNROLL
    for (i64 j = 1; j < rank; ++j) q += f.get(j) * gram[j * rank + r];
    out.set(r, f.get(r) * c.get(r) / (q + eps));
  }
}

template <class T, class Rows, class Projections, class Out>
FK_INLINE void hals_update(i64 rank, T eps, const T* gram, const Rows& f, const Projections& c, Out& out) {
  FK_UNROLL
  for (i64 r = 0; r < rank; ++r) {
    auto numerator = c.get(r) + eps;
    FK_UNROLL
    for (i64 j = 0; j < r; ++j) numerator -= out.get(j) * gram[j * rank + r];
    FK_UNROLL
    for (i64 j = r + 1; j < rank; ++j) numerator -= f.get(j) * gram[j * rank + r];
    out.set(r, relu(numerator / (gram[r * rank + r] + eps)));
  }
}

// Adjoints. In: df = the gradient of F+. Out: df = the gradient of F, dc = that of C, and what the
// gradient of D is made of: MU writes dq (dD_jr = sum over columns of F_j dq_r); for HALS it follows
// from dc alone: dD_jr = - sum over columns of (j <= r ? F+_j : F_j) dc_r.
template <class T, class Rows, class Projections, class InOut, class Out>
FK_INLINE void mu_update_backward(i64 rank, T eps, const T* gram, const Rows& f, const Rows& f_new,
                                  const Projections& c, InOut& df, Out& dc, Out& dq) {
  FK_UNROLL
  for (i64 r = 0; r < rank; ++r) {
    auto q = f.get(0) * gram[r];
    FK_UNROLL
    for (i64 j = 1; j < rank; ++j) q += f.get(j) * gram[j * rank + r];
    const auto dp = df.get(r) / (q + eps);
    dq.set(r, -dp * f_new.get(r));
    df.set(r, dp * c.get(r));
    dc.set(r, dp * f.get(r));  // last: it may lie where c does
  }
  FK_UNROLL
  for (i64 j = 0; j < rank; ++j) {
    auto sum = df.get(j);
    FK_UNROLL
    for (i64 r = 0; r < rank; ++r) sum += dq.get(r) * gram[j * rank + r];
    df.set(j, sum);
  }
}

template <class T, class Rows, class InOut, class Out>
FK_INLINE void hals_update_backward(i64 rank, T eps, const T* gram, const Rows& f_new, InOut& df, Out& dc) {
  FK_UNROLL
  for (i64 r = rank - 1; r >= 0; --r) {
    auto dn = df.get(r) / (gram[r * rank + r] + eps);
    dn = f_new.get(r) > decltype(dn){} ? dn : decltype(dn){};
    dc.set(r, dn);
    df.set(r, decltype(dn){});
    FK_UNROLL
    for (i64 j = 0; j < rank; ++j) {
      if (j != r) df.set(j, df.get(j) - dn * gram[j * rank + r]);
    }
  }
}

}  // namespace factorizer
