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

// One matrix' numbers among those of a group, which lie lane by lane.
struct Lane {
  double* first;
  i64 lanes;

  double& operator[](i64 i) const { return first[i * lanes]; }
};

// The iterations and their backward, of a group: Real is a double, or a vector with a matrix in each lane.
template <class Real>
void iterate_rank_one(i64 rows, i64 columns, const NMFOptions& o, double tolerance,
                      const RankOneNumbers<Real*>& numbers) {
  with_small(rows, [&](auto rows) {  // whose loops unroll
    rank_one_forward(rows, double(columns), o.num_iters, o.hals, o.eps, tolerance, numbers);
  });
}

template <class Real>
void differentiate_rank_one(i64 rows, const NMFOptions& o, const RankOneNumbers<Real*>& numbers) {
  with_small(rows, [&](auto rows) {
    rank_one_backward(rows, o.num_iters, o.num_iters - o.grad_steps, o.hals, o.eps, numbers);
  });
}

// The solver; its constructor takes the memory that it needs from the arena.
template <class T>
class RankOne {
 public:
  // The M x M sums pay while they cost no more than some iterations.
  static constexpr i64 max_rows = 32;

  // numbers: this matrix' of its group.
  RankOne(const NMFOptions& o, Tiles<T>& tiles, const RankOneNumbers<Lane>& numbers, Arena& arena)
      : o_(o),
        tiles_(tiles),
        numbers_(numbers),
        m_(tiles.rows),
        row_(round_up<T>(tiles.rows)),
        columns_(round_up<T>(tiles.columns)),
        sums_(tiles.count, (m_ + 2) * row_ + 1, arena) {
    totals_ = arena.template take<double>(sums_.size());
    u_ = arena.template take<T>(m_);
    weights_ = arena.template take<T>(m_ * (m_ + 3));
    v_ = arena.template take<T>(columns_);
    rows_ = arena.template take<T>(3 * columns_);
  }

  Rows<T> v(i64 tile) const { return {v_ + tiles_.begin(tile), columns_}; }
  Rows<T> dv(i64 tile) const { return {dv_row() + tiles_.begin(tile), columns_}; }
  double u(i64 m) const { return numbers_.u[o_.num_iters * m_ + m]; }

  // Once write_v() calls done().
  void write_y(i64 tile, int worker) const {
    multiply<T>(Weights<T>::in_place(u_, m_, 1, 1, 1), v(tile), tiles_.y(tile, worker), tiles_.length(tile));
    tiles_.write_y(tile, worker);
  }

