// Matrices, given as tiles (tiles.h): which solver each takes, and the solver's call, forward and backward.
#pragma once

#include <memory>
#include <optional>
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

// One matrix: its factors go to u (rank x M) and v (rank x N) or, where these are null, Y to the tiles.
template <class T>
struct Problem {
  Tiles<T>* tiles;
  const T *u0, *v0;
  T *u, *v;
};

// One matrix: dX goes to the tiles; du0 and dv0 (where not null) to (rank x M) and (rank x N). du and dv are
// null for a loss of Y.
template <class T>
struct AdjointProblem {
  Tiles<T>* tiles;
  const T *u0, *v0, *du, *dv;
  T *du0, *dv0;
};

// Matrices of a shape that are solved side by side: what is known of them all stays in the first-level cache.
// What becomes of one does not depend on how many are beside it.
constexpr i64 most_together = 4;

template <class T>
i64 together(i64 rows, i64 columns, bool rank_one, bool backward) {
  const i64 bytes = rows * columns * i64(sizeof(T)) * (backward ? 2 : 1);
  const i64 fit = first_level_bytes / 2 / (bytes > 0 ? bytes : 1);
  return !rank_one || fit < 1 ? 1 : fit < most_together ? fit : most_together;
}

// Rank 1 of some matrices of one shape, as far as it may be taken by its moments: their small sums are worked
// on side by side, each in a lane of a vector.
template <class T>
class RankOnes {
 public:
  template <class Problem>
  RankOnes(const NMFOptions& o, const Problem* problems, i64 count, bool backward, Arena& arena)
      : o_(o),
        shape_(*problems[0].tiles),
        count_(count),
        lanes_(together<T>(shape_.rows, shape_.columns, true, backward) > 1 ? most_together : 1),
        backward_(backward),
        numbers_memory_(arena) {
    numbers<double>(arena, lanes_);
    for (i64 i = 0; i < count; ++i) solvers_[i].emplace(o_, *problems[i].tiles, lane(i), arena);
  }

  // The sums over X's columns, and the iterations.
  template <class Problem>
  void iterate(const Problem* problems) {
    i64 summed = 0;
    for (i64 i = 0; i < lanes_; ++i) {
      applies_[i] = i < count_ && solvers_[i]->sum_up(problems[i].v0, needed_sign(o_, backward_));
      summed += applies_[i];
      if (!applies_[i]) RankOne<T>::clear_sums(shape_.rows, lane(i));
    }
    if (summed == 0) return;
    constexpr double tolerance = sizeof(T) == 4 ? 1e-7 : 1e-12;
    all_lanes(
        [&](const auto& numbers) { iterate_rank_one(shape_.rows, shape_.columns, o_, tolerance, numbers); });
    for (i64 i = 0; i < count_; ++i) applies_[i] = applies_[i] && lane(i).applies[0] != 0.0;
  }

  // V, the sums over the columns of the gradients, and the iterations' backward.
  template <class Problem>
  void differentiate(const Problem* problems) {
    i64 applying = 0;
    for (i64 i = 0; i < lanes_; ++i) {
      if (!applies_[i]) {
        RankOne<T>::clear_gradient_sums(shape_.rows, lane(i));
        continue;
      }
      ++applying;
      solvers_[i]->write_v([](i64, int) {});
      solvers_[i]->sum_up_gradients(problems[i].du, problems[i].dv);
    }
    if (applying == 0) return;
    all_lanes([&](const auto& numbers) { differentiate_rank_one(shape_.rows, o_, numbers); });
  }

  // Null where the iterations must be run.
  const RankOne<T>* operator[](i64 i) const { return applies_[i] ? &*solvers_[i] : nullptr; }

 private:
  // Of the group; `lanes` numbers for each.
  template <class Real>
  RankOneNumbers<Real*> numbers(Arena& arena, i64 lanes) const {
    return {shape_.rows, o_.num_iters, backward_,
            [&](i64 count) { return arena.template take<Real>(count * lanes); }};
  }
  // Of its matrix i.
  RankOneNumbers<Lane> lane(i64 i) const {
    Arena arena = numbers_memory_;
    return {shape_.rows, o_.num_iters, backward_,
            [&](i64 count) { return Lane{arena.template take<double>(count * lanes_) + i, lanes_}; }};
  }
  // f(numbers of the group)
  template <class F>
  void all_lanes(F&& f) const {
    Arena arena = numbers_memory_;
    if (lanes_ == 1) {
      f(numbers<double>(arena, 1));
    } else {
      f(numbers<typename Block<double, most_together>::Elements>(arena, 1));
    }
  }

  const NMFOptions& o_;
  const Tiles<T>& shape_;
  const i64 count_, lanes_;
  const bool backward_;
  const Arena numbers_memory_;
  std::optional<RankOne<T>> solvers_[most_together];
  bool applies_[most_together] = {};
};

