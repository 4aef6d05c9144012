// Rank 1 of one matrix X (rows x columns) by its sums over the columns (math/rank_one.h), over tiles of its
// columns (tiles.h): one pass for the sums, one for V.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/product.h"
#include "cpu/nmf/tiles.h"
#include "math/rank_one.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// What must be found out about X before rank 1 may be taken by its moments.
enum class Sign { known, nonnegative, positive };

// The solver; its constructor takes the memory that it needs from the arena.
template <class T>
class RankOne {
 public:
  // The M x M sums pay while they cost no more than some iterations.
  static constexpr i64 max_rows = 32;
  static constexpr i64 most_together = 8;  // matrices whose small sums are worked on side by side

  RankOne(const NMFOptions& o, Tiles<T>& tiles, bool backward, Arena& arena)
      : o_(o),
        tiles_(tiles),
        m_(tiles.rows),
        row_(round_up<T>(tiles.rows)),
        columns_(round_up<T>(tiles.columns)),
        sums_(tiles.count, (m_ + 2) * row_ + 1, arena) {
    double* const trace = arena.template take<double>(RankOneTrace::size(m_, o.num_iters));
    moments_ = arena.template take<double>((m_ + 2) * row_ + 1);
    matrix_ = {{moments_, moments_ + m_ * m_, moments_ + m_ * m_ + m_, 0.0},
               RankOneTrace(trace, m_, o.num_iters),
               arena.template take<double>(2 * m_)};
    weights_ = arena.template take<T>(m_ * (m_ + 4));
    v_ = arena.template take<T>(columns_);
    // Three rows that sums are taken of together.
    dv_ = arena.template take<T>(3 * columns_);
    if (!backward) return;
    double* const gradient = arena.template take<double>(RankOneGradient::size(m_));
    totals_ = arena.template take<double>(2 * row_ + 1);
    adjoint_ = {&matrix_, totals_, totals_ + row_, 0.0, RankOneGradient(gradient, m_)};
  }

  RankOne(const RankOne&) = delete;  // its adjoint points to its matrix
  RankOne& operator=(const RankOne&) = delete;

  Rows<T> v(i64 tile) const { return {v_ + tiles_.begin(tile), columns_}; }
  Rows<T> dv(i64 tile) const { return {dv_ + tiles_.begin(tile), columns_}; }
  double u(i64 m) const { return matrix_.trace.u[o_.num_iters * m_ + m]; }

  // Once write_v() calls done().
  void write_y(i64 tile, int worker) const {
    multiply<T>(Weights<T>::in_place(u_row(), m_, 1, 1, 1), v(tile), tiles_.y(tile, worker),
                tiles_.length(tile));
    tiles_.write_y(tile, worker);
  }

