// One matrix, given as tiles (tiles.h): which solver it takes, and the solver's call, forward and backward.
#pragma once

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
  if (p.options.rank != 1 || steps == 0 || w.head_dim > RankOne<T, WindowTiles<T>>::max_rows) return false;
  // MU never leaves a zero of u0 or v0; HALS does not look at u0.
  if (!all_elements<T>(p.v0, w.num_matrices(), w.columns(), !p.options.hals)) return false;
  return p.options.hals || all_elements<T>(p.u0, w.num_matrices(), w.head_dim, true);
}

inline Sign needed_sign(const NMFOptions& o, bool backward) {
  if (o.relu) return Sign::known;
  // At x = 0 the gradient of MU is not the limit of its gradients at x > 0.
  return backward && !o.hals ? Sign::positive : Sign::nonnegative;
}

// The factors of one matrix, to u (rank x M) and v (rank x N).
template <class T, class Tiles>
void factorize(const NMFOptions& o, Tiles& tiles, bool rank_one, void* memory, const T* u0, const T* v0, T* u,
               T* v) {
  Arena arena(memory);
  if (rank_one) {
    RankOne<T, Tiles> solver(o, tiles, false, arena);
    if (solver.forward(v0, needed_sign(o, false))) {
      for (i64 m = 0; m < tiles.rows; ++m) u[m] = T(solver.u(m));
      copy(solver.v(), tiles.columns, v);
      return;
    }
  }
  Iterations<T, Tiles> solver(o, tiles, false, arena);
  solver.forward(u0, v0);
  for (i64 r = 0; r < o.rank; ++r) {
    copy<T>(solver.u()[r], tiles.rows, u + r * tiles.rows);
    copy<T>(solver.v()[r], tiles.columns, v + r * tiles.columns);
  }
}

// dX to the tiles; du0 and dv0 (where not null) to (rank x M) and (rank x N). du and dv are null for a loss
// of Y.
template <class T, class Tiles>
void factorize_backward(const NMFOptions& o, Tiles& tiles, bool rank_one, void* memory, const T* u0,
                        const T* v0, const T* du, const T* dv, T* du0, T* dv0) {
  const i64 rows = tiles.rows, columns = tiles.columns;
  const bool reaches_factors = o.grad_steps == o.num_iters;
  const bool from_dy = du == nullptr;
  Arena arena(memory);
  auto write_factor_grads = [&](Rows<const T> du_rows, Rows<const T> dv_rows) {
    if (du0 == nullptr) return;
    for (i64 r = 0; r < o.rank; ++r) {
      for (i64 m = 0; m < rows; ++m)
        du0[r * rows + m] = reaches_factors && du_rows.data ? du_rows[r][m] : T(0);
      for (i64 n = 0; n < columns; ++n) dv0[r * columns + n] = reaches_factors ? dv_rows[r][n] : T(0);
    }
  };
  if (rank_one) {
    RankOne<T, Tiles> solver(o, tiles, true, arena);
    if (solver.forward(v0, needed_sign(o, true))) {
      if (!from_dy) {
        copy(dv, columns, solver.dv());
        fill(solver.dv() + columns, round_up<T>(columns) - columns, T(0));
      }
      solver.backward(du, from_dy);
      write_factor_grads({nullptr, 0}, {solver.dv(), 0});  // U is updated first: u0 has no part in it
      return;
    }
  }
  Iterations<T, Tiles> solver(o, tiles, true, arena);
  solver.forward(u0, v0);
  if (from_dy) {
    solver.start_backward_from_dy();
  } else {
    for (i64 r = 0; r < o.rank; ++r) {
      copy(du + r * rows, rows, solver.du()[r]);
      copy(dv + r * columns, columns, solver.dv()[r]);
    }
    clear_padding(o.rank, solver.du(), rows, round_up<T>(rows));
    clear_padding(o.rank, solver.dv(), columns, round_up<T>(columns));
  }
  solver.backward();
  write_factor_grads(solver.du(), solver.dv());
}

template <class T, class Tiles>
i64 solver_memory(const NMFOptions& o, Tiles& tiles, bool rank_one, bool backward) {
  Arena arena(nullptr);
  if (rank_one) RankOne<T, Tiles>(o, tiles, backward, arena);
  Iterations<T, Tiles>(o, tiles, backward, arena);
  return arena.used();
}

}  // namespace FK_ISA
}  // namespace factorizer
