// The iterations of one matrix X (rows x columns) as they are written in the reference, and their backward,
// over tiles of its columns (tiles.h).
//
// A pass over the tiles updates V and leaves, for the next update of U, each tile's share of A = X V and
// B = VᵀV.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/rows.h"
#include "math/factor_update.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// One vector of columns of a row list, as factor_update.h wants it.
template <class T>
struct LaneRows {
  T* data;
  i64 stride;

  LaneRows(Rows<T> rows, i64 column) : data(rows.data + column), stride(rows.stride) {}
  auto get(i64 r) const { return load(data + r * stride); }
  template <class V>
  void set(i64 r, V v) {
    store(data + r * stride, v);
  }
};

// out = the updated factor f, for `valid` of `length` columns; the padding becomes zero.
template <class T>
void update(const NMFOptions& o, const T* gram, Rows<const T> f, Rows<const T> c, Rows<T> out, i64 valid,
            i64 length) {
  const T eps = T(o.eps);
  with_small(o.rank, [&](auto rank) {
    for (i64 n = 0; n < length; n += Simd<T>::width) {
      const LaneRows<const T> fs(f, n), cs(c, n);
      LaneRows<T> outs(out, n);
      if (o.hals) {
        hals_update<T>(rank, eps, gram, fs, cs, outs);
      } else {
        mu_update<T>(rank, eps, gram, fs, cs, outs);
      }
    }
  });
  clear_padding(o.rank, out, valid, length);
}

// The adjoint: df in place, dc out, and dgram (rank x rank) out. dq and gram_scratch are scratch.
template <class T>
void update_backward(const NMFOptions& o, const T* gram, Rows<const T> f, Rows<const T> f_new,
                     Rows<const T> c, Rows<T> df, Rows<T> dc, Rows<T> dq, T* dgram, T* gram_scratch,
                     i64 length) {
  const T eps = T(o.eps);
  with_small(o.rank, [&](auto rank) {
    for (i64 n = 0; n < length; n += Simd<T>::width) {
      const LaneRows<const T> fs(f, n), news(f_new, n), cs(c, n);
      LaneRows<T> dfs(df, n), dcs(dc, n), dqs(dq, n);
      if (o.hals) {
        hals_update_backward<T>(rank, eps, gram, news, dfs, dcs);
      } else {
        mu_update_backward<T>(rank, eps, gram, fs, news, cs, dfs, dcs, dqs);
      }
    }
  });
  if (!o.hals) {
    correlate<T>(o.rank, f, o.rank, dq, length, dgram, o.rank);
    return;
  }
  correlate<T>(o.rank, f, o.rank, dc, length, dgram, o.rank);
  correlate<T>(o.rank, f_new, o.rank, dc, length, gram_scratch, o.rank);
  for (i64 j = 0; j < o.rank; ++j) {
    for (i64 r = 0; r < o.rank; ++r) {
      T& entry = dgram[j * o.rank + r];
      entry = -(j <= r ? gram_scratch[j * o.rank + r] : entry);
    }
  }
}

// The solver; its constructor takes the memory that it needs from the arena.
template <class T, class Tiles>
class Iterations {
 public:
  // backward: keep the differentiated iterations' factors.
  Iterations(const NMFOptions& o, Tiles& tiles, bool backward, Arena& arena)
      : o_(o),
        tiles_(tiles),
        rank_(o.rank),
        rows_(round_up<T>(tiles.rows)),
        columns_(round_up<T>(tiles.columns)),
        sums_(tiles.count, rank_ * rows_ + rank_ * rank_, arena) {
    const i64 kept = backward ? o.grad_steps : (o.num_iters > 0 ? 1 : 0);
    first_ = o.num_iters - kept;
    slots_ = (kept > 1 ? kept : 1) + 1;
    u_ = arena.template take<T>(slots_ * rank_ * rows_);
    a_ = arena.template take<T>(slots_ * rank_ * rows_);
    v_ = arena.template take<T>(slots_ * rank_ * columns_);
    b_ = arena.template take<T>(slots_ * rank_ * rank_);
    d_ = arena.template take<T>(slots_ * rank_ * rank_);
    scratch_size_ = 2 * rank_ * tiles.max_length() + rank_ * rank_;
    scratch_ = arena.template take<T>(tiles.workers * scratch_size_);
    if (!backward) return;
    du_ = arena.template take<T>(rank_ * rows_);
    dv_ = arena.template take<T>(rank_ * columns_);
    da_ = arena.template take<T>(kept * rank_ * rows_);
    dc_ = arena.template take<T>(kept * rank_ * columns_);
    du_sum_ = arena.template take<T>(rank_ * rows_);
    dd_ = arena.template take<T>(rank_ * rank_);
    db_ = arena.template take<T>(rank_ * rank_);
    gram_scratch_ = arena.template take<T>(rank_ * rank_);
  }