  // The sums over X's columns. False where X has not the sign it must have.
  bool sum_up(const T* v0, Sign sign) {
    if (sign != Sign::known && !has_sign(sign)) return false;
    copy(v0, tiles_.columns, v0_row());
    fill(v0_row() + tiles_.columns, columns_ - tiles_.columns, T(0));
    fill(ones_row(), columns_, T(1));
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile), begin = tiles_.begin(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      T* share = sums_.share(tile);
      multiply_by_transpose<T>(m_, x, m_, x, length, {share, row_}, false, Wanted::lower);
      multiply_by_transpose<T>(2, {ones_row() + begin, columns_}, m_, x, length, {share + m_ * row_, row_},
                               false);
      const Rows<const T> v0_tile{v0_row() + begin, 0};
      multiply_by_transpose<T>(1, v0_tile, 1, v0_tile, length, {share + (m_ + 2) * row_, row_}, false);
    });
    sums_.add(tiles_.count, 0, sums_.size(), moments_);
    for (i64 m = 0; m < m_ + 2; ++m) {  // G is symmetric; its rows follow one another, and R and A follow it
      for (i64 j = 0; j < m_; ++j) moments_[m * m_ + j] = moments_[m < j ? j * row_ + m : m * row_ + j];
    }
    matrix_.moments.b = moments_[(m_ + 2) * row_];
    return true;
  }

  // The iterations of some matrices of one shape, at most `most_together`, once their sums are there. False
  // at those where eps matters to MU: their iterations must be run.
  static void iterate(RankOne* const* solvers, i64 count, bool* applies) {
    RankOneMatrix* matrices[most_together];
    for (i64 i = 0; i < count; ++i) matrices[i] = &solvers[i]->matrix_;
    const RankOne& first = *solvers[0];
    constexpr double tolerance = sizeof(T) == 4 ? 1e-7 : 1e-12;
    with_small(first.m_, [&](auto rows) {  // whose loops unroll
      rank_one_forward(rows, double(first.tiles_.columns), first.o_.num_iters, first.o_.hals, first.o_.eps,
                       tolerance, matrices, count);
    });
    for (i64 i = 0; i < count; ++i) applies[i] = matrices[i]->applies;
  }

  // V, after the iterations; done(tile, worker) is called for each tile when it is there.
  template <class Done>
  void write_v(Done&& done) {
    // v = k (Xᵀu + e)
    const double k = matrix_.trace.k[o_.num_iters];
    T* w = weights_;
    for (i64 m = 0; m < m_; ++m) w[m] = T(k * u(m));
    for (i64 m = 0; m < m_; ++m) u_row()[m] = T(u(m));
    const T constant = T(k * (o_.hals ? o_.eps : 0.0));
    tiles_.each([&](i64 tile, i64, int worker) {
      const Rows<T> v = this->v(tile);
      multiply<T>(Weights<T>::in_place(w, 1, m_, 0, 1), tiles_.x(tile, worker), v, tiles_.length(tile));
      const i64 valid = tiles_.valid(tile);
      for (i64 n = 0; n < valid; ++n) v[0][n] += constant;
      done(tile, worker);
    });
  }

  // The sums over the columns of dY, once V is there. du and dv: the gradients of the last u and v, each on
  // its own; null for those of a loss of Y.
  void sum_up_gradients(const T* du, const T* dv) {
    T* u = weights_;
    for (i64 m = 0; m < m_; ++m) u[m] = T(this->u(m));
    // One pass: dv = dYᵀu, then dY v, X dv and dvᵀv.
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile);
      T* share = sums_.share(tile);
      const Rows<T> dv_tile = this->dv(tile), v_tile = v(tile);
      if (dv == nullptr) {
        const Rows<const T> dy = tiles_.dy(tile, worker);
        multiply<T>(Weights<T>::in_place(u, 1, m_, 0, 1), dy, dv_tile, length);
        multiply_by_transpose<T>(1, v_tile, m_, dy, length, {share, row_}, false);
      } else {
        copy(dv + tiles_.begin(tile), tiles_.valid(tile), dv_tile[0]);
        clear_padding(1, dv_tile, tiles_.valid(tile), length);
      }
      multiply_by_transpose<T>(1, dv_tile, m_, tiles_.x(tile, worker), length, {share + row_, row_}, false);
      multiply_by_transpose<T>(1, dv_tile, 1, v_tile, length, {share + 2 * row_, row_}, false);
    });
    sums_.add(tiles_.count, 0, 2 * row_ + 1, totals_);
    if (du != nullptr) {
      for (i64 m = 0; m < m_; ++m) totals_[m] = du[m];
    }
    adjoint_.dv_v = totals_[2 * row_];
  }

  // Differentiates the iterations of some matrices, after that.
  static void differentiate(RankOne* const* solvers, i64 count) {
    RankOneAdjoint* adjoints[most_together];
    for (i64 i = 0; i < count; ++i) adjoints[i] = &solvers[i]->adjoint_;
    const NMFOptions& o = solvers[0]->o_;
    with_small(solvers[0]->m_, [&](auto rows) {
      rank_one_backward(rows, o.num_iters, o.num_iters - o.grad_steps, o.hals, o.eps, adjoints, count);
    });
  }

  // dX, and in dv() the gradient of v0 where the iterations that are differentiated reach it.
  void write_dx() {
    const bool reaches_v0 = o_.grad_steps == o_.num_iters;
    const RankOneGradient& gradient = adjoint_.out;
    // dX = [s | k u | dr | da] [X; dv; 1; v0]
    const double k = matrix_.trace.k[o_.num_iters];
    const i64 stride = m_ + 3;
    T* w = weights_;
    for (i64 m = 0; m < m_; ++m) {
      for (i64 j = 0; j < m_; ++j) w[m * stride + j] = T(gradient.s[m * m_ + j]);
      w[m * stride + m_] = T(k * this->u(m));
      w[m * stride + m_ + 1] = T(gradient.dr[m]);
      w[m * stride + m_ + 2] = T(gradient.da[m]);
    }
    const T two_db = T(2.0 * gradient.db);
    const i64 added = reaches_v0 ? 3 : 2;
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      const Rows<T> dv_tile = this->dv(tile);
      const Rows<T> dx = tiles_.dx(tile, worker);
      multiply<T>(Weights<T>::in_place(w, m_, m_, stride, 1), x, dx, length);
      multiply<T>(Weights<T>::in_place(w + m_, m_, added, stride, 1), dv_tile, dx, length, {true});
      tiles_.write_dx(tile, worker, x);
      if (reaches_v0) {
        const Rows<const T> v0_tile{v0_row() + tiles_.begin(tile), 0};
        multiply<T>(Weights<T>::in_place(w + m_ + 2, 1, m_, 0, stride), x, dv_tile, length);
        multiply<T>(Weights<T>::in_place(&two_db, 1, 1, 0, 0), v0_tile, dv_tile, length, {true});
      }
    });
  }

 private:
  bool has_sign(Sign sign) {
    tiles_.each([&](i64 tile, i64, int worker) {
      const Rows<const T> x = tiles_.x(tile, worker);
      const i64 valid = tiles_.valid(tile);
      int violations = 0;
      for (i64 m = 0; m < m_; ++m) {
        const T* row = x[m];
        for (i64 n = 0; n < valid; ++n) violations |= sign == Sign::positive ? !(row[n] > 0) : row[n] < 0;
      }
      sums_.share(tile)[0] = T(violations);
    });
    for (i64 tile = 0; tile < tiles_.count; ++tile) {
      if (sums_.share(tile)[0] != T(0)) return false;
    }
    return true;
  }

  T* u_row() const { return weights_ + m_; }
  T* ones_row() const { return dv_ + columns_; }
  T* v0_row() const { return dv_ + 2 * columns_; }

  const NMFOptions o_;
  Tiles<T>& tiles_;
  const i64 m_, row_, columns_;  // row_, columns_: M and N padded
  const OrderedSums<T> sums_;
  double *moments_, *totals_ = nullptr;
  RankOneMatrix matrix_;
  RankOneAdjoint adjoint_;
  T *weights_, *v_, *dv_;  // weights: of the rows that a combination adds up
};

}  // namespace FK_ISA
}  // namespace factorizer
