// Rank 1 of one matrix X (rows x columns) by its sums over the columns (math/rank_one.h), over tiles of its
// columns (tiles.h): one pass for the sums, one for V.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "math/rank_one.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// What must be found out about X before rank 1 may be taken by its moments.
enum class Sign { known, nonnegative, positive };

// The solver; its constructor takes the memory that it needs from the arena.
template <class T, class Tiles>
class RankOne {
 public:
  // The M x M sums pay while they cost no more than some iterations.
  static constexpr i64 max_rows = 32;

  RankOne(const NMFOptions& o, Tiles& tiles, bool backward, Arena& arena)
      : o_(o),
        tiles_(tiles),
        m_(tiles.rows),
        columns_(round_up<T>(tiles.columns)),
        sums_(tiles.count, m_ * m_ + 2 * m_ + 1, arena) {
    trace_memory_ = arena.template take<double>(RankOneTrace::size(m_, o.num_iters));
    moments_ = arena.template take<double>(m_ * m_ + 2 * m_ + 1);
    work_ = arena.template take<double>(2 * m_);
    weights_ = arena.template take<T>(m_ * (m_ + 4));
    v_ = arena.template take<T>(columns_);
    // Three rows that sums are taken of together.
    dv_ = arena.template take<T>(3 * columns_);
    if (!backward) return;
    gradient_memory_ = arena.template take<double>(RankOneGradient::size(m_));
    totals_ = arena.template take<double>(2 * m_ + 1);
  }

  const T* v() const { return v_; }
  T* dv() const { return dv_; }
  double u(i64 m) const { return trace().u[o_.num_iters * m_ + m]; }

