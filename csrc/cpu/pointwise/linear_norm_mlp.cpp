// z + W2 gelu(W1 n(z) + b1) + b2 with z = x + W y + b, tile by tile, and its adjoint, which computes each tile
// again. In memory there is nothing but the inputs and the outputs. The hidden layer is taken in pieces, so
// that a tile of it stays in cache however wide it is.
#include "cpu/common/parallel.h"
#include "cpu/pointwise/columns.h"
#include "cpu/pointwise/gelu.h"
#include "cpu/pointwise/norm.h"
#include "cpu/pointwise/sums.h"
#include "cpu/pointwise/weights.h"

namespace factorizer {
namespace FK_ISA {
namespace {

constexpr i64 hidden_piece = 128;

// What forward and backward share: the cut, and the weights.
template <class T>
struct Chain {
  const LinearNormMLP& p;
  Parts hidden;
  Columns columns;
  Folded<T> first;
  Prepared<T> linear, in;

  Chain(const LinearNormMLP& problem, i64 rows, Arena& arena)
      : p(problem),
        hidden(Parts::of(p.hidden, hidden_piece)),
        columns(Columns::cut<T>(p, rows)),
        first(p.hidden, p.channels, arena),
        linear(Prepared<T>::whole(p.channels, p.in_channels, columns.total(), arena)),
        in(Prepared<T>::of_rows(p.hidden, p.channels, hidden, columns.total(), arena)) {}

  void set_weights() {
    first.set(typed<T>(p.weight1), typed<T>(p.bias1), typed<T>(p.norm_weight), typed<T>(p.norm_bias));
    linear.set(typed<T>(p.weight), p.in_channels, 1);
    in.set(first.weight, p.channels, 1);
  }

  // z of a tile, from y's columns.
  void residual(const Tile& tile, Rows<T> y, Rows<T> z) const {
    read<T>(columns, tile, p.y, p.in_channels, y);
    read<T>(columns, tile, p.x, p.channels, z);
    multiply<T>(linear.piece(0), y, z, tile.length, {true, typed<T>(p.bias)});
  }
};

template <class T>
struct Forward {
  const LinearNormMLP& p;
  Chain<T> chain;
  Prepared<T> out;
  TileMemory<T> memory;

  Forward(const LinearNormMLP& problem, Arena& arena)
      : p(problem),
        chain(p, p.in_channels + 2 * p.channels + hidden_piece, arena),
        out(Prepared<T>::of_columns(p.channels, p.hidden, chain.hidden, chain.columns.total(), arena)),
        memory(p.in_channels + 2 * p.channels + chain.hidden.largest(), chain.columns, p.threads, arena) {}

  void run() {
    chain.set_weights();
    out.set(typed<T>(p.weight2), p.hidden, 1);
    parallel_for(chain.columns.tiles(), p.threads, [&](i64 index, int worker) {
      const Tile tile = chain.columns.tile(index);
      auto rows = memory.of(worker);
      const Rows<T> y = rows(p.in_channels), z = rows(p.channels), n = rows(p.channels),
                    h = rows(chain.hidden.largest());
      chain.residual(tile, y, z);
      standardise<T>(p.channels, p.eps, z, n, tile.length, memory.scales(worker));
      for (i64 i = 0; i < chain.hidden.count; ++i) {
        multiply<T>(chain.in.piece(i), n, h, tile.length, {false, chain.first.bias + chain.hidden.begin(i)});
        gelu<T>(chain.hidden.size(i), h, tile.length);
        multiply<T>(out.piece(i), h, z, tile.length, {true, i == 0 ? typed<T>(p.bias2) : nullptr});
      }
      write<T>(chain.columns, tile, z, p.channels, p.out);
    });
  }
};

template <class T>
struct Backward {
  const LinearNormMLP& p;
  Chain<T> chain;
  Prepared<T> out_transposed, in_transposed, linear_transposed;
  Shares<T> shares;
  Sum dweight, dbias, dweight1, dbias1, dweight2, dbias2;  // dweight2 is W2's gradient transposed
  TileMemory<T> memory;