  // The sums over X's columns. False where X has not the sign it must have.
  bool sum_up(const T* v0, Sign sign) const {
    if (sign != Sign::known && !has_sign(sign)) return false;
    copy(v0, tiles_.columns, v0_row());
    fill(v0_row() + tiles_.columns, columns_ - tiles_.columns, T(0));
    if (o_.hals) fill(ones_row(), columns_, T(1));
    // r = X 1 matters where eps does.
    T* const others = o_.hals ? ones_row() : v0_row();
    const i64 num_others = o_.hals ? 2 : 1;
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile), begin = tiles_.begin(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      T* share = sums_.share(tile);
      multiply_by_transpose<T>(m_, x, m_, x, length, {share, row_}, false, Wanted::lower);
      multiply_by_transpose<T>(num_others, {others + begin, columns_}, m_, x, length,
                               {share + (m_ + 2 - num_others) * row_, row_}, false);
      const Rows<const T> v0_tile{v0_row() + begin, 0};
      multiply_by_transpose<T>(1, v0_tile, 1, v0_tile, length, {share + (m_ + 2) * row_, row_}, false);
    });
    sums_.add(tiles_.count, 0, sums_.size(), totals_);
    for (i64 m = 0; m < m_; ++m) {
      for (i64 j = 0; j <= m; ++j) numbers_.g[m * m_ + j] = numbers_.g[j * m_ + m] = totals_[m * row_ + j];
      numbers_.r[m] = o_.hals ? totals_[m_ * row_ + m] : 0.0;
      numbers_.a[m] = totals_[(m_ + 1) * row_ + m];
    }
    numbers_.b[0] = totals_[(m_ + 2) * row_];
    return true;
  }
  // Numbers to go on with, of a matrix whose result is not asked for.
  static void clear_sums(i64 rows, const RankOneNumbers<Lane>& numbers) {
    for (i64 i = 0; i < rows * rows; ++i) numbers.g[i] = 0.0;
    for (i64 m = 0; m < rows; ++m) numbers.r[m] = numbers.a[m] = 0.0;
    numbers.b[0] = 0.0;
  }

  // V, after the iterations; done(tile, worker) is called for each tile when it is there.
  template <class Done>
  void write_v(Done&& done) const {
    // v = k (Xᵀu + e)
    const double k = numbers_.k[o_.num_iters];
    T* const w = weights_;
    for (i64 m = 0; m < m_; ++m) {
      u_[m] = T(u(m));
      w[m] = T(k * u(m));
    }
    const T constant = T(k * o_.eps);
    tiles_.each([&](i64 tile, i64, int worker) {
      const Rows<T> v = this->v(tile);
      multiply<T>(Weights<T>::in_place(w, 1, m_, 0, 1), tiles_.x(tile, worker), v, tiles_.length(tile));
      const i64 valid = tiles_.valid(tile);
      for (i64 n = 0; o_.hals && n < valid; ++n) v[0][n] += constant;
      done(tile, worker);
    });
  }

  // The sums over the columns of dY, once V is there. du and dv: the gradients of the last u and v, each on
  // its own; null for those of a loss of Y.
  void sum_up_gradients(const T* du, const T* dv) const {
    // One pass: dv = dYᵀu, then dY v, X dv and dvᵀv.
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile);
      T* share = sums_.share(tile);
      const Rows<T> dv_tile = this->dv(tile), v_tile = v(tile);
      if (dv == nullptr) {
        const Rows<const T> dy = tiles_.dy(tile, worker);
        multiply<T>(Weights<T>::in_place(u_, 1, m_, 0, 1), dy, dv_tile, length);
        multiply_by_transpose<T>(1, v_tile, m_, dy, length, {share, row_}, false);
      } else {
        copy(dv + tiles_.begin(tile), tiles_.valid(tile), dv_tile[0]);
        clear_padding(1, dv_tile, tiles_.valid(tile), length);
      }
      multiply_by_transpose<T>(1, dv_tile, m_, tiles_.x(tile, worker), length, {share + row_, row_}, false);
      multiply_by_transpose<T>(1, dv_tile, 1, v_tile, length, {share + 2 * row_, row_}, false);
    });
    sums_.add(tiles_.count, 0, 2 * row_ + 1, totals_);
    for (i64 m = 0; m < m_; ++m) {
      numbers_.du[m] = du != nullptr ? double(du[m]) : totals_[m];
      numbers_.h[m] = totals_[row_ + m];
    }
    numbers_.dv_v[0] = totals_[2 * row_];
  }
  static void clear_gradient_sums(i64 rows, const RankOneNumbers<Lane>& numbers) {
    for (i64 m = 0; m < rows; ++m) numbers.du[m] = numbers.h[m] = 0.0;
    numbers.dv_v[0] = 0.0;
  }

  // dX, once the iterations are differentiated, and in dv() the gradient of v0 where that reaches it and is
  // wanted.
  void write_dx(bool v0_wanted) const {
    const bool reaches_v0 = o_.grad_steps == o_.num_iters;
    // dX = [s | da | k u] [X; v0; dv] + dr
    const double k = numbers_.k[o_.num_iters];
    const i64 stride = m_ + 2;
    T *const w = weights_, *const bias = weights_ + m_ * stride;
    for (i64 m = 0; m < m_; ++m) {
      for (i64 j = 0; j < m_; ++j) w[m * stride + j] = T(numbers_.s[m * m_ + j]);
      w[m * stride + m_] = T(numbers_.da[m]);
      w[m * stride + m_ + 1] = T(k * u(m));
      bias[m] = T(numbers_.dr[m]);
    }
    const T two_db = T(2.0 * numbers_.db[0]);
    const i64 first = reaches_v0 ? 0 : 1;  // of v0 and dv
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile), begin = tiles_.begin(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      const Rows<T> dx = tiles_.dx(tile, worker);
      multiply<T>(Weights<T>::in_place(w, m_, m_, stride, 1), x, dx, length, {false, bias});
      multiply<T>(Weights<T>::in_place(w + m_ + first, m_, 2 - first, stride, 1),
                  {v0_row() + first * columns_ + begin, columns_}, dx, length, {true});
      tiles_.write_dx(tile, worker, x);
      if (reaches_v0 && v0_wanted) {
        const Rows<const T> v0_tile{v0_row() + begin, 0};
        multiply<T>(Weights<T>::in_place(w + m_, 1, m_, 0, stride), x, dv(tile), length);
        multiply<T>(Weights<T>::in_place(&two_db, 1, 1, 0, 0), v0_tile, dv(tile), length, {true});
      }
    });
  }

 private:
  bool has_sign(Sign sign) const {
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

  // Rows that sums are taken of together: 1, v0 and dv.
  T* ones_row() const { return rows_; }
  T* v0_row() const { return rows_ + columns_; }
  T* dv_row() const { return rows_ + 2 * columns_; }

  const NMFOptions& o_;
  Tiles<T>& tiles_;
  const RankOneNumbers<Lane> numbers_;
  const i64 m_, row_, columns_;  // row_, columns_: M and N padded
  const OrderedSums<T> sums_;
  double* totals_;   // of the sums
  T *u_, *weights_;  // weights: of the rows that a combination adds up
  T *v_, *rows_;
};

}  // namespace FK_ISA
}  // namespace factorizer
