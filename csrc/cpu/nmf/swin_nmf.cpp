// swin_nmf on the CPU: the volume is read once per shift, factorised in cache, and written once.
//
// Forward: first the small factors of every window, then y, line by line, as the mean of their products.
// Backward: for each shift, dX of every window is added to dx; the windows of one shift are disjoint, and
// the shifts follow one another, so that sums have one order. Both go through the volume in chunks of
// heads that stay in the last-level cache between the two steps.
#include <optional>

#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/nmf/compose.h"
#include "cpu/nmf/plan.h"
#include "cpu/nmf/solve.h"
#include "cpu/nmf/tiles.h"
#include "cpu/windows/strips.h"

namespace factorizer {
namespace FK_ISA {
namespace {

// --- Forward ---------------------------------------------------------------------------------

// Puts v of some windows into a chunk's maps.
template <class T>
void write_map(const SwinNMF& p, const Chunk& chunk, const Strip& strip, const T* v,
               const FactorsOut<T>& out) {
  Windows windows = p.windows;
  windows.head_dim = p.options.rank;
  const i64 columns = windows.columns();
  add_strip<T>(windows, strip, {v, columns}, p.options.rank * columns, false,
               out.map(p.windows, p.options.rank, strip.shift, strip.bh - chunk.begin));
}

// u0 and v0 are indexed over the whole batch; matrix `local` of a chunk, which is one of this shift's, is:
i64 matrix_of_batch(const Windows& w, const Chunk& chunk, i64 shift, i64 local) {
  return local + (shift * (w.batch * w.heads - chunk.count) + chunk.begin) * w.num_windows();
}

// Calls f(begin, count) for the windows of a strip, at most `most` at a time.
template <class F>
void each_group(const Strip& strip, i64 most, F&& f) {
  const Parts groups = Parts::of(strip.num_windows, most);
  for (i64 g = 0; g < groups.count; ++g) f(groups.begin(g), groups.size(g));
}

template <class T>
void factorize_strips(const SwinNMF& p, bool rank_one, const Chunk& chunk, int threads,
                      const FactorsOut<T>& out) {
  const Windows& w = p.windows;
  const i64 u_size = p.options.rank * w.head_dim, v_size = p.options.rank * w.columns();
  const StripPlan plan = StripPlan::make<T>(w, chunk.count, w.num_shifts);
  const i64 most = together<T>(w.head_dim, w.columns(), rank_one, false);
  WindowTiles<T> tiles_like(w.head_dim, w.columns(), {}, {}, false);
  const StripMemory<T> memory(w, plan.per_strip,
                              solver_memory<T>(p.options, tiles_like, rank_one, false, most),
                              out.maps ? plan.per_strip * v_size : 0, threads);
  const i64 stride = memory.window_stride();
  parallel_for(plan.count, threads, [&](i64 task, int worker) {
    const Strip strip = plan.strip(w, task, chunk.begin, w.num_shifts, 0);
    const Rows<T> x = memory.x(worker);
    read_volume<T>(p, p.x, strip, p.options.relu, T(1), x, stride);
    clear_window_padding(w, strip.num_windows, x, stride);
    const i64 first = matrix_index(w, strip, chunk.begin, chunk.count);
    each_group(strip, most, [&](i64 begin, i64 count) {
      std::optional<WindowTiles<T>> tiles[most_together];
      Problem<T> problems[most_together];
      for (i64 k = 0; k < count; ++k) {
        const i64 i = begin + k, matrix = matrix_of_batch(w, chunk, strip.shift, first + i);
        const Rows<T> window{x.data + i * stride, x.stride};
        problems[k] = {&tiles[k].emplace(w.head_dim, w.columns(), window, Rows<T>{}, false),
                       factor_of<T>(p.u0, matrix), factor_of<T>(p.v0, matrix), out.u_of(first + i, u_size),
                       out.maps ? memory.other(worker) + i * v_size : out.v_of(first + i, v_size)};
      }
      factorize<T>(p.options, rank_one, memory.solver(worker), problems, count);
    });
    if (out.maps) {
      write_map(p, chunk, strip, memory.other(worker), out);
    } else if (out.v == nullptr) {
      write_y_strip<T>(p, strip, x, stride);
    }
  });
}

template <class T>
void factorize_long(const SwinNMF& p, bool rank_one, const Chunk& chunk, int threads,
                    const FactorsOut<T>& out) {
  const Windows& w = p.windows;
  const i64 u_size = p.options.rank * w.head_dim, v_size = p.options.rank * w.columns();
  const i64 windows = chunk.count * w.num_windows();
  LongMatrices<T> matrices(p, rank_one, false, w.num_shifts * windows, threads);
  const Scratch v_memory(out.maps ? matrices.workers() * v_size * sizeof(T) : 0);
  matrices.each(w.num_shifts * windows, [&](i64 local, int worker, LongTiles<T>& tiles, void* memory) {
    const i64 shift = local / windows, i = local % windows;
    tiles.select(whole_window(w, shift, chunk.begin + i / w.num_windows(), i % w.num_windows()));
    const i64 matrix = matrix_of_batch(w, chunk, shift, local);
    T* v = out.maps ? static_cast<T*>(v_memory.data()) + worker * v_size : out.v_of(local, v_size);
    const Problem<T> problem{&tiles, factor_of<T>(p.u0, matrix), factor_of<T>(p.v0, matrix),
                             out.u_of(local, u_size), v};
    factorize<T>(p.options, rank_one, memory, &problem, 1);
    if (!out.maps) return;
    tiles.each(
        [&](i64 tile, i64, int) { write_map(p, chunk, tiles.strip(tile), v + tiles.begin(tile), out); });
  });
}

// The factors of every window of a chunk of heads.
template <class T>
void factorize_chunk(const SwinNMF& p, bool rank_one, const Chunk& chunk, int threads,
                     const FactorsOut<T>& out) {
  if (windows_fit(p.windows, sizeof(T))) {
    factorize_strips<T>(p, rank_one, chunk, threads, out);
  } else {
    factorize_long<T>(p, rank_one, chunk, threads, out);
  }
}

template <class T>
void forward(const SwinNMF& p) {
  const Windows& w = p.windows;
  if (w.num_matrices() == 0) return;
  const bool rank_one = rank_one_applies<T>(p, p.options.num_iters);
  const int threads = threads_for(p);
  const Chunk all{0, w.batch * w.heads};
  if (p.u.data != nullptr) {
    return factorize_chunk<T>(p, rank_one, all, threads,
                              {static_cast<T*>(p.u.data), static_cast<T*>(p.v.data), false});
  }
  expect_writes(p.y, w.num_elements() * element(p.dtype));
  if (w.num_shifts == 1) return factorize_chunk<T>(p, rank_one, all, threads, {});
  const i64 per_chunk = heads_per_chunk(w, sizeof(T));
  const i64 matrices = w.num_shifts * per_chunk * w.num_windows();
  const Scratch factors(matrices * p.options.rank * (w.head_dim + w.columns()) * sizeof(T));
  T* u = static_cast<T*>(factors.data());
  const FactorsOut<T> out{u, u + matrices * p.options.rank * w.head_dim, true};
  each_chunk(w, per_chunk, [&](const Chunk& chunk) {
    factorize_chunk<T>(p, rank_one, chunk, threads, out);
    compose_chunk<T>(p, chunk, threads, out);
  });
}

// --- Backward --------------------------------------------------------------------------------

// Where the gradients of u0 or v0 go: to each matrix' place, or, for a shared factor, to one sum over all the
// matrices in their order.
template <class T>
class FactorGrads {
 public:
  // At most `most` matrices are differentiated between two calls of add_up.
  FactorGrads(const Factor& out, i64 size, i64 most)
      : out_(out),
        size_(size),
        shared_(out.data != nullptr && out.stride == 0),
        sums_memory_(shared_ ? size * sizeof(double) : 0),
        grads_memory_(shared_ ? most * size * sizeof(T) : 0),
        sums_(static_cast<double*>(sums_memory_.data())),
        grads_(static_cast<T*>(grads_memory_.data())) {
    if (shared_) fill(sums_, size_, 0.0);
  }

