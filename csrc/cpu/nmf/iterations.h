// The iterations of one matrix X (rows x columns) as they are written in the reference, and their backward,
// over tiles of its columns (tiles.h).
//
// A pass over the tiles updates V and leaves, for the next update of U, each section's share of A = X V and
// B = VᵀV. U is updated by parts of its rows. Factors lie transposed, rank rows; those of V tile by tile, all
// that belongs to a tile side by side.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/product.h"
#include "cpu/nmf/tiles.h"
#include "cpu/nmf/updates.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// The solver; its constructor takes the memory that it needs from the arena.
template <class T>
class Iterations {
 public:
  // backward: keep the differentiated iterations' factors.
  Iterations(const NMFOptions& o, Tiles<T>& tiles, bool backward, Arena& arena)
      : o_(o),
        tiles_(tiles),
        rank_(o.rank),
        kept_(backward ? o.grad_steps : 0),
        first_(o.num_iters - kept_),
        gram_stride_(gram_stride<T>(o.rank)),
        rows_(row_stride<T>(tiles.rows)),
        stride_(row_stride<T>(tiles.max_length())),
        keeps_work_(keeps_work(o)),
        tile_rows_((kept_ + 1) * rank_ + (backward ? (kept_ + 1) * rank_ : 0) +
                   (keeps_work_ ? kept_ * rank_ : 0)),
        u_parts_((tiles.rows + u_part - 1) / u_part),
        sums_(tiles.sections.count, (tiles.rows + rank_) * gram_stride_, arena),
        u_sums_(backward ? u_parts_ : 0, rank_ * gram_stride_, arena) {
    const i64 grams = kept_ > 1 ? kept_ : 1;
    u_ = arena.template take<T>((kept_ + 1) * rank_ * rows_);
    a_ = arena.template take<T>(grams * rank_ * rows_);
    u_work_ = arena.template take<T>(keeps_work_ ? kept_ * rank_ * rows_ : 0);
    v_ = arena.template take<T>(tiles.count * tile_rows_ * stride_);
    b_ = arena.template take<T>(grams * rank_ * gram_stride_);
    d_ = arena.template take<T>(grams * rank_ * gram_stride_);
    const i64 longest = row_stride<T>(u_part) > stride_ ? row_stride<T>(u_part) : stride_;
    scratch_size_ = 2 * rank_ * longest + u_part * gram_stride_;
    scratch_ = arena.template take<T>(tiles.workers * scratch_size_);
    // Weights are packed where many tiles use them.
    packed_ = packs() ? arena.template take<T>(2 * (kept_ + 1) * rank_ * tiles.rows) : nullptr;
    if (!backward) return;
    du_ = arena.template take<T>(rank_ * rows_);
    dd_ = arena.template take<T>(rank_ * gram_stride_);
    db_ = arena.template take<T>(rank_ * gram_stride_);
  }

  Rows<T> u() const { return u_at(o_.num_iters); }
  Rows<T> v(i64 tile) const { return v_at(o_.num_iters, tile); }
  Rows<T> du() const { return {du_, rows_}; }
  Rows<T> dv(i64 tile) const { return tile_row(tile, 2 * kept_ + 1); }

  void write_y(i64 tile, int worker) const {
    const Weights<T> u = Weights<T>::in_place(this->u().data, tiles_.rows, rank_, 1, rows_);
    multiply<T>(u, v(tile), tiles_.y(tile, worker), tiles_.length(tile));
    tiles_.write_y(tile, worker);
  }

  // done(tile, worker) is called for each tile when its last V is there.
  template <class Done>
  void forward(const T* u0, const T* v0, Done&& done) {
    load_rows(u0, tiles_.rows, 0, tiles_.rows, u_at(0));
    for (i64 t = 0; t <= o_.num_iters; ++t) {
      if (t > 0) u_step(t);
      const Weights<T> u = packed(Weights<T>::in_place(u_at(t).data, rank_, tiles_.rows, rows_, 1), packed_);
      tiles_.each([&](i64 tile, i64 section, int worker) {
        if (t == 0) load_rows(v0, tiles_.columns, tiles_.begin(tile), tiles_.valid(tile), v_at(0, tile));
        if (o_.num_iters > 0) pass_of_v(t, u, tile, section, worker);
        if (t == o_.num_iters) done(tile, worker);
      });
    }
  }

