// One matrix, given as tiles (tiles.h): which solver it takes, and the solver's call, forward and backward.
#pragma once

#include <memory>
#include <vector>

#include "cpu/nmf/iterations.h"
#include "cpu/nmf/rank_one.h"
#include "cpu/nmf/tiles.h"

namespace factorizer {
namespace FK_ISA {

template <class T>
const T* factor_of(const Factor& f, i64 matrix) {
  return static_cast<const T*>(f.data) + matrix * f.stride;
}

template <class T>
bool all_elements(const Factor& f, i64 matrices, i64 size, bool positive) {
  const i64 count = f.stride == 0 ? size : matrices * size;
  int violations = 0;
  for (i64 i = 0; i < count; ++i) {
    const T value = static_cast<const T*>(f.data)[i];
    violations |= positive ? !(value > T(0)) : !(value >= T(0));
  }
  return violations == 0;
}

// Whether rank 1 may be taken by its moments as far as the factors are concerned. steps: the iterations that
// are run, or differentiated; without any there is nothing to take by them.
template <class T>
bool rank_one_applies(const SwinNMF& p, i64 steps) {
  const Windows& w = p.windows;
  if (p.options.rank != 1 || steps == 0 || w.head_dim > RankOne<T>::max_rows) return false;
  // MU never leaves a zero of u0 or v0; HALS does not look at u0.
  if (!all_elements<T>(p.v0, w.num_matrices(), w.columns(), !p.options.hals)) return false;
  return p.options.hals || all_elements<T>(p.u0, w.num_matrices(), w.head_dim, true);
}

inline Sign needed_sign(const NMFOptions& o, bool backward) {
  if (o.relu) return Sign::known;
  // At x = 0 the gradient of MU is not the limit of its gradients at x > 0.
  return backward && !o.hals ? Sign::positive : Sign::nonnegative;
}

// The factors of one matrix, to u (rank x M) and v (rank x N); where these are null Y to the tiles.
template <class T>
void factorize(const NMFOptions& o, Tiles<T>& tiles, bool rank_one, void* memory, const T* u0, const T* v0,
               T* u, T* v) {
  Arena arena(memory);
  const auto write_v = [&](i64 tile, Rows<const T> rows) {
    for (i64 r = 0; r < o.rank; ++r)
      copy<T>(rows[r], tiles.valid(tile), v + r * tiles.columns + tiles.begin(tile));
  };
  if (rank_one) {
    RankOne<T> solver(o, tiles, false, arena);
    const bool done = solver.forward(v0, needed_sign(o, false), [&](i64 tile, int worker) {
      if (v != nullptr) return write_v(tile, solver.v(tile));
      solver.write_y(tile, worker);
    });
    if (done) {
      for (i64 m = 0; u != nullptr && m < tiles.rows; ++m) u[m] = T(solver.u(m));
      return;
    }
  }
  Iterations<T> solver(o, tiles, false, arena);
  solver.forward(u0, v0, [&](i64 tile, int worker) {
    if (v != nullptr) return write_v(tile, solver.v(tile));
    solver.write_y(tile, worker);
  });
  for (i64 r = 0; u != nullptr && r < o.rank; ++r) copy<T>(solver.u()[r], tiles.rows, u + r * tiles.rows);
}

// dX to the tiles; du0 and dv0 (where not null) to (rank x M) and (rank x N). du and dv are null for a loss
// of Y.
template <class T>
void factorize_backward(const NMFOptions& o, Tiles<T>& tiles, bool rank_one, void* memory, const T* u0,
                        const T* v0, const T* du, const T* dv, T* du0, T* dv0) {
  const i64 rows = tiles.rows, columns = tiles.columns;
  const bool reaches_factors = o.grad_steps == o.num_iters;
  Arena arena(memory);
  // du(r) and dv(tile): the gradients' rows; du(r) may be null for zero.
  const auto write_factor_grads = [&](auto du_row, auto dv_rows) {
    if (du0 == nullptr) return;
    for (i64 r = 0; r < o.rank; ++r) {
      const T* du_r = reaches_factors ? du_row(r) : nullptr;
      for (i64 m = 0; m < rows; ++m) du0[r * rows + m] = du_r ? du_r[m] : T(0);
      for (i64 tile = 0; tile < tiles.count; ++tile) {
        T* const to = dv0 + r * columns + tiles.begin(tile);
        if (reaches_factors) {
          copy<T>(dv_rows(tile)[r], tiles.valid(tile), to);
        } else {
          fill(to, tiles.valid(tile), T(0));
        }
      }
    }
  };
  if (rank_one) {
    RankOne<T> solver(o, tiles, true, arena);
    if (solver.forward(v0, needed_sign(o, true), [](i64, int) {})) {
      solver.backward(du, dv);
      // U is updated first: u0 has no part in it.
      write_factor_grads([](i64) -> const T* { return nullptr; }, [&](i64 tile) { return solver.dv(tile); });
      return;
    }
  }
  Iterations<T> solver(o, tiles, true, arena);
  solver.forward(u0, v0, [](i64, int) {});
  if (du == nullptr) {
    solver.start_backward();
  } else {
    solver.start_backward(du, dv);
  }
  solver.backward(du0 != nullptr && reaches_factors);
  write_factor_grads([&](i64 r) -> const T* { return solver.du()[r]; },
                     [&](i64 tile) { return solver.dv(tile); });
}

template <class T>
i64 solver_memory(const NMFOptions& o, Tiles<T>& tiles, bool rank_one, bool backward) {
  Arena arena(nullptr);
  if (rank_one) RankOne<T>(o, tiles, backward, arena);
  Iterations<T>(o, tiles, backward, arena);
  return arena.used();
}

// Long matrices of a problem: side by side, each by one worker, where they are many; else one after another,
// each by all the workers. The result is the same.
template <class T>
class LongMatrices {
 public:
  // backward: with the memory that it needs. At most `most` matrices are worked on at a time.
  LongMatrices(const SwinNMF& p, bool rank_one, bool backward, i64 most, int threads) {
    add(p, rank_one, backward, 1);
    const i64 bytes = memory_bytes_ * threads;
    if (most >= 4 * threads && bytes <= most_bytes) {
      for (int worker = 1; worker < threads; ++worker) add(p, rank_one, backward, 1);
    } else if (threads > 1) {
      tiles_.clear();
      memory_.clear();
      add(p, rank_one, backward, threads);
    }
  }

  int workers() const { return static_cast<int>(tiles_.size()); }

  // f(matrix, worker, tiles, memory) for so many matrices.
  template <class F>
  void each(i64 matrices, F&& f) {
    parallel_for(matrices, workers(), [&](i64 matrix, int worker) {
      f(matrix, worker, *tiles_[worker], memory_[worker]->data());
    });
  }

 private:
  static constexpr i64 most_bytes = i64(256) << 20;

  void add(const SwinNMF& p, bool rank_one, bool backward, int threads) {
    tiles_.push_back(std::make_unique<LongTiles<T>>(p, threads));
    memory_bytes_ = solver_memory<T>(p.options, *tiles_.back(), rank_one, backward);
    memory_.push_back(std::make_unique<Scratch>(memory_bytes_));
  }

  i64 memory_bytes_ = 0;
  std::vector<std::unique_ptr<LongTiles<T>>> tiles_;
  std::vector<std::unique_ptr<Scratch>> memory_;
};

}  // namespace FK_ISA
}  // namespace factorizer