  // For matrix `matrix` of the batch, the `local`th since the last call of add_up; null where none is wanted.
  T* of(i64 local, i64 matrix) const {
    if (out_.data == nullptr) return nullptr;
    return shared_ ? grads_ + local * size_ : static_cast<T*>(out_.data) + matrix * out_.stride;
  }
  void add_up(i64 matrices, int threads) const {
    if (shared_) add_in_order(grads_, matrices, size_, sums_, threads);
  }
  void write_sum() const {
    if (!shared_) return;
    for (i64 i = 0; i < size_; ++i) static_cast<T*>(out_.data)[i] = T(sums_[i]);
  }

 private:
  const Factor& out_;
  const i64 size_;
  const bool shared_;
  const Scratch sums_memory_, grads_memory_;
  double* const sums_;
  T* const grads_;
};

// The adjoint of matrix `matrix` of the batch, the `local`th of those that are differentiated together.
template <class T>
AdjointProblem<T> adjoint_problem(const SwinNMF& p, Tiles<T>& tiles, i64 matrix, i64 local,
                                  const FactorGrads<T>& du0, const FactorGrads<T>& dv0) {
  const auto or_null = [&](const Factor& f) { return f.data ? factor_of<T>(f, matrix) : nullptr; };
  return {&tiles,        factor_of<T>(p.u0, matrix), factor_of<T>(p.v0, matrix), or_null(p.du),
          or_null(p.dv), du0.of(local, matrix),      dv0.of(local, matrix)};
}

// The backward of a chunk's windows of one shift: dX is written to the chunk's dx (shift 0), a contiguous map
// of its heads, or added to it. One class for strips of windows, one for long matrices.
template <class T>
class StripsBackward {
 public:
  StripsBackward(const SwinNMF& p, bool rank_one, int threads)
      : p_(p),
        rank_one_(rank_one),
        threads_(threads),
        per_strip_(StripPlan::make<T>(p.windows, 1, 1).per_strip),
        together_(together<T>(p.windows.head_dim, p.windows.columns(), rank_one, true)),
        memory_(p.windows, per_strip_, solver_bytes(p, rank_one, together_),
                per_strip_ * p.windows.head_dim * row_stride<T>(p.windows.columns()), threads) {}

