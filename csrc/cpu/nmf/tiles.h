// Where a solver finds the matrix X (rows x columns) that it factorises: tiles of its columns.
//
// A window is one tile that lies in cache; a long matrix is many, worked on in parallel and read anew in each
// pass. Sums over columns are formed tile by tile and added in the tiles' order, so that the result does not
// depend on the number of threads. A Tiles object provides
//   i64 count, rows, columns             how many tiles; X's true size
//   i64 begin(tile), length(tile)        columns of a tile; length is padded to the vector width
//   i64 valid(tile)                      its columns without the padding
//   each(f)                              f(tile, worker) for every tile, in parallel where that pays
//   Rows<const T> x(tile, worker)        X's columns, zero in the padding
//   Rows<const T> dy(tile, worker)       the same of dY (only for a loss of Y)
//   void write_dx(tile, worker, x, compute)
//                                        compute(Rows<T>) makes dX's columns; x: what x(tile, worker) gave
#pragma once

#include "cpu/common/parallel.h"
#include "cpu/common/rows.h"
#include "cpu/windows/strips.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

constexpr i64 tile_columns = 4096;  // of a long matrix

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
  void write_dx(i64, int, Rows<const T> x, F&& compute) {
    compute(dx_rows);
    if (relu) mask(x, dx_rows, rows, columns);
  }

  // The adjoint of relu, which keeps x where it is positive (or NaN).
  static void mask(Rows<const T> x, Rows<T> dx, i64 rows, i64 columns) {
    for (i64 m = 0; m < rows; ++m) {
      for (i64 n = 0; n < columns; ++n) dx[m][n] = x[m][n] <= T(0) ? T(0) : dx[m][n];
    }
  }
};

// Tiles of whole lines, or of parts of a line; all but the last a multiple of the vector width.
struct TileShape {
  i64 lines, voxels;

  template <class T>
  static TileShape make(i64 line, i64 num_lines) {
    constexpr i64 width = Simd<T>::width;
    if (num_lines == 1 || (line % width == 0 && line >= tile_columns))
      return {1, line < tile_columns ? line : tile_columns};
    i64 lines = tile_columns > line ? tile_columns / line : 1;
    if (lines * line % width != 0) lines = round_up<T>(lines);
    return {lines < num_lines ? lines : num_lines, line};
  }
};

// One matrix of the volume, too large for the cache: tiles of its columns, read in each pass.
template <class T, class S>
struct LongTiles {
  const SwinNMF& p;
  Strip window{};  // which one, set by the caller, as is dx
  Head<T> dx{};
  const i64 rows, columns, line, num_lines;
  const TileShape shape;
  const int workers;
  const i64 tiles_per_line, count;

  LongTiles(const SwinNMF& problem, int threads)
      : p(problem),
        rows(problem.windows.head_dim),
        columns(problem.windows.columns()),
        line(problem.windows.patch[2]),
        num_lines(columns / line),
        shape(TileShape::make<T>(line, num_lines)),
        workers(threads),
        tiles_per_line((line + shape.voxels - 1) / shape.voxels),
        count((num_lines + shape.lines - 1) / shape.lines * tiles_per_line),
        buffers_(workers * 2 * rows * max_length() * sizeof(T)) {}

  i64 begin(i64 tile) const {
    return tile / tiles_per_line * shape.lines * line + tile % tiles_per_line * shape.voxels;
  }
  i64 valid(i64 tile) const {
    const Strip s = strip(tile);
    return s.num_lines * s.num_voxels;
  }
  i64 length(i64 tile) const { return round_up<T>(valid(tile)); }
  i64 max_length() const { return round_up<T>(shape.lines * shape.voxels); }

  template <class F>
  void each(F&& f) {
    parallel_for(count, workers, f);
  }
  Rows<const T> x(i64 tile, int worker) const { return read(p.x, tile, worker, 0, p.options.relu, T(1)); }
  Rows<const T> dy(i64 tile, int worker) const {
    return read(p.dy, tile, worker, 1, false, T(1) / T(p.windows.num_shifts));
  }
  template <class F>
  void write_dx(i64 tile, int worker, Rows<const T> x, F&& compute) {
    const Rows<T> out = buffer(worker, 1);
    compute(out);
    if (p.options.relu) WindowTiles<T>::mask(x, out, rows, valid(tile));
    add_strip<T>(p.windows, strip(tile), out, 0, window.shift > 0, dx);
  }

  Strip strip(i64 tile) const {
    Strip s = window;
    s.num_windows = 1;
    s.line = tile / tiles_per_line * shape.lines;
    s.num_lines = num_lines - s.line < shape.lines ? num_lines - s.line : shape.lines;
    s.voxel = tile % tiles_per_line * shape.voxels;
    s.num_voxels = line - s.voxel < shape.voxels ? line - s.voxel : shape.voxels;
    return s;
  }

 private:
  // Every worker has two: of a tile of x, and of dy or dx.
  Rows<T> buffer(int worker, i64 index) const {
    return {static_cast<T*>(buffers_.data()) + (2 * worker + index) * rows * max_length(), max_length()};
  }
  Rows<const T> read(const Volume& volume, i64 tile, int worker, i64 index, bool relu, T scale) const {
    const Rows<T> to = buffer(worker, index);
    read_strip<S, T>(p.windows, strip(tile), head_of<const S>(volume, p.windows, window.bh), relu, scale, to,
                     0);
    clear_padding(rows, to, valid(tile), length(tile));
    return to;
  }

  const Scratch buffers_;
};

}  // namespace FK_ISA
}  // namespace factorizer