  Rows<T> u() const { return u_at(o_.num_iters); }
  Rows<T> v() const { return v_at(o_.num_iters); }
  Rows<T> du() const { return {du_, rows_}; }
  Rows<T> dv() const { return {dv_, columns_}; }

  void forward(const T* u0, const T* v0) {
    load_factor(u0, tiles_.rows, u_at(0), rows_);
    load_factor(v0, tiles_.columns, v_at(0), columns_);
    if (o_.num_iters > 0) pass_of_v(0);
    for (i64 t = 1; t <= o_.num_iters; ++t) {
      add_shares(a_at(t).data, b_at(t));
      update<T>(o_, b_at(t), u_at(t - 1), a_at(t), u_at(t), tiles_.rows, rows_);
      gram<T>(rank_, u_at(t), rows_, d_at(t));
      pass_of_v(t);
    }
  }

  // Sets dU and dV from dY; without it the caller fills du() and dv(), zero in the padding.
  void start_backward_from_dy() {
    tiles_.each([&](i64 tile, int worker) {
      const Rows<const T> dy = tiles_.dy(tile, worker);
      T* share = cleared_share(tile);
      combine<T>(rank_, u().data, rows_, 1, tiles_.rows, dy, part(dv(), tile), tiles_.length(tile));
      correlate<T>(rank_, part(v(), tile), tiles_.rows, dy, tiles_.length(tile), share, rows_);
    });
    sums_.add(tiles_.count, 0, rank_ * rows_, du_);
  }

