// Where a solver finds the matrix X (rows x columns) that it factorises: tiles of its columns.
//
// A window is one tile that lies in cache; a long matrix is many, worked on in parallel and read anew in each
// pass. Sums over columns are formed section by section, each some consecutive tiles, and added in the
// sections' order, so that the result does not depend on the number of threads.
#pragma once

#include "cpu/common/cache.h"
#include "cpu/common/parallel.h"
#include "cpu/common/product.h"
#include "cpu/common/rows.h"
#include "cpu/nmf/volumes.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// What a solver knows of its matrix.
template <class T>
class Tiles {
 public:
  const i64 rows, columns;  // X's
  const i64 count;          // of tiles
  const Parts sections;     // of them
  const int workers;

  virtual i64 begin(
      i64 tile) const = 0;  // its first column; all but the last tile are multiples of the width
  virtual i64 valid(i64 tile) const = 0;  // its columns
  virtual i64 max_valid() const = 0;
  i64 length(i64 tile) const { return round_up<T>(valid(tile)); }
  i64 max_length() const { return round_up<T>(max_valid()); }

  // f(tile, section, worker) for every tile, a section's in their order, the sections in parallel.
  template <class F>
  void each(F&& f) const {
    parallel(sections.count, [&](i64 section, int worker) {
      for (i64 i = 0; i < sections.size(section); ++i) f(sections.begin(section) + i, section, worker);
    });
  }
  // f(task, worker) for other work on the same matrix.
  template <class F>
  void parallel(i64 tasks, F&& f) const {
    if (tasks == 1) return f(i64{0}, 0);  // a window's: a call each would cost more than it does
    parallel_for(tasks, workers, f);
  }

  // A tile's columns of X, and of dY (for a loss of Y), zero in the padding. A worker has one of each at a
  // time.
  virtual Rows<const T> x(i64 tile, int worker) = 0;
  virtual Rows<const T> dy(i64 tile, int worker) = 0;
  // Where Y's columns are put together once X's are not needed any more, and what is then done with them;
  // likewise dX and dY. x: what x(tile, worker) gave.
  virtual Rows<T> y(i64 tile, int worker) = 0;
  virtual void write_y(i64 tile, int worker) = 0;
  virtual Rows<T> dx(i64 tile, int worker) = 0;
  virtual void write_dx(i64 tile, int worker, Rows<const T> x) = 0;

 protected:
  Tiles(i64 rows, i64 columns, i64 count, const Parts& sections, int workers)
      : rows(rows), columns(columns), count(count), sections(sections), workers(workers) {}
  ~Tiles() = default;

  // The adjoint of relu, which keeps x where it is positive (or NaN).
  void mask(Rows<const T> x, Rows<T> dx, i64 valid) const {
    for (i64 m = 0; m < rows; ++m) {
      for (i64 n = 0; n < valid; ++n) dx[m][n] = x[m][n] <= T(0) ? T(0) : dx[m][n];
    }
  }
};

// A window that is in memory already: Y takes the place of X, and dX that of dY.
template <class T>
class WindowTiles final : public Tiles<T> {
 public:
  WindowTiles(i64 rows, i64 columns, Rows<T> x, Rows<T> dy, bool relu)
      : Tiles<T>(rows, columns, 1, Parts::whole(1), 1), x_(x), dy_(dy), relu_(relu) {}

  i64 begin(i64) const override { return 0; }
  i64 valid(i64) const override { return this->columns; }
  i64 max_valid() const override { return this->columns; }
  Rows<const T> x(i64, int) override { return x_; }
  Rows<const T> dy(i64, int) override { return dy_; }
  Rows<T> y(i64, int) override { return x_; }
  void write_y(i64, int) override {}
  Rows<T> dx(i64, int) override { return dy_; }
  void write_dx(i64, int, Rows<const T> x) override {
    if (relu_) this->mask(x, dy_, this->columns);
  }

 private:
  const Rows<T> x_, dy_;
  const bool relu_;
};

// How the columns of one long matrix are cut: tiles of whole lines (a line: a window's voxels along the last
// axis), or of parts of a line; all but the last a multiple of the vector width.
struct LongCut {
  i64 line, num_lines;     // of the window
  i64 tile_lines, voxels;  // of a tile: so many lines, or of one line so many voxels
  i64 tiles_per_line, count;
  Parts sections;

  template <class T>
  static LongCut make(const Windows& w, i64 rank) {
    constexpr i64 width = Simd<T>::width;
    LongCut cut;
    cut.line = w.patch[2];
    cut.num_lines = w.columns() / cut.line;
    const i64 most = tile_columns(w.head_dim, rank, sizeof(T));
    if (cut.num_lines == 1 || (cut.line % width == 0 && cut.line >= most)) {
      cut.tile_lines = 1;
      cut.voxels = cut.line < most ? cut.line : most;
    } else {
      i64 lines = most > cut.line ? most / cut.line : 1;
      if (lines * cut.line % width != 0) lines = round_up<T>(lines);
      cut.tile_lines = lines < cut.num_lines ? lines : cut.num_lines;
      cut.voxels = cut.line;
    }
    cut.tiles_per_line = (cut.line + cut.voxels - 1) / cut.voxels;
    cut.count = (cut.num_lines + cut.tile_lines - 1) / cut.tile_lines * cut.tiles_per_line;
    const i64 tiles = section_columns(w.columns(), rank) / (cut.tile_lines * cut.voxels);
    cut.sections = Parts::of(cut.count, tiles > 1 ? tiles : 1);
    return cut;
  }

