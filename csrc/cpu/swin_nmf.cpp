// swin_nmf on the CPU: the volume is read once per shift, factorised in cache, and written once.
//
// Forward: first the small factors of every window, then y, line by line, as the mean of their products.
// Backward: for each shift, dX of every window is added to dx; the windows of one shift are disjoint, and
// the shifts follow one another, so that sums have one order. Both go through the volume in chunks of
// heads that stay in the last-level cache between the two steps.
#include "factorize.h"
#include "kernels.h"
#include "parallel.h"
#include "strips.h"

namespace factorizer {
namespace FK_ISA {
namespace {

constexpr i64 window_limit = 256 << 10;  // bytes of a window that is worked on whole
constexpr i64 strip_bytes = 160 << 10;   // several windows side by side, within the second-level cache
constexpr i64 chunk_bytes = 8 << 20;     // of x, between the two steps
constexpr i64 tile_columns = 4096;       // of a long matrix
constexpr i64 line_block = 16384;        // elements of y that one task writes
constexpr i64 spread_bytes = 16 << 10;   // of u along a line, within the first-level cache
constexpr i64 most_terms = 8;            // of y that are added up in registers
constexpr i64 serial_elements = 32768;   // below that, threads cost more than they bring

template <class T>
i64 row_stride(i64 columns) {
  // One line more than needed: rows at multiples of 4 KiB would evict one another.
  return round_up<T>(columns) + 64 / i64(sizeof(T));
}

// A window that is in memory already.
template <class T>
struct WindowTiles {
  static constexpr i64 count = 1, workers = 1;
  i64 rows, columns;
  Rows<const T> x_rows, dy_rows;
  Rows<T> dx_rows;  // may be dy's memory
  bool relu;

  i64 begin(i64) const { return 0; }
  i64 length(i64) const { return round_up<T>(columns); }
  i64 max_length() const { return round_up<T>(columns); }
  i64 valid(i64) const { return columns; }
  template <class F>
  void each(F&& f) {
    f(i64{0}, 0);
  }
  Rows<const T> x(i64, int) const { return x_rows; }
  Rows<const T> dy(i64, int) const { return dy_rows; }
  template <class F>
  void write_dx(i64, int, F&& fill) {
    fill(dx_rows);
    if (relu) mask(x_rows, dx_rows, rows, columns);
  }

  // The adjoint of relu, which keeps x where it is positive (or NaN).
  static void mask(Rows<const T> x, Rows<T> dx, i64 rows, i64 columns) {
    for (i64 m = 0; m < rows; ++m) {
      for (i64 n = 0; n < columns; ++n) dx[m][n] = x[m][n] <= T(0) ? T(0) : dx[m][n];
    }
  }
};

// One matrix of the volume, too large for the cache: tiles of its columns, read in each pass.
template <class T, class S>
struct LongTiles {
  const SwinNMF& p;
  Strip window;
  i64 rows, columns;
  Head<T> dx;
  int workers;
  i64 count, lines, voxels, parts;
  T* buffers = nullptr;  // for each worker, one tile of x and one of dy or dx

  LongTiles(const SwinNMF& problem, const Strip& strip, int threads)
      : p(problem),
        window(strip),
        rows(problem.windows.head_dim),
        columns(problem.windows.columns()),
        dx{},
        workers(threads) {
    // Tiles of whole lines or parts of a line, all but the last a multiple of the vector width.
    constexpr i64 width = Simd<T>::width;
    const i64 line = p.windows.patch[2], num_lines = columns / line;
    if (num_lines == 1 || (line % width == 0 && line >= tile_columns)) {
      lines = 1;
      voxels = line < tile_columns ? line : tile_columns;
    } else {
      lines = tile_columns > line ? tile_columns / line : 1;
      if (lines * line % width != 0) lines = round_up<T>(lines);
      if (lines > num_lines) lines = num_lines;
      voxels = line;
    }
    parts = (line + voxels - 1) / voxels;
    count = (num_lines + lines - 1) / lines * parts;
  }

