// Factorising one matrix X (rows x columns) and differentiating it, over tiles of its columns.
//
// A Tiles object says where X comes from. A window is one tile that lies in cache; a long matrix is many,
// worked on in parallel and read anew in each pass. Sums over columns are formed tile by tile and added in
// the tiles' order, so that the result does not depend on the number of threads. It provides
//   i64 count, rows, columns           how many tiles; X's true size
//   i64 begin(tile), length(tile)      columns of a tile; length is padded to the vector width
//   i64 valid(tile)                    its columns without the padding
//   each(f)                            f(tile, worker) for every tile, in parallel where that pays
//   Rows<const T> x(tile, worker)      X's columns, zero in the padding
//   Rows<const T> dy(tile, worker)     the same of dY (only for a loss of Y)
//   void write_dx(tile, worker, fill)  fill(Rows<T>) computes dX's columns
#pragma once

#include "factor_update.h"
#include "rank_one.h"
#include "rows.h"

namespace factorizer {
namespace FK_ISA {

// Hands out pieces of one block of memory; with a null base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(i64 count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * i64(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
  i64 used() const { return used_; }

 private:
  char* base_;
  i64 used_ = 0;
};

template <class T>
inline void fill(T* p, i64 count, T value) {
  for (i64 i = 0; i < count; ++i) p[i] = value;
}

template <class T>
inline void copy(const T* from, i64 count, T* to) {
  for (i64 i = 0; i < count; ++i) to[i] = from[i];
}

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

template <class T>
inline void clear_padding(i64 rank, Rows<T> f, i64 valid, i64 length) {
  for (i64 r = 0; r < rank; ++r) fill(f[r] + valid, length - valid, T(0));
}

// out = the updated factor f, for `valid` of `length` columns; the padding becomes zero.
template <class T>
void update(const Options& o, const T* gram, Rows<const T> f, Rows<const T> c, Rows<T> out, i64 valid,
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
void update_backward(const Options& o, const T* gram, Rows<const T> f, Rows<const T> f_new, Rows<const T> c,
                     Rows<T> df, Rows<T> dc, Rows<T> dq, T* dgram, T* gram_scratch, i64 length) {
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

// The iterations as they are written in the reference, with what their backward needs.
template <class T, class Tiles>
class Iterations {
 public:
  // backward: keep the differentiated iterations' factors. Memory comes from the arena.
  Iterations(const Options& o, Tiles& tiles, bool backward, Arena& arena)
      : o_(o),
        tiles_(tiles),
        rank_(o.rank),
        rows_(round_up<T>(tiles.rows)),
        columns_(round_up<T>(tiles.columns)) {
    const i64 kept = backward ? o.grad_steps : (o.num_iters > 0 ? 1 : 0);
    first_ = o.num_iters - kept;
    slots_ = (kept > 1 ? kept : 1) + 1;
    u_ = arena.template take<T>(slots_ * rank_ * rows_);
    a_ = arena.template take<T>(slots_ * rank_ * rows_);
    v_ = arena.template take<T>(slots_ * rank_ * columns_);
    b_ = arena.template take<T>(slots_ * rank_ * rank_);
    d_ = arena.template take<T>(slots_ * rank_ * rank_);
    // A pass leaves one rank x rows and one rank x rank sum per tile.
    partial_size_ = rank_ * rows_ + rank_ * rank_;
    partials_ = arena.template take<T>(tiles.count * partial_size_);
    scratch_size_ = 2 * rank_ * tiles.max_length() + rank_ * rank_;
    scratch_ = arena.template take<T>(tiles.workers * scratch_size_);
    if (!backward) return;
    du_ = arena.template take<T>(rank_ * rows_);
    dv_ = arena.template take<T>(rank_ * columns_);
    da_ = arena.template take<T>(kept * rank_ * rows_);
    dc_ = arena.template take<T>(kept * rank_ * columns_);
    small_ = arena.template take<T>(3 * rank_ * rank_ + rank_ * rows_);
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
      add_partials(a_at(t).data, b_at(t));
      update<T>(o_, b_at(t), u_at(t - 1), a_at(t), u_at(t), tiles_.rows, rows_);
      gram<T>(rank_, u_at(t), rows_, d_at(t));
      pass_of_v(t);
    }
  }

  // Sets dU and dV from dY; without it the caller fills du() and dv(), zero in the padding.
  void start_backward_from_dy() {
    tiles_.each([&](i64 tile, int worker) {
      const Rows<const T> dy = tiles_.dy(tile, worker);
      T* partial = partials_ + tile * partial_size_;
      combine<T>(rank_, u().data, rows_, 1, tiles_.rows, dy, part(dv(), tile), tiles_.length(tile));
      fill(partial, partial_size_, T(0));
      correlate<T>(rank_, part(v(), tile), tiles_.rows, dy, tiles_.length(tile), partial, rows_);
    });
    add_partials(du_, small_);
  }

  // Leaves dX with the tiles, and dU0 and dV0 in du() and dv() where all the iterations are differentiated.
  void backward() {
    const bool reaches_v0 = first_ == 0;
    for (i64 t = o_.num_iters; t > first_; --t) {
      tiles_.each([&](i64 tile, int worker) { backward_pass_of_v(t, tile, worker); });
      T* dgram = small_;
      T* du_sum = small_ + 3 * rank_ * rank_;
      add_partials(du_sum, dgram);
      for (i64 i = 0; i < rank_ * rows_; ++i) du_[i] += du_sum[i];
      add_gram_gradient(dgram, u_at(t), du(), rows_);
      const i64 step = t - first_ - 1;
      const Rows<T> dq{du_sum, rows_};
      update_backward<T>(o_, b_at(t), u_at(t - 1), u_at(t), a_at(t), du(),
                         {da_ + step * rank_ * rows_, rows_}, dq, dgram, small_ + rank_ * rank_, rows_);
      copy(dgram, rank_ * rank_, small_ + 2 * rank_ * rank_);
      pending_ = true;
    }
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile), kept = o_.num_iters - first_;
      if (pending_ && reaches_v0) add_gradient_through_a(first_, tile, tiles_.x(tile, worker));
      tiles_.write_dx(tile, worker, [&](Rows<T> dx) {
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
      T* partial = partials_ + tile * partial_size_;
      fill(partial, partial_size_, T(0));
      correlate<T>(rank_, v, tiles_.rows, x, length, partial, rows_);
      gram<T>(rank_, v, length, partial + rank_ * rows_);
    });
  }

  void backward_pass_of_v(i64 t, i64 tile, int worker) {
    const i64 length = tiles_.length(tile);
    const Rows<const T> x = tiles_.x(tile, worker);
    if (pending_) add_gradient_through_a(t, tile, x);
    const Rows<T> c = scratch(worker, 0), dq = scratch(worker, 1);
    if (!o_.hals) combine<T>(rank_, u_at(t).data, rows_, 1, tiles_.rows, x, c, length);
    const Rows<T> dc = part({dc_ + (t - first_ - 1) * rank_ * columns_, columns_}, tile);
    T* partial = partials_ + tile * partial_size_;
    fill(partial, partial_size_, T(0));
    T* gram_scratch = scratch_ + worker * scratch_size_ + 2 * rank_ * tiles_.max_length();
    update_backward<T>(o_, d_at(t), part(v_at(t - 1), tile), part(v_at(t), tile), c, part(dv(), tile), dc, dq,
                       partial + rank_ * rows_, gram_scratch, length);
    correlate<T>(rank_, dc, tiles_.rows, x, length, partial, rows_);
  }

  // dV_t += Xᵀ dA + V_t (dB + dBᵀ), of the U step that came after V_t.
  void add_gradient_through_a(i64 t, i64 tile, Rows<const T> x) {
    const i64 length = tiles_.length(tile);
    const T* da = da_ + (t - first_) * rank_ * rows_;
    combine<T>(rank_, da, rows_, 1, tiles_.rows, x, part(dv(), tile), length, true);
    add_gram_gradient(small_ + 2 * rank_ * rank_, part(v_at(t), tile), part(dv(), tile), length);
  }

  // df += (dgram + dgramᵀ) f
  void add_gram_gradient(const T* dgram, Rows<const T> f, Rows<T> df, i64 length) const {
    combine<T>(rank_, dgram, rank_, 1, rank_, f, df, length, true);
    combine<T>(rank_, dgram, 1, rank_, rank_, f, df, length, true);
  }

  void add_partials(T* rows_sum, T* gram_sum) {
    for (i64 i = 0; i < partial_size_; ++i) {
      double total = 0.0;
      for (i64 tile = 0; tile < tiles_.count; ++tile) total += partials_[tile * partial_size_ + i];
      const i64 gram = i - rank_ * rows_;
      (gram < 0 ? rows_sum[i] : gram_sum[gram]) = T(total);
    }
  }

  const Options o_;
  Tiles& tiles_;
  const i64 rank_, rows_, columns_;  // rows and columns padded
  i64 first_, slots_, partial_size_, scratch_size_;
  bool pending_ = false;
  T *u_, *a_, *v_, *b_, *d_, *partials_, *scratch_;
  T *du_ = nullptr, *dv_ = nullptr, *da_ = nullptr, *dc_ = nullptr, *small_ = nullptr;
};

// What must be found out about X before rank 1 may be taken by its moments.
enum class Sign { known, nonnegative, positive };

// Rank 1 on nonnegative X: see rank_one.h.
template <class T, class Tiles>
class RankOne {
 public:
  // The M x M sums pay while they cost no more than some iterations.
  static constexpr i64 max_rows = 32;