  void run(const Chunk& chunk, i64 shift, T* dx, const FactorGrads<T>& du0, const FactorGrads<T>& dv0) const {
    const Windows& w = p_.windows;
    const StripPlan plan = StripPlan::make<T>(w, chunk.count, 1);
    const i64 before = shift * chunk.count * w.num_windows();  // matrices of the chunk
    parallel_for(plan.count, threads_, [&](i64 task, int worker) {
      const Strip strip = plan.strip(w, task, chunk.begin, 1, shift);
      const Rows<T> x = memory_.x(worker), dy{memory_.other(worker), x.stride};
      read(p_.x, strip, p_.options.relu, T(1), x);
      if (p_.dy.data != nullptr) read(p_.dy, strip, false, T(1) / T(w.num_shifts), dy);
      const i64 first = matrix_index(w, strip, chunk.begin, chunk.count);
      each_group(strip, together_, [&](i64 begin, i64 count) {
        std::optional<WindowTiles<T>> tiles[most_together];
        AdjointProblem<T> problems[most_together];
        for (i64 k = 0; k < count; ++k) {
          const i64 i = begin + k, at = i * memory_.window_stride();
          const Rows<T> x_window{x.data + at, x.stride}, dy_window{dy.data + at, dy.stride};
          tiles[k].emplace(w.head_dim, w.columns(), x_window, dy_window, p_.options.relu);
          problems[k] = adjoint_problem<T>(p_, *tiles[k], matrix_of_batch(w, chunk, shift, first + i),
                                           first + i - before, du0, dv0);
        }
        factorize_backward<T>(p_.options, rank_one_, memory_.solver(worker), problems, count);
      });
      T* head = dx + (strip.bh - chunk.begin) * w.head_dim * w.voxels();
      add_strip<T>(w, strip, dy, memory_.window_stride(), shift > 0, contiguous_head(head, w));
    });
  }

 private:
  static i64 solver_bytes(const SwinNMF& p, bool rank_one, i64 together) {
    WindowTiles<T> tiles(p.windows.head_dim, p.windows.columns(), {}, {}, false);
    return solver_memory<T>(p.options, tiles, rank_one, true, together);
  }
  void read(const Volume& volume, const Strip& strip, bool relu, T scale, Rows<T> to) const {
    read_volume<T>(p_, volume, strip, relu, scale, to, memory_.window_stride());
    clear_window_padding(p_.windows, strip.num_windows, to, memory_.window_stride());
  }