  i64 buffer_size() const { return 2 * rows * max_length(); }
  i64 begin(i64 tile) const { return tile / parts * lines * p.windows.patch[2] + tile % parts * voxels; }
  i64 valid(i64 tile) const {
    const Strip s = strip(tile);
    return s.num_lines * s.num_voxels;
  }
  i64 length(i64 tile) const { return round_up<T>(valid(tile)); }
  i64 max_length() const { return round_up<T>(lines * voxels); }

  template <class F>
  void each(F&& f) {
    parallel_for(count, workers, f);
  }
  Rows<const T> x(i64 tile, int worker) const { return read(p.x, tile, worker, 0, p.options.relu, T(1)); }
  Rows<const T> dy(i64 tile, int worker) const {
    return read(p.dy, tile, worker, 1, false, T(1) / T(p.windows.num_shifts));
  }
  template <class F>
  void write_dx(i64 tile, int worker, F&& fill) {
    const Rows<T> out = buffer(worker, 1);
    fill(out);
    if (p.options.relu) WindowTiles<T>::mask(buffer(worker, 0), out, rows, valid(tile));
    add_strip<T>(p.windows, strip(tile), out, 0, window.shift > 0, dx);
  }

  Strip strip(i64 tile) const {
    Strip s = window;
    const i64 num_lines = columns / p.windows.patch[2];
    s.num_windows = 1;
    s.line = tile / parts * lines;
    s.num_lines = num_lines - s.line < lines ? num_lines - s.line : lines;
    s.voxel = tile % parts * voxels;
    s.num_voxels = p.windows.patch[2] - s.voxel < voxels ? p.windows.patch[2] - s.voxel : voxels;
    return s;
  }