// Some matrices of one shape, at most as many as `together` says.
template <class T>
void factorize(const NMFOptions& o, bool rank_one, void* memory, const Problem<T>* problems, i64 count) {
  Arena arena(memory);
  std::optional<RankOnes<T>> rank_ones;
  if (rank_one) {
    rank_ones.emplace(o, problems, count, false, arena);
    rank_ones->iterate(problems);
  }
  for (i64 i = 0; i < count; ++i) {
    const Problem<T>& p = problems[i];
    Tiles<T>& tiles = *p.tiles;
    const auto done = [&](auto& solver) {
      return [&](i64 tile, int worker) {
        if (p.v == nullptr) return solver.write_y(tile, worker);
        for (i64 r = 0; r < o.rank; ++r) {
          copy<T>(solver.v(tile)[r], tiles.valid(tile), p.v + r * tiles.columns + tiles.begin(tile));
        }
      };
    };
    if (const RankOne<T>* solver = rank_ones ? (*rank_ones)[i] : nullptr) {
      solver->write_v(done(*solver));
      for (i64 m = 0; p.u != nullptr && m < tiles.rows; ++m) p.u[m] = T(solver->u(m));
      continue;
    }
    Arena rest = arena;
    Iterations<T> solver(o, tiles, false, rest);
    solver.forward(p.u0, p.v0, done(solver));
    for (i64 r = 0; p.u != nullptr && r < o.rank; ++r)
      copy<T>(solver.u()[r], tiles.rows, p.u + r * tiles.rows);
  }
}

template <class T>
void factorize_backward(const NMFOptions& o, bool rank_one, void* memory, const AdjointProblem<T>* problems,
                        i64 count) {
  const bool reaches_factors = o.grad_steps == o.num_iters;
  Arena arena(memory);
  std::optional<RankOnes<T>> rank_ones;
  if (rank_one) {
    rank_ones.emplace(o, problems, count, true, arena);
    rank_ones->iterate(problems);
    rank_ones->differentiate(problems);
  }
  for (i64 i = 0; i < count; ++i) {
    const AdjointProblem<T>& p = problems[i];
    Tiles<T>& tiles = *p.tiles;
    // du(r) and dv(tile): the gradients' rows; du(r) may be null for zero.
    const auto write_factor_grads = [&](auto du_row, auto dv_rows) {
      if (p.du0 == nullptr) return;
      for (i64 r = 0; r < o.rank; ++r) {
        const T* du_r = reaches_factors ? du_row(r) : nullptr;
        for (i64 m = 0; m < tiles.rows; ++m) p.du0[r * tiles.rows + m] = du_r ? du_r[m] : T(0);
        for (i64 tile = 0; tile < tiles.count; ++tile) {
          T* const to = p.dv0 + r * tiles.columns + tiles.begin(tile);
          if (reaches_factors) {
            copy<T>(dv_rows(tile)[r], tiles.valid(tile), to);
          } else {
            fill(to, tiles.valid(tile), T(0));
          }
        }
      }
    };
    if (const RankOne<T>* solver = rank_ones ? (*rank_ones)[i] : nullptr) {
      solver->write_dx(p.dv0 != nullptr);
      // U is updated first: u0 has no part in it.
      write_factor_grads([](i64) -> const T* { return nullptr; }, [&](i64 tile) { return solver->dv(tile); });
      continue;
    }
    Arena rest = arena;
    Iterations<T> solver(o, tiles, true, rest);
    solver.forward(p.u0, p.v0, [](i64, int) {});
    if (p.du == nullptr) {
      solver.start_backward();
    } else {
      solver.start_backward(p.du, p.dv);
    }
    solver.backward(p.du0 != nullptr && reaches_factors);
    write_factor_grads([&](i64 r) -> const T* { return solver.du()[r]; },
                       [&](i64 tile) { return solver.dv(tile); });
  }
}

// For `count` matrices like these.
template <class T>
i64 solver_memory(const NMFOptions& o, Tiles<T>& tiles, bool rank_one, bool backward, i64 count) {
  Arena arena(nullptr);
  Problem<T> problems[most_together];
  for (Problem<T>& problem : problems) problem.tiles = &tiles;
  if (rank_one) RankOnes<T>(o, problems, count, backward, arena);
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
    memory_bytes_ = solver_memory<T>(p.options, *tiles_.back(), rank_one, backward, 1);
    memory_.push_back(std::make_unique<Scratch>(memory_bytes_));
  }

  i64 memory_bytes_ = 0;
  std::vector<std::unique_ptr<LongTiles<T>>> tiles_;
  std::vector<std::unique_ptr<Scratch>> memory_;
};

}  // namespace FK_ISA
}  // namespace factorizer
