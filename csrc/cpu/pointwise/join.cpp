// V s + W* x + b, where W* is a transposed convolution whose stride is its kernel, and the convolution that
// is its adjoint: products of the coarse voxels with all places of a block at once.
#include "cpu/pointwise/blocks.h"
#include "cpu/pointwise/sums.h"
#include "cpu/pointwise/weights.h"

namespace factorizer {
namespace FK_ISA {
namespace {

// Scratch for tiles of coarse and of fine columns.
template <class T>
struct Scratchpad {
  TileMemory<T> coarse, fine;

  Scratchpad(const Blocks& p, i64 coarse_rows, i64 fine_rows, const Columns& columns, Arena& arena)
      : coarse(coarse_rows, columns.largest(), p.threads, arena),
        fine(fine_rows, columns.largest() * p.scale[2], p.threads, arena) {}
};

template <class T>
struct JoinForward {
  const Join& p;
  Columns columns;
  Lines<T> lines;
  Prepared<T> skip_map, map;
  Scratchpad<T> memory;

  JoinForward(const Join& problem, Arena& arena)
      : p(problem),
        columns(Columns::cut<T>(p, p.scale[2])),
        lines(p, columns),
        skip_map(Prepared<T>::whole(p.out_channels, p.skip_channels, columns.many(), arena)),
        map(Prepared<T>::whole(p.out_channels * p.block(), p.channels, true, arena)),
        memory(p, p.channels + p.out_channels * p.block(), p.skip_channels + p.out_channels, columns, arena) {
  }

  void run() {
    skip_map.set(typed<T>(p.skip_weight), p.skip_channels, 1);
    map.set(typed<T>(p.weight), 1, p.out_channels * p.block());
    expect_writes(p, p.y, p.out_channels * p.block());
    parallel_for(columns.tiles(), p.threads, [&](i64 index, int worker) {
      const Tile tile = columns.tile(index);
      auto coarse = memory.coarse.of(worker), fine = memory.fine.of(worker);
      const Rows<T> x = coarse(p.channels), blocks = coarse(p.out_channels * p.block());
      const Rows<T> skip = fine(p.skip_channels), y = fine(p.out_channels);
      read<T>(columns, tile, p.x, p.channels, x);
      multiply<T>(map.piece(0), x, blocks, tile.length);
      for (i64 line = 0; line < lines.count(); ++line) {
        lines.scatter(tile, line, blocks, p.out_channels, y);
        lines.read(tile, line, p.skip, p.skip_channels, skip);
        multiply<T>(skip_map.piece(0), skip, y, tile.length * p.scale[2], {true, typed<T>(p.bias)});
        lines.write(tile, line, y, p.out_channels, p.y);
      }
    });
  }
};

template <class T>
struct JoinBackward {
  const Join& p;
  Columns columns;
  Lines<T> lines;
  Prepared<T> skip_transposed, map;
  bool weights;  // whether their gradients are wanted
  Shares<T> shares;
  Sum dskip_weight, dweight, dbias;
  Scratchpad<T> memory;

  JoinBackward(const Join& problem, Arena& arena)
      : p(problem),
        columns(Columns::cut<T>(p, p.scale[2])),
        lines(p, columns),
        skip_transposed(Prepared<T>::whole(p.skip_channels, p.out_channels, true, arena)),
        map(Prepared<T>::whole(p.channels, p.out_channels * p.block(), columns.many(), arena)),
        weights(p.dweight != nullptr),
        shares(columns.tiles()),
        dskip_weight(shares.matrix(p.out_channels, p.skip_channels)),
        dweight(shares.matrix(p.channels, p.out_channels * p.block())),
        dbias(shares.vector(p.out_channels)),
        memory(p, 2 * p.channels + p.out_channels * p.block(), p.skip_channels + p.out_channels, columns,
               arena) {
    shares.take(weights, arena);
  }

  void run() {
    skip_transposed.set(typed<T>(p.skip_weight), 1, p.skip_channels);
    map.set(typed<T>(p.weight), p.out_channels * p.block(), 1);
    expect_writes(p, p.dskip, p.skip_channels * p.block());
    parallel_for(shares.groups(), p.threads, [&](i64 group, int worker) {
      for (i64 index = shares.begin(group); index < shares.end(group); ++index)
        tile(columns.tile(index), group, worker, index > shares.begin(group));
    });
    if (!weights) return;
    shares.add_up(dskip_weight, typed<T>(p.dskip_weight), p.skip_channels, 1, p.threads);
    shares.add_up(dweight, typed<T>(p.dweight), p.out_channels * p.block(), 1, p.threads);
    shares.add_up(dbias, typed<T>(p.dbias), 1, 1, p.threads);
  }