  RankOne(const Options& o, Tiles& tiles, bool backward, Arena& arena)
      : o_(o), tiles_(tiles), m_(tiles.rows), columns_(round_up<T>(tiles.columns)) {
    trace_memory_ = arena.template take<double>(RankOneTrace::size(m_, o.num_iters));
    moments_ = arena.template take<double>(m_ * m_ + 2 * m_ + 1);
    work_ = arena.template take<double>(2 * m_);
    partial_size_ = m_ * m_ + 2 * m_ + 1;
    partials_ = arena.template take<T>(tiles.count * partial_size_);
    small_ = arena.template take<T>(m_ * (m_ + 4));
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
      T* partial = partials_ + tile * partial_size_;
      const i64 begin = tiles_.begin(tile);
      gram<T>(m_, x, length, partial);
      correlate<T>(2, {ones_row() + begin, columns_}, m_, x, length, partial + m_ * m_, m_);
      gram<T>(1, {v0_row() + begin, 0}, length, partial + m_ * m_ + 2 * m_);
    });
    add_partials(partial_size_, moments_);
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
    T* w = small_;
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
    T* u = small_;
    for (i64 m = 0; m < m_; ++m) u[m] = T(this->u(m));
    // One pass: dv = dYᵀu, then dY v, X dv and dvᵀv.
    tiles_.each([&](i64 tile, int worker) {
      const i64 length = tiles_.length(tile);
      T* partial = partials_ + tile * partial_size_;
      T* dv = dv_ + tiles_.begin(tile);
      const T* v = v_ + tiles_.begin(tile);
      if (from_dy) {
        const Rows<const T> dy = tiles_.dy(tile, worker);
        combine<T>(1, u, 0, 1, m_, dy, {dv, 0}, length);
        correlate<T>(1, {v, 0}, m_, dy, length, partial, m_);
      }
      correlate<T>(1, {dv, 0}, m_, tiles_.x(tile, worker), length, partial + m_, m_);
      correlate<T>(1, {dv, 0}, 1, {v, 0}, length, partial + 2 * m_, 1);
    });
    add_partials(2 * m_ + 1, totals_);
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
    T* w = small_;
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
      tiles_.write_dx(tile, worker, [&](Rows<T> dx) {
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
      partials_[tile * partial_size_] = T(violations);
    });
    for (i64 tile = 0; tile < tiles_.count; ++tile) {
      if (partials_[tile * partial_size_] != T(0)) return false;
    }
    return true;
  }

  T* ones_row() const { return dv_ + columns_; }
  T* v0_row() const { return dv_ + 2 * columns_; }
  RankOneTrace trace() const { return RankOneTrace(trace_memory_, m_, o_.num_iters); }
  Moments moments() const {
    return {moments_, moments_ + m_ * m_, moments_ + m_ * m_ + m_, moments_[m_ * m_ + 2 * m_]};
  }

  void add_partials(i64 count, double* totals) const {
    for (i64 i = 0; i < count; ++i) {
      totals[i] = 0.0;
      for (i64 tile = 0; tile < tiles_.count; ++tile) totals[i] += partials_[tile * partial_size_ + i];
    }
  }

  const Options o_;
  Tiles& tiles_;
  const i64 m_, columns_;  // columns padded
  i64 partial_size_;
  double *trace_memory_, *moments_, *work_, *gradient_memory_ = nullptr, *totals_ = nullptr;
  T *partials_, *small_, *v_, *dv_ = nullptr;
};

}  // namespace FK_ISA
}  // namespace factorizer
