// Where a solver finds the matrix X (rows x columns) that it factorises: tiles of its columns.
//
// A window is one tile that lies in cache; a long matrix is many, worked on in parallel and read anew in each
// pass. Sums over columns are formed section by section, each some consecutive tiles, and added in the sections'
// order, so that the result does not depend on the number of threads. A Tiles object provides
//   i64 count, rows, columns             how many tiles; X's true size
//   i64 begin(tile), length(tile)        columns of a tile; length is padded to the vector width
//   i64 valid(tile)                      its columns without the padding
//   Parts sections                       of the tiles
//   each(f)                              f(tile, section, worker) for every tile, a section's in their order, the
//                                        sections in parallel where that pays
//   parallel(tasks, f)                   f(task, worker) for other work on the same matrix, likewise
//   Rows<const T> x(tile, worker)        X's columns, zero in the padding
//   Rows<const T> dy(tile, worker)       the same of dY (only for a loss of Y)
//   void write_y(tile, worker, compute)  compute(Rows<T>) makes Y's columns; X's are not needed any more
//   void write_dx(tile, worker, compute) compute(Rows<T>) makes dX's columns
#pragma once

#include "cpu/common/cache.h"
#include "cpu/common/parallel.h"
#include "cpu/common/product.h"
#include "cpu/common/rows.h"
#include "cpu/windows/strips.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// A window that is in memory already.
template <class T>
struct WindowTiles {
  static constexpr i64 count = 1;
  static constexpr int workers = 1;
  static constexpr Parts sections{1, 1};
  i64 rows, columns;
  Rows<T> x_rows, dy_rows;  // Y takes X's place, dX takes dY's
  bool relu;

  i64 begin(i64) const { return 0; }
  i64 length(i64) const { return round_up<T>(columns); }
  i64 max_length() const { return round_up<T>(columns); }
  i64 valid(i64) const { return columns; }
  template <class F>
  void each(F&& f) {
    f(i64{0}, i64{0}, 0);
  }
  template <class F>
  void parallel(i64 tasks, F&& f) {
    for (i64 task = 0; task < tasks; ++task) f(task, 0);
  }
  Rows<const T> x(i64, int) const { return x_rows; }
  Rows<const T> dy(i64, int) const { return dy_rows; }
  template <class F>
  void write_y(i64, int, F&& compute) {
    compute(x_rows);
  }
  template <class F>
  void write_dx(i64, int, F&& compute) {
    compute(dy_rows);
    if (relu) mask(x_rows, dy_rows, rows, columns);
  }

  // The adjoint of relu, which keeps x where it is positive (or NaN).
  static void mask(Rows<const T> x, Rows<T> dx, i64 rows, i64 columns) {
    for (i64 m = 0; m < rows; ++m) {
      for (i64 n = 0; n < columns; ++n) dx[m][n] = x[m][n] <= T(0) ? T(0) : dx[m][n];
    }
  }
};

// Tiles of whole lines, or of parts of a line, of at most so many columns where that can be had; all but the last
// a multiple of the vector width.
struct TileShape {
  i64 lines, voxels;

  template <class T>
  static TileShape make(i64 line, i64 num_lines, i64 most) {
    constexpr i64 width = Simd<T>::width;
    if (num_lines == 1 || (line % width == 0 && line >= most)) return {1, line < most ? line : most};
    i64 lines = most > line ? most / line : 1;
    if (lines * line % width != 0) lines = round_up<T>(lines);
    return {lines < num_lines ? lines : num_lines, line};
  }

  // Columns of which X's tile and some rank-row tiles beside it leave room in the second-level cache.
  static i64 columns(i64 rows, i64 rank, i64 element) {
    constexpr i64 least = 64, most = 4096;
    const i64 fit = second_level_bytes * 3 / 4 / ((rows + 4 * rank) * element) / least * least;
    return fit < least ? least : fit < most ? fit : most;
  }

  // Columns of a section: sums of fewer would cost too much to add up, fewer sections leave cores idle.
  static i64 section_columns(i64 columns) {
    constexpr i64 least = 64, most_sections = 64;
    i64 section = least;
    while (section * section < 16 * columns) section *= 2;
    const i64 needed = (columns + most_sections - 1) / most_sections;
    return section < needed ? needed : section;
  }
};

// One matrix of the volume, too large for the cache: tiles of its columns, read in each pass.
template <class T, class S>
struct LongTiles {
  const SwinNMF& p;
  Strip window{};  // which one, set by the caller, as are dx and y
  Head<T> dx{};
  Head<S> y{};
  const i64 rows, columns, line, num_lines;
  const TileShape shape;
  const int workers;
  const i64 tiles_per_line, count;
  const Parts sections;

  LongTiles(const SwinNMF& problem, int threads)
      : p(problem),
        rows(problem.windows.head_dim),
        columns(problem.windows.columns()),
        line(problem.windows.patch[2]),
        num_lines(columns / line),
        shape(TileShape::make<T>(line, num_lines,
                                 TileShape::columns(rows, problem.options.rank, sizeof(T)))),
        workers(threads),
        tiles_per_line((line + shape.voxels - 1) / shape.voxels),
        count((num_lines + shape.lines - 1) / shape.lines * tiles_per_line),
        sections(Parts::of(count, tiles_of(TileShape::section_columns(columns)))),
        stride_(row_stride<T>(max_length())),
        buffers_(workers * 2 * rows * stride_ * sizeof(T)) {}

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
    parallel(sections.count, [&](i64 section, int worker) {
      for (i64 i = 0; i < sections.size(section); ++i) f(sections.begin(section) + i, section, worker);
    });
  }
  template <class F>
  void parallel(i64 tasks, F&& f) {
    parallel_for(tasks, workers, f);
  }
  Rows<const T> x(i64 tile, int worker) const { return read(p.x, tile, worker, 0, p.options.relu, T(1)); }
  Rows<const T> dy(i64 tile, int worker) const {
    return read(p.dy, tile, worker, 1, false, T(1) / T(p.windows.num_shifts));
  }
  template <class F>
  void write_y(i64 tile, int worker, F&& compute) {
    const Rows<T> out = buffer(worker, 0);
    compute(out);
    write_strip<T, S>(p.windows, strip(tile), out, 0, y);
  }
  template <class F>
  void write_dx(i64 tile, int worker, F&& compute) {
    const Rows<T> out = buffer(worker, 1);
    compute(out);
    if (p.options.relu) WindowTiles<T>::mask(buffer(worker, 0), out, rows, valid(tile));
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
  i64 tiles_of(i64 section_columns) const {
    const i64 tiles = section_columns / (shape.lines * shape.voxels);
    return tiles > 1 ? tiles : 1;
  }
  // Every worker has two: of a tile of x or y, and of dy or dx.
  Rows<T> buffer(int worker, i64 index) const {
    return {static_cast<T*>(buffers_.data()) + (2 * worker + index) * rows * stride_, stride_};
  }
  Rows<const T> read(const Volume& volume, i64 tile, int worker, i64 index, bool relu, T scale) const {
    const Rows<T> to = buffer(worker, index);
    read_strip<S, T>(p.windows, strip(tile), head_of<const S>(volume, p.windows, window.bh), relu, scale, to,
                     0);
    clear_padding(rows, to, valid(tile), length(tile));
    return to;
  }

  const i64 stride_;
  const Scratch buffers_;
};

}  // namespace FK_ISA
}  // namespace factorizer