  void tile(const Tile& tile, i64 group, int worker, bool add) {
    auto coarse = memory.coarse.of(worker), fine = memory.fine.of(worker);
    const Rows<T> x = coarse(p.channels), dx = coarse(p.channels);
    const Rows<T> blocks = coarse(p.out_channels * p.block());
    const Rows<T> skip = fine(p.skip_channels), dy = fine(p.out_channels);
    const i64 length = tile.length * p.scale[2];
    for (i64 line = 0; line < lines.count(); ++line) {
      const bool add_line = add || line > 0;
      lines.read(tile, line, p.dy, p.out_channels, dy);
      lines.gather(tile, line, dy, p.out_channels, blocks);
      if (weights) {
        add_rows<T>(p.out_channels, dy, length, shares.of(dbias, group)[0], add_line);
        lines.read(tile, line, p.skip, p.skip_channels, skip);
        multiply_by_transpose<T>(p.out_channels, dy, p.skip_channels, skip, length,
                                 shares.of(dskip_weight, group), add_line);
      }
      multiply<T>(skip_transposed.piece(0), dy, skip, length);
      lines.write(tile, line, skip, p.skip_channels, p.dskip);
    }
    multiply<T>(map.piece(0), blocks, dx, tile.length);
    write<T>(columns, tile, dx, p.channels, p.dx);
    if (!weights) return;
    read<T>(columns, tile, p.x, p.channels, x);
    multiply_by_transpose<T>(p.channels, x, p.out_channels * p.block(), blocks, tile.length,
                             shares.of(dweight, group), add);
  }
};

template <class T>
struct PatchForward {
  const PatchConv& p;
  Columns columns;
  Lines<T> lines;
  Prepared<T> map;
  Scratchpad<T> memory;

  PatchForward(const PatchConv& problem, Arena& arena)
      : p(problem),
        columns(Columns::cut<T>(p, p.scale[2])),
        lines(p, columns),
        map(Prepared<T>::whole(p.out_channels, p.channels * p.block(), columns.many(), arena)),
        memory(p, p.out_channels + p.channels * p.block(), p.channels, columns, arena) {}

  void run() {
    map.set(typed<T>(p.weight), p.channels * p.block(), 1);
    expect_writes(p, p.y, p.out_channels);
    parallel_for(columns.tiles(), p.threads, [&](i64 index, int worker) {
      const Tile tile = columns.tile(index);
      auto coarse = memory.coarse.of(worker), fine = memory.fine.of(worker);
      const Rows<T> y = coarse(p.out_channels), blocks = coarse(p.channels * p.block());
      const Rows<T> x = fine(p.channels);
      for (i64 line = 0; line < lines.count(); ++line) {
        lines.read(tile, line, p.x, p.channels, x);
        lines.gather(tile, line, x, p.channels, blocks);
      }
      multiply<T>(map.piece(0), blocks, y, tile.length, {false, typed<T>(p.bias)});
      write<T>(columns, tile, y, p.out_channels, p.y);
    });
  }
};

template <class T>
struct PatchBackward {
  const PatchConv& p;
  Columns columns;
  Lines<T> lines;
  Prepared<T> transposed;
  bool weights;  // whether their gradients are wanted
  Shares<T> shares;
  Sum dweight, dbias;
  Scratchpad<T> memory;

  PatchBackward(const PatchConv& problem, Arena& arena)
      : p(problem),
        columns(Columns::cut<T>(p, p.scale[2])),
        lines(p, columns),
        transposed(Prepared<T>::whole(p.channels * p.block(), p.out_channels, true, arena)),
        weights(p.dweight != nullptr),
        shares(columns.tiles()),
        dweight(shares.matrix(p.out_channels, p.channels * p.block())),
        dbias(shares.vector(p.out_channels)),
        memory(p, p.out_channels + p.channels * p.block(), p.channels, columns, arena) {
    shares.take(weights, arena);
  }

  void run() {
    transposed.set(typed<T>(p.weight), 1, p.channels * p.block());
    expect_writes(p, p.dx, p.channels * p.block());
    parallel_for(shares.groups(), p.threads, [&](i64 group, int worker) {
      for (i64 index = shares.begin(group); index < shares.end(group); ++index)
        tile(columns.tile(index), group, worker, index > shares.begin(group));
    });
    if (!weights) return;
    shares.add_up(dweight, typed<T>(p.dweight), p.channels * p.block(), 1, p.threads);
    shares.add_up(dbias, typed<T>(p.dbias), 1, 1, p.threads);
  }

  void tile(const Tile& tile, i64 group, int worker, bool add) {
    auto coarse = memory.coarse.of(worker), fine = memory.fine.of(worker);
    const Rows<T> dy = coarse(p.out_channels), blocks = coarse(p.channels * p.block());
    const Rows<T> x = fine(p.channels);
    read<T>(columns, tile, p.dy, p.out_channels, dy);
    if (weights) {
      for (i64 line = 0; line < lines.count(); ++line) {
        lines.read(tile, line, p.x, p.channels, x);
        lines.gather(tile, line, x, p.channels, blocks);
      }
      add_rows<T>(p.out_channels, dy, tile.length, shares.of(dbias, group)[0], add);
      multiply_by_transpose<T>(p.out_channels, dy, p.channels * p.block(), blocks, tile.length,
                               shares.of(dweight, group), add);
    }
    multiply<T>(transposed.piece(0), dy, blocks, tile.length);
    for (i64 line = 0; line < lines.count(); ++line) {
      lines.scatter(tile, line, blocks, p.channels, x);
      lines.write(tile, line, x, p.channels, p.dx);
    }
  }
};

}  // namespace

void join_forward(const Join& p) { run_in_scratch<JoinForward>(p); }
void join_backward(const Join& p) { run_in_scratch<JoinBackward>(p); }
void patch_conv_forward(const PatchConv& p) { run_in_scratch<PatchForward>(p); }
void patch_conv_backward(const PatchConv& p) { run_in_scratch<PatchBackward>(p); }

}  // namespace FK_ISA
}  // namespace factorizer