  // False where X has not the sign it must have, or where eps matters to MU: then the iterations must be run.
  bool forward(const T* v0, Sign sign) {
    if (sign != Sign::known && !has_sign(sign)) return false;
    copy(v0, tiles_.columns, v0_row());
    fill(v0_row() + tiles_.columns, columns_ - tiles_.columns, T(0));
    fill(ones_row(), columns_, T(1));
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      T* share = sums_.share(tile);
      const i64 begin = tiles_.begin(tile);
      gram<T>(m_, x, length, share);
      correlate<T>(2, {ones_row() + begin, columns_}, m_, x, length, share + m_ * m_, m_);
      gram<T>(1, {v0_row() + begin, 0}, length, share + m_ * m_ + 2 * m_);
    });
    sums_.add(tiles_.count, 0, sums_.size(), moments_);
    RankOneTrace steps = trace();
    const double tolerance = sizeof(T) == 4 ? 1e-7 : 1e-12;
    bool done = false;
    with_small(m_, [&](auto rows) {
      done = rank_one_forward(rows, double(tiles_.columns), o_.num_iters, o_.hals, o_.eps, tolerance,
                              moments(), steps, work_);
    });
    if (!done) return false;
    // v = k (Xᵀu + e)
    const double k = steps.k[o_.num_iters];
    T* w = weights_;
    for (i64 m = 0; m < m_; ++m) w[m] = T(k * u(m));
    const T constant = T(k * (o_.hals ? o_.eps : 0.0));
    tiles_.each([&](i64 tile, int worker) {
      T* v = v_ + tiles_.begin(tile);
      combine<T>(1, w, 0, 1, m_, tiles_.x(tile, worker), {v, 0}, tiles_.length(tile));
      for (i64 n = 0; n < tiles_.valid(tile); ++n) v[n] += constant;
    });
    return true;
  }

  // du: the gradient of the last u on its own; dv() holds that of the last v, or from_dy computes both.
  void backward(const T* du, bool from_dy) {
    const bool reaches_v0 = o_.grad_steps == o_.num_iters;
    T* u = weights_;
    for (i64 m = 0; m < m_; ++m) u[m] = T(this->u(m));
    // One pass: dv = dYᵀu, then dY v, X dv and dvᵀv.
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile);
      T* share = sums_.share(tile);
      T* dv = dv_ + tiles_.begin(tile);
      const T* v = v_ + tiles_.begin(tile);
      if (from_dy) {
        const Rows<const T> dy = tiles_.dy(tile, worker);
        combine<T>(1, u, 0, 1, m_, dy, {dv, 0}, length);
        correlate<T>(1, {v, 0}, m_, dy, length, share, m_);
      }
      correlate<T>(1, {dv, 0}, m_, tiles_.x(tile, worker), length, share + m_, m_);
      correlate<T>(1, {dv, 0}, 1, {v, 0}, length, share + 2 * m_, 1);
    });
    sums_.add(tiles_.count, 0, 2 * m_ + 1, totals_);
    if (!from_dy) {
      for (i64 m = 0; m < m_; ++m) totals_[m] = du[m];
    }
    RankOneGradient gradient(gradient_memory_, m_);
    const RankOneTrace steps = trace();
    rank_one_backward(m_, o_.num_iters, o_.num_iters - o_.grad_steps, o_.hals, o_.eps, moments(), steps,
                      totals_, totals_ + m_, totals_[2 * m_], gradient);

    // dX = [s | k u | dr | da] [X; dv; 1; v0]
    const double k = steps.k[o_.num_iters];
    const i64 stride = m_ + 3;
    T* w = weights_;
    for (i64 m = 0; m < m_; ++m) {
      for (i64 j = 0; j < m_; ++j) w[m * stride + j] = T(gradient.s[m * m_ + j]);
      w[m * stride + m_] = T(k * this->u(m));
      w[m * stride + m_ + 1] = T(gradient.dr[m]);
      w[m * stride + m_ + 2] = T(gradient.da[m]);
    }
    const T two_db = T(2.0 * gradient.db);
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile), begin = tiles_.begin(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      tiles_.write_dx(tile, worker, x, [&](Rows<T> dx) {
        combine<T>(m_, w, stride, 1, m_, x, dx, length);
        combine<T>(m_, w + m_, stride, 1, reaches_v0 ? 3 : 2, {dv_ + begin, columns_}, dx, length, true);
      });
      if (reaches_v0) {
        combine<T>(1, w + m_ + 2, 0, stride, m_, x, {dv_ + begin, 0}, length);
        combine<T>(1, &two_db, 0, 0, 1, {v0_row() + begin, 0}, {dv_ + begin, 0}, length, true);
      }
    });
  }

 private:
  bool has_sign(Sign sign) {
    tiles_.each([&](i64 tile, int worker) {
      const Rows<const T> x = tiles_.x(tile, worker);
      int violations = 0;
      for (i64 m = 0; m < m_; ++m) {
        const T* row = x[m];
        for (i64 n = 0; n < tiles_.valid(tile); ++n)
          violations |= sign == Sign::positive ? !(row[n] > 0) : row[n] < 0;
      }
      sums_.share(tile)[0] = T(violations);
    });
    for (i64 tile = 0; tile < tiles_.count; ++tile) {
      if (sums_.share(tile)[0] != T(0)) return false;
    }
    return true;
  }

  T* ones_row() const { return dv_ + columns_; }
  T* v0_row() const { return dv_ + 2 * columns_; }
  RankOneTrace trace() const { return RankOneTrace(trace_memory_, m_, o_.num_iters); }
  Moments moments() const {
    return {moments_, moments_ + m_ * m_, moments_ + m_ * m_ + m_, moments_[m_ * m_ + 2 * m_]};
  }

  const NMFOptions o_;
  Tiles& tiles_;
  const i64 m_, columns_;  // columns padded
  const OrderedSums<T> sums_;
  double *trace_memory_, *moments_, *work_, *gradient_memory_ = nullptr, *totals_ = nullptr;
  T *weights_, *v_, *dv_ = nullptr;  // weights: of the rows that a combination adds up
};

}  // namespace FK_ISA
}  // namespace factorizer