  // Sets dU and dV: from dY,
  void start_backward() {
    const Weights<T> u = packed(Weights<T>::in_place(this->u().data, rank_, tiles_.rows, rows_, 1), packed_);
    tiles_.each([&](i64 tile, i64 section, int worker) {
      const i64 length = tiles_.length(tile);
      const Rows<const T> dy = tiles_.dy(tile, worker);
      multiply<T>(u, dy, dv(tile), length);
      multiply_by_transpose<T>(tiles_.rows, dy, rank_, v(tile), length, a_share(section),
                               continues(tile, section));
    });
    tiles_.parallel(u_parts_, [&](i64 part, int worker) { add_shares(part, worker, du(), false); });
  }
  // or from the gradients of the factors.
  void start_backward(const T* du_rows, const T* dv_rows) {
    load_rows(du_rows, tiles_.rows, 0, tiles_.rows, du());
    tiles_.each([&](i64 tile, i64, int) {
      load_rows(dv_rows, tiles_.columns, tiles_.begin(tile), tiles_.valid(tile), dv(tile));
    });
  }

  // Leaves dX with the tiles, and with reaches_factors dU0 and dV0 in du() and dv(): all the iterations must
  // then be differentiated.
  void backward(bool reaches_factors) {
    for (i64 t = o_.num_iters; t > first_; --t) {
      const bool reaches_old = t > first_ + 1 || reaches_factors;
      const Weights<T> da = weights_of_a(t + 1);
      tiles_.each([&](i64 tile, i64 section, int worker) {
        backward_pass_of_v(t, da, tile, section, worker, reaches_old);
      });
      u_step_backward(t, reaches_old);
    }
    // dX = sum_t dA_tᵀ V_{t-1} + U_tᵀ dC_t, in two products over all the iterations at once.
    const i64 depth = kept_ * rank_;
    const bool reaches_v0 = reaches_factors && kept_ > 0;
    const Weights<T> da_first = reaches_v0 ? weights_of_a(first_ + 1) : Weights<T>{};
    T* rest = packs() ? packed_ + rank_ * tiles_.rows : nullptr;
    const Weights<T> da = packed(Weights<T>::in_place(a_, tiles_.rows, depth, 1, rows_), rest);
    const Weights<T> u = packed(Weights<T>::in_place(u_ + rank_ * rows_, tiles_.rows, depth, 1, rows_),
                                packs() ? rest + depth * tiles_.rows : nullptr);
    tiles_.each([&](i64 tile, i64, int worker) {
      const i64 length = tiles_.length(tile);
      const Rows<const T> x = reaches_v0 || o_.relu ? tiles_.x(tile, worker) : Rows<const T>{};
      if (reaches_v0) add_gradient_through_a(0, da_first, tile, x);
      const Rows<T> dx = tiles_.dx(tile, worker);
      multiply<T>(da, tile_row(tile, 0), dx, length);
      multiply<T>(u, tile_row(tile, kept_ + 1), dx, length, {true});
      tiles_.write_dx(tile, worker, x);
    });
  }

 private:
  static constexpr i64 u_part = 128;  // rows of U that one task updates

  // Iterations first_ .. num_iters are kept; those before are updated in place.
  i64 slot(i64 t) const { return t > first_ ? t - first_ : 0; }
  i64 step(i64 t) const { return t > first_ ? t - first_ - 1 : 0; }
  Rows<T> u_at(i64 t) const { return {u_ + slot(t) * rank_ * rows_, rows_}; }
  Rows<T> a_at(i64 t) const { return {a_ + step(t) * rank_ * rows_, rows_}; }
  Rows<T> b_at(i64 t) const { return {b_ + step(t) * rank_ * gram_stride_, gram_stride_}; }
  Rows<T> d_at(i64 t) const { return {d_ + step(t) * rank_ * gram_stride_, gram_stride_}; }
  // What belongs to a tile, rank rows each: V of each slot, C of each step (in the backward its gradient),
  // dV, and what each step's update keeps.
  Rows<T> tile_row(i64 tile, i64 index) const {
    return {v_ + (tile * tile_rows_ + index * rank_) * stride_, stride_};
  }
  Rows<T> v_at(i64 t, i64 tile) const { return tile_row(tile, slot(t)); }
  Rows<T> c_at(i64 t, i64 tile, int worker) const {
    return t > first_ ? tile_row(tile, kept_ + 1 + step(t)) : scratch(worker, 0);
  }
  // The work rows of V's update in a tile, and of U's.
  Rows<T> v_work(i64 t, i64 tile, int worker) const {
    return keeps_work_ && t > first_ ? tile_row(tile, 2 * (kept_ + 1) + step(t)) : scratch(worker, 1);
  }
  Rows<T> u_work(i64 t, i64 part, int worker) const {
    if (!keeps_work_ || t <= first_) return scratch(worker, 1);
    return of_part({u_work_ + step(t) * rank_ * rows_, rows_}, part);
  }
  Rows<T> scratch(int worker, i64 index) const {
    const i64 stride = row_stride<T>(u_part) > stride_ ? row_stride<T>(u_part) : stride_;
    return {scratch_ + worker * scratch_size_ + index * rank_ * stride, stride};
  }
  // A section's shares of a pass' two sums.
  Rows<T> a_share(i64 section) const { return {sums_.share(section), gram_stride_}; }
  Rows<T> b_share(i64 section) const {
    return {sums_.share(section) + tiles_.rows * gram_stride_, gram_stride_};
  }
  bool continues(i64 tile, i64 section) const { return tile > tiles_.sections.begin(section); }

