// z + W2 gelu(W1 n(z) + b1) + b2 with z = x + W y + b, tile by tile, and its adjoint, which computes each
// tile again. In memory there is nothing but the inputs and the outputs. The hidden layer is taken in pieces,
// so that a tile of it stays in cache however wide it is.
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

  Chain(const LinearNormMLP& problem, Arena& arena)
      : p(problem),
        hidden(Parts::of(p.hidden, hidden_piece)),
        columns(Columns::cut<T>(p)),
        first(p.hidden, p.channels, arena),
        linear(Prepared<T>::whole(p.channels, p.in_channels, columns.many(), arena)),
        in(Prepared<T>::of_rows(p.hidden, p.channels, hidden, columns.many(), arena)) {}

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
        chain(p, arena),
        out(Prepared<T>::of_columns(p.channels, p.hidden, chain.hidden, chain.columns.many(), arena)),
        memory(p.in_channels + 2 * p.channels + chain.hidden.largest(), chain.columns.largest(), p.threads,
               arena) {}

  void run() {
    chain.set_weights();
    out.set(typed<T>(p.weight2), p.hidden, 1);
    expect_writes(p, p.out, p.channels);
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
  bool weights;  // whether their gradients are wanted
  Shares<T> shares;
  Sum dweight, dbias, dweight1, dbias1, dweight2, dbias2;  // dweight2 is W2's gradient transposed
  TileMemory<T> memory;

  Backward(const LinearNormMLP& problem, Arena& arena)
      : p(problem),
        chain(p, arena),
        out_transposed(Prepared<T>::of_rows(p.hidden, p.channels, chain.hidden, true, arena)),
        in_transposed(Prepared<T>::of_columns(p.channels, p.hidden, chain.hidden, true, arena)),
        linear_transposed(Prepared<T>::whole(p.in_channels, p.channels, true, arena)),
        weights(p.dweight != nullptr),
        shares(chain.columns.tiles()),
        dweight(shares.matrix(p.channels, p.in_channels)),
        dbias(shares.vector(p.channels)),
        dweight1(shares.matrix(p.hidden, p.channels)),
        dbias1(shares.vector(p.hidden)),
        dweight2(shares.matrix(p.hidden, p.channels)),
        dbias2(shares.vector(p.channels)),
        memory(p.in_channels + 3 * p.channels + 2 * chain.hidden.largest(), chain.columns.largest(),
               p.threads, arena) {
    shares.take(weights, arena);
  }

  void run() {
    chain.set_weights();
    out_transposed.set(typed<T>(p.weight2), 1, p.hidden);
    in_transposed.set(chain.first.weight, 1, p.channels);
    linear_transposed.set(typed<T>(p.weight), 1, p.in_channels);
    expect_writes(p, p.dx, p.channels);
    expect_writes(p, p.dy, p.in_channels);
    parallel_for(shares.groups(), p.threads, [&](i64 group, int worker) {
      for (i64 index = shares.begin(group); index < shares.end(group); ++index)
        tile(chain.columns.tile(index), group, worker, index > shares.begin(group));
    });
    if (weights) add_up();
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
    clear_padding<T>(p.channels, z, tile.count, tile.length);
    read<T>(chain.columns, tile, p.dout, p.channels, d);
    if (weights) add_rows<T>(p.channels, d, length, shares.of(dbias2, group)[0], add);
    for (i64 i = 0; i < chain.hidden.count; ++i) {
      const i64 begin = chain.hidden.begin(i), size = chain.hidden.size(i);
      multiply<T>(chain.in.piece(i), z, h, length, {false, chain.first.bias + begin});
      multiply<T>(out_transposed.piece(i), d, g, length);
      gelu_backward<T>(size, h, g, length);
      if (weights) {
        add_rows<T>(size, g, length, shares.of(dbias1, group)[begin], add);
        multiply_by_transpose<T>(size, g, p.channels, z, length, from_row(shares.of(dweight1, group), begin),
                                 add);
        multiply_by_transpose<T>(size, h, p.channels, d, length, from_row(shares.of(dweight2, group), begin),
                                 add);
      }
      multiply<T>(in_transposed.piece(i), g, dn, length, {i > 0});
    }
    standardise_backward<T>(p.channels, dn, z, scales, length, d, true);
    if (weights) {
      // Without eps the scale of a padding column is infinite, and its d not a number.
      clear_padding<T>(p.channels, d, tile.count, length);
      add_rows<T>(p.channels, d, length, shares.of(dbias, group)[0], add);
      multiply_by_transpose<T>(p.channels, d, p.in_channels, y, length, shares.of(dweight, group), add);
    }
    write<T>(chain.columns, tile, d, p.channels, p.dx);
    multiply<T>(linear_transposed.piece(0), d, y, length);
    write<T>(chain.columns, tile, y, p.in_channels, p.dy);
  }

  void add_up() const {
    const auto add_up = [&](const Sum& sum, void* to, i64 row, i64 column) {
      shares.add_up(sum, typed<T>(to), row, column, p.threads);
    };
    add_up(dweight, p.dweight, p.in_channels, 1);
    add_up(dbias, p.dbias, 1, 1);
    add_up(dweight1, p.dweight1, p.channels, 1);
    add_up(dbias1, p.dbias1, 1, 1);
    add_up(dweight2, p.dweight2, 1, p.hidden);
    add_up(dbias2, p.dbias2, 1, 1);
    chain.first.backward(typed<T>(p.weight1), typed<T>(p.norm_weight), typed<T>(p.norm_bias),
                         typed<T>(p.dweight1), typed<T>(p.dbias1), typed<T>(p.dnorm_weight),
                         typed<T>(p.dnorm_bias));
  }
};

}  // namespace

void linear_norm_mlp_forward(const LinearNormMLP& p) { run_in_scratch<Forward>(p); }
void linear_norm_mlp_backward(const LinearNormMLP& p) { run_in_scratch<Backward>(p); }

}  // namespace FK_ISA
}  // namespace factorizer