  // So many that X's tile, and some of the factors' beside it, leave room in the second-level cache.
  static i64 tile_columns(i64 rows, i64 rank, i64 element) {
    constexpr i64 least = 64, most = 4096;
    const i64 fit = product_bytes * 3 / 4 / ((rows + 4 * rank) * element) / least * least;
    return fit < least ? least : fit < most ? fit : most;
  }

  // Sums over fewer would cost too much to add up (a share of them is a matrix of rank columns), fewer
  // sections would leave cores idle.
  static i64 section_columns(i64 columns, i64 rank) {
    constexpr i64 least = 64, most_sections = 64;
    i64 section = least;
    while (section * section < 16 * columns || section < rank) section *= 2;
    const i64 needed = (columns + most_sections - 1) / most_sections;
    return section < needed ? needed : section;
  }

  i64 begin(i64 tile) const {
    return tile / tiles_per_line * tile_lines * line + tile % tiles_per_line * voxels;
  }
  // The tile as a strip of the window.
  Strip strip(const Strip& window, i64 tile) const {
    Strip s = window;
    s.line = tile / tiles_per_line * tile_lines;
    s.num_lines = num_lines - s.line < tile_lines ? num_lines - s.line : tile_lines;
    s.voxel = tile % tiles_per_line * voxels;
    s.num_voxels = line - s.voxel < voxels ? line - s.voxel : voxels;
    return s;
  }
};

// One matrix of the volume, too large for the cache: tiles of its columns, read in each pass.
template <class T>
class LongTiles final : public Tiles<T> {
 public:
  LongTiles(const SwinNMF& p, int threads)
      : LongTiles(p, threads, LongCut::make<T>(p.windows, p.options.rank)) {}

  // Which window of the volume; its head's dx, to be written (shift 0) or added to, where the backward is
  // asked for.
  void select(const Strip& window, const Head<T>& dx = {}) {
    window_ = window;
    dx_ = dx;
  }
  Strip strip(i64 tile) const { return cut_.strip(window_, tile); }

  i64 begin(i64 tile) const override { return cut_.begin(tile); }
  i64 valid(i64 tile) const override {
    const Strip s = strip(tile);
    return s.num_lines * s.num_voxels;
  }
  i64 max_valid() const override { return cut_.tile_lines * cut_.voxels; }

  Rows<const T> x(i64 tile, int worker) override {
    return read(p_.x, tile, worker, 0, p_.options.relu, T(1));
  }
  Rows<const T> dy(i64 tile, int worker) override {
    return read(p_.dy, tile, worker, 1, false, T(1) / T(p_.windows.num_shifts));
  }
  Rows<T> y(i64, int worker) override { return buffer(worker, 0); }
  void write_y(i64 tile, int worker) override { write_y_strip<T>(p_, strip(tile), buffer(worker, 0), 0); }
  Rows<T> dx(i64, int worker) override { return buffer(worker, 1); }
  void write_dx(i64 tile, int worker, Rows<const T> x) override {
    const Rows<T> out = buffer(worker, 1);
    if (p_.options.relu) this->mask(x, out, valid(tile));
    add_strip<T>(p_.windows, strip(tile), out, 0, window_.shift > 0, dx_);
  }

 private:
  LongTiles(const SwinNMF& p, int threads, const LongCut& cut)
      : Tiles<T>(p.windows.head_dim, p.windows.columns(), cut.count, cut.sections, threads),
        p_(p),
        cut_(cut),
        stride_(row_stride<T>(this->max_length())),
        buffers_(threads * 2 * this->rows * stride_ * sizeof(T)) {}

  // Every worker has two: of a tile of x or y, and of dy or dx.
  Rows<T> buffer(int worker, i64 index) const {
    return {static_cast<T*>(buffers_.data()) + (2 * worker + index) * this->rows * stride_, stride_};
  }
  Rows<const T> read(const Volume& volume, i64 tile, int worker, i64 index, bool relu, T scale) const {
    const Rows<T> to = buffer(worker, index);
    read_volume<T>(p_, volume, strip(tile), relu, scale, to, 0);
    clear_padding(this->rows, to, valid(tile), this->length(tile));
    return to;
  }

  const SwinNMF& p_;
  const LongCut cut_;
  const i64 stride_;
  const Scratch buffers_;
  Strip window_{};
  Head<T> dx_{};
};

}  // namespace FK_ISA
}  // namespace factorizer