  bool packs() const { return tiles_.count > 2; }
  Weights<T> packed(const Weights<T>& w, T* memory) const {
    return packs() ? Weights<T>::pack(w.data, w.rows, w.depth, w.row, w.column, memory) : w;
  }
  Weights<T> weights_of_a(i64 t) const {
    if (t > o_.num_iters) return {};
    return packed(Weights<T>::in_place(a_at(t).data, rank_, tiles_.rows, rows_, 1), packed_);
  }

  void load_rows(const T* from, i64 extent, i64 begin, i64 valid, Rows<T> to) const {
    for (i64 r = 0; r < rank_; ++r) copy(from + r * extent + begin, valid, to[r]);
    clear_padding(rank_, to, valid, round_up<T>(valid));
  }

  // --- Forward ---

  // Update V_t (t > 0), then, for the next U, A = X V and B = VᵀV.
  void pass_of_v(i64 t, const Weights<T>& u, i64 tile, i64 section, int worker) {
    const i64 length = tiles_.length(tile);
    const Rows<const T> x = tiles_.x(tile, worker);
    const Rows<T> v = v_at(t, tile);
    if (t > 0) {
      const Rows<T> c = c_at(t, tile, worker);
      multiply<T>(u, x, c, length);
      update<T>(o_, d_at(t), v_at(t - 1, tile), c, v, v_work(t, tile, worker), tiles_.valid(tile), length);
    }
    if (t == o_.num_iters) return;
    const bool continued = continues(tile, section);
    multiply_by_transpose<T>(tiles_.rows, x, rank_, v, length, a_share(section), continued);
    multiply_by_transpose<T>(rank_, v, rank_, v, length, b_share(section), continued, Wanted::lower);
  }

  // U_t and D = UᵀU from A and B.
  void u_step(i64 t) {
    add_gram_shares(b_at(t));
    mirror(rank_, b_at(t));
    tiles_.parallel(u_parts_, [&](i64 part, int worker) {
      add_shares(part, worker, a_at(t), false);
      update<T>(o_, b_at(t), of_part(u_at(t - 1), part), of_part(a_at(t), part), of_part(u_at(t), part),
                u_work(t, part, worker), part_valid(part), part_length(part));
    });
    // By columns of D, each over all of U.
    constexpr i64 width = 2 * Simd<T>::width;
    const Rows<T> u = u_at(t), d = d_at(t);
    tiles_.parallel((rank_ + width - 1) / width, [&](i64 task, int) {
      const i64 r = task * width, count = rank_ - r < width ? rank_ - r : width;
      multiply_by_transpose<T>(rank_ - r, {u[r], rows_}, count, {u[r], rows_}, round_up<T>(tiles_.rows),
                               {d[r] + r, gram_stride_}, false);
    });
    mirror(rank_, d);
  }

  Rows<T> of_part(Rows<T> rows, i64 part) const { return {rows.data + part * u_part, rows.stride}; }
  i64 part_valid(i64 part) const {
    const i64 left = tiles_.rows - part * u_part;
    return left < u_part ? left : u_part;
  }
  i64 part_length(i64 part) const { return round_up<T>(part_valid(part)); }