  Backward(const LinearNormMLP& problem, Arena& arena)
      : p(problem),
        chain(p, p.in_channels + 3 * p.channels + 2 * hidden_piece, arena),
        out_transposed(
            Prepared<T>::of_rows(p.hidden, p.channels, chain.hidden, chain.columns.total(), arena)),
        in_transposed(
            Prepared<T>::of_columns(p.channels, p.hidden, chain.hidden, chain.columns.total(), arena)),
        linear_transposed(Prepared<T>::whole(p.in_channels, p.channels, chain.columns.total(), arena)),
        shares(chain.columns.tiles()),
        dweight(shares.matrix(p.channels, p.in_channels)),
        dbias(shares.vector(p.channels)),
        dweight1(shares.matrix(p.hidden, p.channels)),
        dbias1(shares.vector(p.hidden)),
        dweight2(shares.matrix(p.hidden, p.channels)),
        dbias2(shares.vector(p.channels)),
        memory(p.in_channels + 3 * p.channels + 2 * chain.hidden.largest(), chain.columns, p.threads, arena) {
    shares.take(arena);
  }

  void run() {
    chain.set_weights();
    out_transposed.set(typed<T>(p.weight2), 1, p.hidden);
    in_transposed.set(chain.first.weight, 1, p.channels);
    linear_transposed.set(typed<T>(p.weight), 1, p.in_channels);
    parallel_for(shares.groups(), p.threads, [&](i64 group, int worker) {
      for (i64 index = shares.begin(group); index < shares.end(group); ++index)
        tile(chain.columns.tile(index), group, worker, index > shares.begin(group));
    });
    add_up();
  }

  // Adds to the group's share of the sums, or starts it.
  void tile(const Tile& tile, i64 group, int worker, bool add) {
    auto rows = memory.of(worker);
    const Rows<T> y = rows(p.in_channels), z = rows(p.channels), d = rows(p.channels), dn = rows(p.channels),
                  h = rows(chain.hidden.largest()), g = rows(chain.hidden.largest());
    T* scales = memory.scales(worker);
    const i64 length = tile.length;
    chain.residual(tile, y, z);
    standardise<T>(p.channels, p.eps, z, z, length, scales);
    clear_padding<T>(tile, p.channels, z);
    read<T>(chain.columns, tile, p.dout, p.channels, d);
    add_rows<T>(p.channels, d, length, shares.of(dbias2, group)[0], add);
    for (i64 i = 0; i < chain.hidden.count; ++i) {
      const i64 begin = chain.hidden.begin(i), size = chain.hidden.size(i);
      multiply<T>(chain.in.piece(i), z, h, length, {false, chain.first.bias + begin});
      multiply<T>(out_transposed.piece(i), d, g, length);
      gelu_backward<T>(size, h, g, length);
      add_rows<T>(size, g, length, shares.of(dbias1, group).data + begin, add);
      const Rows<T> share1 = shares.of(dweight1, group), share2 = shares.of(dweight2, group);
      multiply_by_transpose<T>(size, g, p.channels, z, length, {share1[begin], share1.stride}, add);
      multiply_by_transpose<T>(size, h, p.channels, d, length, {share2[begin], share2.stride}, add);
      multiply<T>(in_transposed.piece(i), g, dn, length, {i > 0});
    }
    standardise_backward<T>(p.channels, dn, z, scales, length, d, true);
    add_rows<T>(p.channels, d, length, shares.of(dbias, group)[0], add);
    multiply_by_transpose<T>(p.channels, d, p.in_channels, y, length, shares.of(dweight, group), add);
    write<T>(chain.columns, tile, d, p.channels, p.dx);
    multiply<T>(linear_transposed.piece(0), d, y, length);
    write<T>(chain.columns, tile, y, p.in_channels, p.dy);
  }

  void add_up() const {
    shares.add_up(dweight, static_cast<T*>(p.dweight), p.in_channels, 1, p.threads);
    shares.add_up(dbias, static_cast<T*>(p.dbias), 1, 1, p.threads);
    shares.add_up(dweight1, static_cast<T*>(p.dweight1), p.channels, 1, p.threads);
    shares.add_up(dbias1, static_cast<T*>(p.dbias1), 1, 1, p.threads);
    shares.add_up(dweight2, static_cast<T*>(p.dweight2), 1, p.hidden, p.threads);
    shares.add_up(dbias2, static_cast<T*>(p.dbias2), 1, 1, p.threads);
    chain.first.backward(typed<T>(p.weight1), typed<T>(p.norm_weight), typed<T>(p.norm_bias),
                         static_cast<T*>(p.dweight1), typed<T>(p.dbias1), static_cast<T*>(p.dnorm_weight),
                         static_cast<T*>(p.dnorm_bias));
  }
};

}  // namespace

void linear_norm_mlp_forward(const LinearNormMLP& p) { run_in_scratch<Forward>(p); }
void linear_norm_mlp_backward(const LinearNormMLP& p) { run_in_scratch<Backward>(p); }

}  // namespace FK_ISA
}  // namespace factorizer