  const SwinNMF& p_;
  const bool rank_one_;
  const int threads_;
  const i64 per_strip_, together_;  // windows; of those, worked on side by side
  const StripMemory<T> memory_;
};

template <class T>
class LongBackward {
 public:
  LongBackward(const SwinNMF& p, bool rank_one, int threads)
      : p_(p),
        rank_one_(rank_one),
        matrices_(p, rank_one, true, heads_per_chunk(p.windows, sizeof(T)) * p.windows.num_windows(),
                  threads) {}

  void run(const Chunk& chunk, i64 shift, T* dx, const FactorGrads<T>& du0, const FactorGrads<T>& dv0) {
    const Windows& w = p_.windows;
    const i64 matrices = chunk.count * w.num_windows();
    matrices_.each(matrices, [&](i64 local, int, LongTiles<T>& tiles, void* memory) {
      const i64 bh = local / w.num_windows();
      const i64 matrix = matrix_of_batch(w, chunk, shift, shift * matrices + local);
      tiles.select(whole_window(w, shift, chunk.begin + bh, local % w.num_windows()),
                   contiguous_head(dx + bh * w.head_dim * w.voxels(), w));
      const AdjointProblem<T> problem = adjoint_problem<T>(p_, tiles, matrix, local, du0, dv0);
      factorize_backward<T>(p_.options, rank_one_, memory, &problem, 1);
    });
  }

 private:
  const SwinNMF& p_;
  const bool rank_one_;
  LongMatrices<T> matrices_;
};

// Rounds a chunk's dx, `count` numbers of it from `begin` on, to the storage type.
template <class T>
void store(const SwinNMF& p, const T* from, i64 begin, i64 count, int threads) {
  parallel_for((count + line_block - 1) / line_block, threads, [&](i64 task, int) {
    const i64 first = task * line_block, left = count - first;
    round_to<T>(p.dtype, from + first, left < line_block ? left : line_block, p.dx, begin + first);
  });
}

template <class ShiftBackward, class T>
void backward(const SwinNMF& p) {
  const Windows& w = p.windows;
  const i64 head = w.head_dim * w.voxels(), per_chunk = heads_per_chunk(w, sizeof(T));
  const int threads = threads_for(p);
  const FactorGrads<T> du0(p.du0, p.options.rank * w.head_dim, per_chunk * w.num_windows());
  const FactorGrads<T> dv0(p.dv0, p.options.rank * w.columns(), per_chunk * w.num_windows());
  if (w.num_matrices() == 0) {
    du0.write_sum();
    dv0.write_sum();
    return;
  }
  expect_writes(p.dx, w.num_elements() * element(p.dtype));
  ShiftBackward shift_backward(p, rank_one_applies<T>(p, p.options.grad_steps), threads);
  // Sums over the shifts are kept in the arithmetic's type.
  const bool direct = element(p.dtype) == sizeof(T);
  const Scratch dx_chunk(direct ? 0 : per_chunk * head * sizeof(T));
  each_chunk(w, per_chunk, [&](const Chunk& chunk) {
    T* const dx = direct ? static_cast<T*>(p.dx) + chunk.begin * head : static_cast<T*>(dx_chunk.data());
    for (i64 shift = 0; shift < w.num_shifts; ++shift) {
      shift_backward.run(chunk, shift, dx, du0, dv0);
      du0.add_up(chunk.count * w.num_windows(), threads);
      dv0.add_up(chunk.count * w.num_windows(), threads);
    }
    if (!direct) store(p, dx, chunk.begin * head, chunk.count * head, threads);
  });
  du0.write_sum();
  dv0.write_sum();
}

}  // namespace

void swin_nmf_forward(const SwinNMF& p) {
  with_compute(p.dtype, [&](auto number) { forward<decltype(number)>(p); });
}

void swin_nmf_backward(const SwinNMF& p) {
  with_compute(p.dtype, [&](auto number) {
    using T = decltype(number);
    if (windows_fit(p.windows, sizeof(T))) {
      backward<StripsBackward<T>, T>(p);
    } else {
      backward<LongBackward<T>, T>(p);
    }
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