  // to (+)= the sum of the sections' shares of A, transposed, for a part of U's rows.
  void add_shares(i64 part, int worker, Rows<T> to, bool accumulate) const {
    const i64 valid = part_valid(part), length = part_length(part);
    T* total = scratch(worker, 0).data + 2 * rank_ * scratch(worker, 0).stride;
    sums_.add(tiles_.sections.count, part * u_part * gram_stride_, valid * gram_stride_, total);
    const Rows<T> transposed = accumulate ? scratch(worker, 0) : of_part(to, part);
    transpose<T>(valid, {total, gram_stride_}, rank_, transposed);
    if (!accumulate) return;
    for (i64 r = 0; r < rank_; ++r) {
      T* row = of_part(to, part)[r];
      each_lane<T>(length, [&](i64 n) { store(row + n, load(row + n) + load(transposed[r] + n)); });
    }
  }
  void add_gram_shares(Rows<T> to) const {
    sums_.add(tiles_.sections.count, tiles_.rows * gram_stride_, rank_ * gram_stride_, to.data);
  }

  // --- Backward ---

  // reaches_old: whether the gradients of the factors before this step are wanted.
  void backward_pass_of_v(i64 t, const Weights<T>& da, i64 tile, i64 section, int worker, bool reaches_old) {
    const i64 length = tiles_.length(tile);
    const Rows<const T> x = tiles_.x(tile, worker);
    if (t < o_.num_iters) add_gradient_through_a(t, da, tile, x);
    const Rows<T> dc = c_at(t, tile, worker);
    const bool continued = continues(tile, section);
    update_backward<T>(o_, d_at(t), v_at(t - 1, tile), v_at(t, tile), dc, dv(tile), v_work(t, tile, worker),
                       b_share(section), continued, length, reaches_old);
    multiply_by_transpose<T>(tiles_.rows, x, rank_, dc, length, a_share(section), continued);
  }

  // dV_t += Xᵀ dA + V_t (dB + dBᵀ), of the U step that came after V_t.
  void add_gradient_through_a(i64 t, const Weights<T>& da, i64 tile, Rows<const T> x) const {
    const i64 length = tiles_.length(tile);
    multiply<T>(da, x, dv(tile), length, {true});
    add_gram_gradient({db_, gram_stride_}, v_at(t, tile), dv(tile), length);
  }

  void u_step_backward(i64 t, bool reaches_old) {
    const Rows<T> dd{dd_, gram_stride_}, db{db_, gram_stride_};
    add_gram_shares(dd);
    symmetric_gram_gradient<T>(o_, dd);
    tiles_.parallel(u_parts_, [&](i64 part, int worker) {
      const i64 length = part_length(part);
      const Rows<T> u = of_part(u_at(t), part), du = of_part(this->du(), part);
      add_shares(part, worker, this->du(), true);
      add_gram_gradient(dd, u, du, length);
      const Rows<T> db_share = reaches_old ? Rows<T>{u_sums_.share(part), gram_stride_} : Rows<T>{};
      update_backward<T>(o_, b_at(t), of_part(u_at(t - 1), part), u, of_part(a_at(t), part), du,
                         u_work(t, part, worker), db_share, false, length, reaches_old);
    });
    if (!reaches_old) return;
    u_sums_.add(u_parts_, 0, rank_ * gram_stride_, db_);
    symmetric_gram_gradient<T>(o_, db);
  }

  // df += (dgram + dgramᵀ) f
  void add_gram_gradient(Rows<const T> dgram, Rows<const T> f, Rows<T> df, i64 length) const {
    multiply<T>(Weights<T>::in_place(dgram.data, rank_, rank_, dgram.stride, 1), f, df, length, {true});
  }

  const NMFOptions o_;
  Tiles<T>& tiles_;
  const i64 rank_, kept_, first_;
  const i64 gram_stride_, rows_, stride_;  // rows_, stride_: from one row of U, of a tile to the next
  const bool keeps_work_;
  const i64 tile_rows_;
  const i64 u_parts_;
  const OrderedSums<T> sums_, u_sums_;
  i64 scratch_size_;
  T *u_, *a_, *u_work_, *v_, *b_, *d_, *scratch_, *packed_;
  T *du_ = nullptr, *dd_ = nullptr, *db_ = nullptr;  // gradients of the last U, of one D and one B
};

}  // namespace FK_ISA
}  // namespace factorizer