  // Leaves dX with the tiles, and dU0 and dV0 in du() and dv() where all the iterations are differentiated.
  void backward() {
    const bool reaches_v0 = first_ == 0;
    for (i64 t = o_.num_iters; t > first_; --t) {
      tiles_.each([&](i64 tile, int worker) { backward_pass_of_v(t, tile, worker); });
      add_shares(du_sum_, dd_);
      for (i64 i = 0; i < rank_ * rows_; ++i) du_[i] += du_sum_[i];
      add_gram_gradient(dd_, u_at(t), du(), rows_);
      const Rows<T> da{da_ + (t - first_ - 1) * rank_ * rows_, rows_};
      const Rows<T> dq{du_sum_, rows_};  // the sum has been used
      update_backward<T>(o_, b_at(t), u_at(t - 1), u_at(t), a_at(t), du(), da, dq, db_, gram_scratch_, rows_);
      u_step_pending_ = true;
    }
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile), kept = o_.num_iters - first_;
      const Rows<const T> x = tiles_.x(tile, worker);
      if (u_step_pending_ && reaches_v0) add_gradient_through_a(first_, tile, x);
      tiles_.write_dx(tile, worker, x, [&](Rows<T> dx) {
        // dX = sum_t dA_tᵀ V_{t-1} + U_tᵀ dC_t, in two contractions over all the iterations at once.
        combine<T>(tiles_.rows, da_, 1, rows_, kept * rank_, part({v_, columns_}, tile), dx, length);
        combine<T>(tiles_.rows, u_at(first_ + 1).data, 1, rows_, kept * rank_, part({dc_, columns_}, tile),
                   dx, length, true);
      });
    });
  }

 private:
  // Iterations first_ .. num_iters are kept; those before alternate between two slots.
  i64 slot(i64 t) const { return t < first_ ? (first_ - t) & 1 : t - first_; }
  Rows<T> u_at(i64 t) const { return {u_ + slot(t) * rank_ * rows_, rows_}; }
  Rows<T> v_at(i64 t) const { return {v_ + slot(t) * rank_ * columns_, columns_}; }
  Rows<T> a_at(i64 t) const { return {a_ + slot(t) * rank_ * rows_, rows_}; }
  T* b_at(i64 t) const { return b_ + slot(t) * rank_ * rank_; }
  T* d_at(i64 t) const { return d_ + slot(t) * rank_ * rank_; }
  Rows<T> part(Rows<T> v, i64 tile) const { return {v.data + tiles_.begin(tile), v.stride}; }
  Rows<T> scratch(int worker, i64 index) const {
    return {scratch_ + worker * scratch_size_ + index * rank_ * tiles_.max_length(), tiles_.max_length()};
  }

  void load_factor(const T* from, i64 valid, Rows<T> to, i64 length) const {
    for (i64 r = 0; r < rank_; ++r) copy(from + r * valid, valid, to[r]);
    clear_padding(rank_, to, valid, length);
  }

  // Update V_t (t > 0), then, for the next U, A = X V and B = VᵀV.
  void pass_of_v(i64 t) {
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile);
      const Rows<const T> x = tiles_.x(tile, worker);
      const Rows<T> v = part(v_at(t), tile);
      if (t > 0) {
        const Rows<T> c = scratch(worker, 0);
        combine<T>(rank_, u_at(t).data, rows_, 1, tiles_.rows, x, c, length);
        update<T>(o_, d_at(t), part(v_at(t - 1), tile), c, v, tiles_.valid(tile), length);
      }
      if (t == o_.num_iters) return;
      T* share = cleared_share(tile);
      correlate<T>(rank_, v, tiles_.rows, x, length, share, rows_);
      gram<T>(rank_, v, length, share + rank_ * rows_);
    });
  }

  void backward_pass_of_v(i64 t, i64 tile, int worker) {
    const i64 length = tiles_.length(tile);
    const Rows<const T> x = tiles_.x(tile, worker);
    if (u_step_pending_) add_gradient_through_a(t, tile, x);
    const Rows<T> c = scratch(worker, 0), dq = scratch(worker, 1);
    if (!o_.hals) combine<T>(rank_, u_at(t).data, rows_, 1, tiles_.rows, x, c, length);
    const Rows<T> dc = part({dc_ + (t - first_ - 1) * rank_ * columns_, columns_}, tile);
    T* share = cleared_share(tile);
    T* gram_scratch = scratch_ + worker * scratch_size_ + 2 * rank_ * tiles_.max_length();
    update_backward<T>(o_, d_at(t), part(v_at(t - 1), tile), part(v_at(t), tile), c, part(dv(), tile), dc, dq,
                       share + rank_ * rows_, gram_scratch, length);
    correlate<T>(rank_, dc, tiles_.rows, x, length, share, rows_);
  }

  // dV_t += Xᵀ dA + V_t (dB + dBᵀ), of the U step that came after V_t.
  void add_gradient_through_a(i64 t, i64 tile, Rows<const T> x) {
    const i64 length = tiles_.length(tile);
    const T* da = da_ + (t - first_) * rank_ * rows_;
    combine<T>(rank_, da, rows_, 1, tiles_.rows, x, part(dv(), tile), length, true);
    add_gram_gradient(db_, part(v_at(t), tile), part(dv(), tile), length);
  }

  // df += (dgram + dgramᵀ) f
  void add_gram_gradient(const T* dgram, Rows<const T> f, Rows<T> df, i64 length) const {
    combine<T>(rank_, dgram, rank_, 1, rank_, f, df, length, true);
    combine<T>(rank_, dgram, 1, rank_, rank_, f, df, length, true);
  }

  // A tile's share of a pass' two sums: rank x rows, then rank x rank.
  T* cleared_share(i64 tile) const {
    T* share = sums_.share(tile);
    fill(share, sums_.size(), T(0));  // the padding of its rows is not written
    return share;
  }
  void add_shares(T* rows_sum, T* gram_sum) const {
    sums_.add(tiles_.count, 0, rank_ * rows_, rows_sum);
    sums_.add(tiles_.count, rank_ * rows_, rank_ * rank_, gram_sum);
  }

  const NMFOptions o_;
  Tiles& tiles_;
  const i64 rank_, rows_, columns_;  // rows and columns padded
  const OrderedSums<T> sums_;
  i64 first_, slots_, scratch_size_;
  bool u_step_pending_ = false;  // V's gradient lacks what comes through the A and B of the U step after it
  T *u_, *a_, *v_, *b_, *d_, *scratch_;
  // Of the backward: gradients of the last U and V, of every A and C; then those of one D and one B.
  T *du_ = nullptr, *dv_ = nullptr, *da_ = nullptr, *dc_ = nullptr;
  T *du_sum_ = nullptr, *dd_ = nullptr, *db_ = nullptr, *gram_scratch_ = nullptr;
};

}  // namespace FK_ISA
}  // namespace factorizer