 private:
  Rows<T> buffer(int worker, i64 index) const {
    return {buffers + (2 * worker + index) * rows * max_length(), max_length()};
  }
  Rows<const T> read(const Volume& volume, i64 tile, int worker, i64 index, bool relu, T scale) const {
    const Rows<T> to = buffer(worker, index);
    read_strip<S, T>(p.windows, strip(tile), head_of<const S>(volume, p.windows, window.bh), relu, scale, to,
                     0);
    clear_padding(rows, to, valid(tile), length(tile));
    return to;
  }
};

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

// Whether rank 1 may be taken by its moments as far as the factors are concerned.
template <class T>
bool rank_one_applies(const SwinNMF& p) {
  const Windows& w = p.windows;
  // Without an iteration to run, or to differentiate, there is nothing to take by them.
  if (p.options.rank != 1 || p.options.grad_steps == 0 || w.head_dim > RankOne<T, WindowTiles<T>>::max_rows)
    return false;
  // MU never leaves a zero of u0 or v0; HALS does not look at u0.
  if (!all_elements<T>(p.v0, w.num_matrices(), w.columns(), !p.options.hals)) return false;
  return p.options.hals || all_elements<T>(p.u0, w.num_matrices(), w.head_dim, true);
}

Sign needed_sign(const Options& o, bool backward) {
  if (o.relu) return Sign::known;
  // At x = 0 the gradient of MU is not the limit of its gradients at x > 0.
  return backward && !o.hals ? Sign::positive : Sign::nonnegative;
}

// The factors of one matrix, to u (rank x M) and v (rank x N).
template <class T, class Tiles>
void factorize(const Options& o, Tiles& tiles, bool rank_one, void* memory, const T* u0, const T* v0, T* u,
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
void factorize_backward(const Options& o, Tiles& tiles, bool rank_one, void* memory, const T* u0, const T* v0,
                        const T* du, const T* dv, T* du0, T* dv0) {
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
i64 solver_memory(const Options& o, Tiles& tiles, bool rank_one, bool backward) {
  Arena arena(nullptr);
  if (rank_one) RankOne<T, Tiles>(o, tiles, backward, arena);
  Iterations<T, Tiles>(o, tiles, backward, arena);
  return arena.used();
}

// How one chunk of heads is cut into strips of whole windows.
struct StripPlan {
  i64 per_strip, strips_per_row, count;

  template <class T>
  static StripPlan make(const Windows& w, i64 num_bh, i64 shifts) {
    StripPlan plan;
    const i64 bytes = w.head_dim * row_stride<T>(w.columns()) * i64(sizeof(T));
    plan.per_strip = strip_bytes / bytes < 1           ? 1
                     : strip_bytes / bytes < w.grid(2) ? strip_bytes / bytes
                                                       : w.grid(2);
    plan.strips_per_row = (w.grid(2) + plan.per_strip - 1) / plan.per_strip;
    plan.count = num_bh * w.grid(0) * w.grid(1) * plan.strips_per_row * shifts;
    return plan;
  }

  // The shift runs fastest, so that the copies of a place are read while it is in cache.
  Strip strip(const Windows& w, i64 task, i64 bh_begin, i64 shifts, i64 first_shift) const {
    Strip s{};
    s.shift = first_shift + task % shifts;
    task /= shifts;
    s.window = task % strips_per_row * per_strip;
    task /= strips_per_row;
    s.grid[1] = task % w.grid(1);
    task /= w.grid(1);
    s.grid[0] = task % w.grid(0);
    s.bh = bh_begin + task / w.grid(0);
    s.num_windows = w.grid(2) - s.window < per_strip ? w.grid(2) - s.window : per_strip;
    s.num_lines = w.patch[0] * w.patch[1];
    s.num_voxels = w.patch[2];
    return s;
  }
};

Strip whole_window(const Windows& w, i64 shift, i64 bh, i64 window) {
  Strip s{};
  s.shift = shift;
  s.bh = bh;
  s.window = window % w.grid(2);
  s.grid[1] = window / w.grid(2) % w.grid(1);
  s.grid[0] = window / w.grid(2) / w.grid(1);
  s.num_windows = 1;
  s.num_lines = w.patch[0] * w.patch[1];
  s.num_voxels = w.patch[2];
  return s;
}

bool windows_fit(const Windows& w, i64 element) { return w.head_dim * w.columns() * element <= window_limit; }

i64 heads_per_chunk(const Windows& w, i64 element) {
  const i64 total = w.batch * w.heads;
  const i64 bytes = w.head_dim * w.voxels() * element;
  const i64 heads = bytes > 0 ? chunk_bytes / bytes : total;
  return heads < 1 ? 1 : heads < total ? heads : total;
}

int threads_for(const SwinNMF& p) {
  const Windows& w = p.windows;
  return w.batch * w.heads * w.head_dim * w.voxels() * w.num_shifts < serial_elements ? 1 : p.threads;
}

// One worker's memory for strips of whole windows: a solver's, x, and v (forward) or dy and dx (backward).
template <class T>
struct StripMemory {
  i64 stride, window_stride, solver_bytes, x_bytes, bytes;

  StripMemory(const SwinNMF& p, const StripPlan& plan, bool rank_one, bool backward) {
    const Windows& w = p.windows;
    stride = row_stride<T>(w.columns());
    window_stride = w.head_dim * stride;
    WindowTiles<T> tiles{w.head_dim, w.columns(), {}, {}, {}, false};
    solver_bytes = solver_memory<T>(p.options, tiles, rank_one, backward);
    const i64 v_stride = p.options.rank * w.columns();
    x_bytes = lines_of(plan.per_strip * window_stride);
    bytes = solver_bytes + x_bytes + (backward ? x_bytes : lines_of(plan.per_strip * v_stride));
  }

  void* solver(void* base, int worker) const { return static_cast<char*>(base) + worker * bytes; }
  T* x(void* base, int worker) const {
    return reinterpret_cast<T*>(static_cast<char*>(base) + worker * bytes + solver_bytes);
  }
  T* other(void* base, int worker) const { return x(base, worker) + x_bytes / i64(sizeof(T)); }

 private:
  static i64 lines_of(i64 count) { return (count * i64(sizeof(T)) + 63) / 64 * 64; }
};

template <class T>
void clear_window_padding(const Windows& w, i64 num_windows, Rows<T> buffer, i64 window_stride) {
  for (i64 k = 0; k < num_windows; ++k) {
    clear_padding<T>(w.head_dim, {buffer.data + k * window_stride, buffer.stride}, w.columns(),
                     round_up<T>(w.columns()));
  }
}

// Where the factors of a chunk of heads go: u of every matrix to `u`, in the matrices' order from the chunk's
// first on; v likewise, or, for composing y, voxel by voxel to maps (head, shift, rank, voxels).
template <class T>
struct FactorsOut {
  T* u;
  T* v;
  bool maps;

  Head<T> map(const Windows& w, i64 rank, i64 shift, i64 bh) const {
    return contiguous_head(v + (bh * w.num_shifts + shift) * rank * w.voxels(), w);
  }
};

// The factors of every window of a chunk of heads.
template <class T, class S>
void factorize_chunk(const SwinNMF& p, bool rank_one, i64 bh_begin, i64 num_bh, int threads,
                     const FactorsOut<T>& out) {
  const Windows& w = p.windows;
  const i64 rank = p.options.rank, u_size = rank * w.head_dim, v_size = rank * w.columns();
  Windows v_windows = w;
  v_windows.head_dim = rank;
  auto write_map = [&](const Strip& strip, const T* v, i64 row) {
    add_strip<T>(v_windows, strip, {v, row}, v_size, false,
                 out.map(w, rank, strip.shift, strip.bh - bh_begin));
  };
  // u0 and v0 are indexed over the whole batch, u and v over the chunk.
  auto global = [&](i64 shift, i64 local) {
    return local + shift * (w.batch * w.heads - num_bh) * w.num_windows() + bh_begin * w.num_windows();
  };
  if (windows_fit(w, sizeof(T))) {
    const StripPlan plan = StripPlan::make<T>(w, num_bh, w.num_shifts);
    const StripMemory<T> memory(p, plan, rank_one, false);
    const Scratch scratch(threads * memory.bytes);
    parallel_for(plan.count, threads, [&](i64 task, int worker) {
      const Strip strip = plan.strip(w, task, bh_begin, w.num_shifts, 0);
      const Rows<T> x{memory.x(scratch.data(), worker), memory.stride};
      read_strip<S, T>(w, strip, head_of<const S>(p.x, w, strip.bh), p.options.relu, T(1), x,
                       memory.window_stride);
      clear_window_padding(w, strip.num_windows, x, memory.window_stride);
      const i64 first = matrix_index(w, strip, bh_begin, num_bh);
      T* v = out.maps ? memory.other(scratch.data(), worker) : out.v + first * v_size;
      for (i64 i = 0; i < strip.num_windows; ++i) {
        WindowTiles<T> tiles{w.head_dim, w.columns(), {x.data + i * memory.window_stride, x.stride},
                             {},         {},          false};
        const i64 matrix = global(strip.shift, first + i);
        factorize<T>(p.options, tiles, rank_one, memory.solver(scratch.data(), worker),
                     factor_of<T>(p.u0, matrix), factor_of<T>(p.v0, matrix), out.u + (first + i) * u_size,
                     v + i * v_size);
      }
      if (out.maps) write_map(strip, v, w.columns());
    });
    return;
  }
  LongTiles<T, S> tiles(p, whole_window(w, 0, bh_begin, 0), threads);
  const Scratch memory(solver_memory<T>(p.options, tiles, rank_one, false));
  const Scratch buffers(threads * tiles.buffer_size() * sizeof(T));
  const Scratch v_memory(out.maps ? v_size * sizeof(T) : 0);
  tiles.buffers = static_cast<T*>(buffers.data());
  for (i64 shift = 0; shift < w.num_shifts; ++shift) {
    for (i64 i = 0; i < num_bh * w.num_windows(); ++i) {
      tiles.window = whole_window(w, shift, bh_begin + i / w.num_windows(), i % w.num_windows());
      const i64 local = shift * num_bh * w.num_windows() + i;
      const i64 matrix = global(shift, local);
      T* v = out.maps ? static_cast<T*>(v_memory.data()) : out.v + local * v_size;
      factorize<T>(p.options, tiles, rank_one, memory.data(), factor_of<T>(p.u0, matrix),
                   factor_of<T>(p.v0, matrix), out.u + local * u_size, v);
      if (!out.maps) continue;
      tiles.each([&](i64 tile, int) { write_map(tiles.strip(tile), v + tiles.begin(tile), w.columns()); });
    }
  }
}

// Calls f(matrix, n, run) for the voxels [begin, begin + length) of line (i1, i2), run by run that lies in
// one window of a copy: `run` voxels from begin + n on. Matrices are counted within the chunk.
template <class F>
void each_run(const Windows& w, i64 shift, i64 bh, i64 num_bh, i64 i1, i64 i2, i64 begin, i64 length, F&& f) {
  const i64* steps = w.shifts + 3 * shift;
  const i64 q1 = (i1 + steps[0]) % w.size[0], q2 = (i2 + steps[1]) % w.size[1];
  const i64 first =
      (((shift * num_bh + bh) * w.grid(0) + q1 / w.patch[0]) * w.grid(1) + q2 / w.patch[1]) * w.grid(2);
  const i64 place = (begin + steps[2]) % w.size[2];
  i64 window = place / w.patch[2], left = w.patch[2] - place % w.patch[2];
  for (i64 n = 0; n < length;) {
    const i64 run = left < length - n ? left : length - n;
    f(first + window, n, run);
    n += run;
    left = w.patch[2];
    if (++window == w.grid(2)) window = 0;
  }
}

// Whether a piece of a line lies in one window of every copy.
bool within_windows(const Windows& w, i64 begin, i64 length) {
  for (i64 shift = 0; shift < w.num_shifts; ++shift) {
    if ((begin + w.shifts[3 * shift + 2]) % w.size[2] % w.patch[2] + length > w.patch[2]) return false;
  }
  return true;
}

// out[c] (+)= sum_k u(k, c) v[k] along a line, for k < terms <= most_terms.
template <class Terms, class T, class U>
void compose_line(Terms terms, i64 rows, i64 length, const U& u, Rows<const T> v, Rows<T> out,
                  bool accumulate) {
  each_block<T>(length, [&](auto voxels, i64 i) {
    decltype(voxels.load(out.data)) vs[most_terms];
    for (i64 k = 0; k < terms; ++k) vs[k] = voxels.load(v[k] + i);
    for (i64 c = 0; c < rows; ++c) {
      auto sum = u(voxels, 0, c, i) * vs[0];
      for (i64 k = 1; k < terms; ++k) sum += u(voxels, k, c, i) * vs[k];
      voxels.store(out[c] + i, accumulate ? voxels.load(out[c] + i) + sum : sum);
    }
  });
}

// y of a chunk of heads from its factors: at every voxel the mean over the shifts of u v, a sum of shifts x
// rank terms. u is spread along a piece of a line, so that composing it knows no windows, and kept while the
// rows of windows stay the same; inside of long windows it is one number.
template <class T, class S>
void compose_chunk(const SwinNMF& p, i64 bh_begin, i64 num_bh, int threads, const FactorsOut<T>& factors) {
  const Windows& w = p.windows;
  const i64 rows = w.head_dim, rank = p.options.rank, terms = w.num_shifts * rank;
  const T scale = T(1) / T(w.num_shifts);
  constexpr i64 shortest = 64;
  i64 segment = spread_bytes / (terms * rows * i64(sizeof(T))) / shortest * shortest;
  segment = segment < shortest ? shortest : segment;
  segment = segment < w.size[2] ? segment : w.size[2];
  const i64 segments = (w.size[2] + segment - 1) / segment;
  i64 lines = line_block / rows / segment;
  lines = lines < 1 ? 1 : lines < w.size[1] ? lines : w.size[1];
  const i64 blocks = (w.size[1] + lines - 1) / lines;
  const i64 stride = round_up<T>(segment);
  const i64 spread_size = terms * rows * stride, buffer_size = spread_size + rows * stride;
  const Scratch scratch(threads * buffer_size * sizeof(T));
  parallel_for(num_bh * segments * w.size[0] * blocks, threads, [&](i64 task, int worker) {
    const i64 block = task % blocks * lines;
    task /= blocks;
    const i64 i1 = task % w.size[0];
    task /= w.size[0];
    const i64 begin = task % segments * segment, bh = task / segments;
    const i64 length = w.size[2] - begin < segment ? w.size[2] - begin : segment;
    T* const spread = static_cast<T*>(scratch.data()) + worker * buffer_size;  // (term, row, voxel)
    const Rows<T> line{spread + spread_size, stride};
    bool in_one_window = false;
    for (i64 i2 = block; i2 < block + lines && i2 < w.size[1]; ++i2) {
      in_one_window = i2 > block ? in_one_window : within_windows(w, begin, length);
      for (i64 shift = 0; shift < w.num_shifts; ++shift) {
        const bool same_windows = i2 > block && (i2 + w.shifts[3 * shift + 1]) % w.patch[1] != 0;
        if (same_windows) continue;
        each_run(w, shift, bh, num_bh, i1, i2, begin, length, [&](i64 matrix, i64 n, i64 run) {
          for (i64 k = 0; k < rank * rows; ++k) {
            const T u = scale * factors.u[matrix * rank * rows + k];
            T* to = spread + (shift * rank * rows + k) * stride + n;
            with_length(in_one_window ? 1 : run, [&](auto count) {
              each_block<T>(count, [&](auto voxels, i64 i) { voxels.store(to + i, voxels.fill(u)); });
            });
          }
        });
      }
      const i64 place = (i1 * w.size[1] + i2) * w.size[2] + begin;
      auto compose = [&](Rows<T> out) {
        for (i64 first = 0; first < terms; first += most_terms) {
          const i64 count = terms - first < most_terms ? terms - first : most_terms;
          const Rows<const T> v{factors.v + (bh * terms + first) * w.voxels() + place, w.voxels()};
          const T* us = spread + first * rows * stride;
          with_small(count, [&](auto count) {
            if (in_one_window) {
              auto u = [&](auto voxels, i64 k, i64 c, i64) {
                return voxels.fill(us[(k * rows + c) * stride]);
              };
              compose_line(count, rows, length, u, v, out, first > 0);
            } else {
              auto u = [&](auto voxels, i64 k, i64 c, i64 i) {
                return voxels.load(us + (k * rows + c) * stride + i);
              };
              compose_line(count, rows, length, u, v, out, first > 0);
            }
          });
        }
      };
      S* const y = static_cast<S*>(p.y) + (bh_begin + bh) * rows * w.voxels() + place;
      if constexpr (std::is_same_v<S, T>) {
        compose({y, w.voxels()});
      } else {
        compose(line);
        for (i64 c = 0; c < rows; ++c) {
          transform(length, line[c], Constant<1>{}, y + c * w.voxels(),
                    [](T value) { return Storage<S>::from(value); });
        }
      }
    }
  });
}

i64 map_bytes(const Windows& w, i64 element) { return w.batch * w.heads * w.head_dim * w.voxels() * element; }

template <class T, class S>
void forward(const SwinNMF& p) {
  const Windows& w = p.windows;
  if (w.num_matrices() == 0) return;
  const bool rank_one = rank_one_applies<T>(p);
  const int threads = threads_for(p);
  if (p.u.data != nullptr) {
    factorize_chunk<T, S>(p, rank_one, 0, w.batch * w.heads, threads,
                          {static_cast<T*>(p.u.data), static_cast<T*>(p.v.data), false});
    return;
  }
  expect_writes(p.y, map_bytes(w, sizeof(S)));
  const i64 per_chunk = heads_per_chunk(w, sizeof(T));
  const i64 matrices = w.num_shifts * per_chunk * w.num_windows();
  const Scratch factors(matrices * p.options.rank * (w.head_dim + w.columns()) * sizeof(T));
  T* u = static_cast<T*>(factors.data());
  const FactorsOut<T> out{u, u + matrices * p.options.rank * w.head_dim, true};
  for (i64 bh = 0; bh < w.batch * w.heads; bh += per_chunk) {
    const i64 num_bh = w.batch * w.heads - bh < per_chunk ? w.batch * w.heads - bh : per_chunk;
    factorize_chunk<T, S>(p, rank_one, bh, num_bh, threads, out);
    compose_chunk<T, S>(p, bh, num_bh, threads, out);
  }
}

// sum += the gradients of `count` matrices (size elements each), in their order.
template <class T>
void add_in_order(const T* grads, i64 count, i64 size, double* sum, int threads) {
  constexpr i64 block = 256;
  parallel_for((size + block - 1) / block, threads, [&](i64 task, int) {
    const i64 begin = task * block, end = begin + block < size ? begin + block : size;
    for (i64 k = 0; k < count; ++k) {
      for (i64 i = begin; i < end; ++i) sum[i] += grads[k * size + i];
    }
  });
}

// Where the gradients of u0 and v0 of one chunk and shift go: their place, or, for shared factors, scratch to
// be summed.
template <class T>
struct FactorGrads {
  const Factor& out;
  const i64 size;
  T* grads = nullptr;

  T* of(i64 local, i64 global) const {
    if (out.data == nullptr) return nullptr;
    return out.stride == 0 ? grads + local * size : static_cast<T*>(out.data) + global * out.stride;
  }
};

template <class T, class S>
void backward(const SwinNMF& p) {
  const Windows& w = p.windows;
  const i64 total_bh = w.batch * w.heads, rows = w.head_dim, columns = w.columns();
  const i64 u_size = p.options.rank * rows, v_size = p.options.rank * columns;
  const bool wants_factors = p.du0.data != nullptr;
  const bool shared = wants_factors && p.du0.stride == 0;
  if (w.num_matrices() == 0) {
    if (shared) {
      fill(static_cast<T*>(p.du0.data), u_size, T(0));
      fill(static_cast<T*>(p.dv0.data), v_size, T(0));
    }
    return;
  }
  expect_writes(p.dx, map_bytes(w, sizeof(S)));
  const bool rank_one = rank_one_applies<T>(p);
  const bool fit = windows_fit(w, sizeof(T));
  const int threads = threads_for(p);
  const i64 per_chunk = heads_per_chunk(w, sizeof(T));
  const i64 chunk_matrices = per_chunk * w.num_windows();
  constexpr bool direct = sizeof(T) == sizeof(S);

  const Scratch sums((shared ? u_size + v_size : 0) * sizeof(double));
  double* u_sum = static_cast<double*>(sums.data());
  double* v_sum = u_sum + u_size;
  const Scratch grads((shared ? chunk_matrices * (u_size + v_size) : 0) * sizeof(T));
  FactorGrads<T> du0{p.du0, u_size}, dv0{p.dv0, v_size};
  if (shared) {
    fill(u_sum, u_size + v_size, 0.0);
    du0.grads = static_cast<T*>(grads.data());
    dv0.grads = du0.grads + chunk_matrices * u_size;
  }
  // Sums over the shifts are kept in the arithmetic's type.
  const Scratch dx_chunk(direct ? 0 : per_chunk * rows * w.voxels() * sizeof(T));

  const StripPlan plan = StripPlan::make<T>(w, per_chunk, 1);
  const StripMemory<T> strip_memory(p, plan, rank_one, fit);
  LongTiles<T, S> long_tiles(p, whole_window(w, 0, 0, 0), threads);
  const Scratch solver(fit ? threads * strip_memory.bytes
                           : solver_memory<T>(p.options, long_tiles, rank_one, true));
  const Scratch buffers(fit ? 0 : threads * long_tiles.buffer_size() * sizeof(T));
  long_tiles.buffers = static_cast<T*>(buffers.data());

  auto factor_grad = [&](const Factor& f, i64 matrix) { return f.data ? factor_of<T>(f, matrix) : nullptr; };

  for (i64 bh_begin = 0; bh_begin < total_bh; bh_begin += per_chunk) {
    const i64 num_bh = total_bh - bh_begin < per_chunk ? total_bh - bh_begin : per_chunk;
    T* dx = direct ? static_cast<T*>(p.dx) + bh_begin * rows * w.voxels() : static_cast<T*>(dx_chunk.data());
    for (i64 shift = 0; shift < w.num_shifts; ++shift) {
      const i64 first_matrix = (shift * total_bh + bh_begin) * w.num_windows();
      if (fit) {
        const StripPlan strips = StripPlan::make<T>(w, num_bh, 1);
        parallel_for(strips.count, threads, [&](i64 task, int worker) {
          Strip strip = strips.strip(w, task, bh_begin, 1, shift);
          const Rows<T> x{strip_memory.x(solver.data(), worker), strip_memory.stride};
          const Rows<T> dy{strip_memory.other(solver.data(), worker), strip_memory.stride};
          const i64 stride = strip_memory.window_stride;
          read_strip<S, T>(w, strip, head_of<const S>(p.x, w, strip.bh), p.options.relu, T(1), x, stride);
          clear_window_padding(w, strip.num_windows, x, stride);
          if (p.dy.data != nullptr) {
            read_strip<S, T>(w, strip, head_of<const S>(p.dy, w, strip.bh), false, T(1) / T(w.num_shifts), dy,
                             stride);
            clear_window_padding(w, strip.num_windows, dy, stride);
          }
          const i64 first = matrix_index(w, strip, bh_begin, num_bh) - shift * num_bh * w.num_windows();
          for (i64 i = 0; i < strip.num_windows; ++i) {
            const Rows<T> x_window{x.data + i * stride, x.stride}, dy_window{dy.data + i * stride, dy.stride};
            WindowTiles<T> tiles{rows, columns, x_window, dy_window, dy_window, p.options.relu};
            const i64 local = first + i, matrix = first_matrix + local;
            factorize_backward<T>(p.options, tiles, rank_one, strip_memory.solver(solver.data(), worker),
                                  factor_of<T>(p.u0, matrix), factor_of<T>(p.v0, matrix),
                                  factor_grad(p.du, matrix), factor_grad(p.dv, matrix), du0.of(local, matrix),
                                  dv0.of(local, matrix));
          }
          const i64 head = (strip.bh - bh_begin) * rows * w.voxels();
          add_strip<T>(w, strip, dy, stride, shift > 0, contiguous_head(dx + head, w));
        });
      } else {
        for (i64 local = 0; local < num_bh * w.num_windows(); ++local) {
          const i64 bh = local / w.num_windows(), matrix = first_matrix + local;
          long_tiles.window = whole_window(w, shift, bh_begin + bh, local % w.num_windows());
          long_tiles.dx = contiguous_head(dx + bh * rows * w.voxels(), w);
          factorize_backward<T>(p.options, long_tiles, rank_one, solver.data(), factor_of<T>(p.u0, matrix),
                                factor_of<T>(p.v0, matrix), factor_grad(p.du, matrix),
                                factor_grad(p.dv, matrix), du0.of(local, matrix), dv0.of(local, matrix));
        }
      }
      if (shared) {
        add_in_order(du0.grads, num_bh * w.num_windows(), u_size, u_sum, threads);
        add_in_order(dv0.grads, num_bh * w.num_windows(), v_size, v_sum, threads);
      }
    }
    if constexpr (!direct) {
      S* out = static_cast<S*>(p.dx) + bh_begin * rows * w.voxels();
      const i64 count = num_bh * rows * w.voxels(), block = line_block;
      parallel_for((count + block - 1) / block, threads, [&](i64 task, int) {
        const i64 end = (task + 1) * block < count ? (task + 1) * block : count;
        for (i64 i = task * block; i < end; ++i) out[i] = Storage<S>::from(dx[i]);
      });
    }
  }
  if (shared) {
    for (i64 i = 0; i < u_size; ++i) static_cast<T*>(p.du0.data)[i] = T(u_sum[i]);
    for (i64 i = 0; i < v_size; ++i) static_cast<T*>(p.dv0.data)[i] = T(v_sum[i]);
  }
}

}  // namespace

void swin_nmf_forward(const SwinNMF& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    forward<typename Storage<S>::Compute, S>(p);
  });
}

void swin_nmf_backward(const SwinNMF& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    backward<typename Storage<S>::Compute, S>(p);
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
