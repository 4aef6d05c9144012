// W n(x) + b tile by tile, n or W and b left out where they are not given, and its adjoint.
#include "cpu/pointwise/columns.h"
#include "cpu/pointwise/norm.h"
#include "cpu/pointwise/sums.h"
#include "cpu/pointwise/weights.h"

namespace factorizer {
namespace FK_ISA {
namespace {

template <class T>
struct Maps {
  const NormLinear& p;
  const T *scale, *shift, *weight, *bias;
  bool norm, linear;
  Columns columns;
  Folded<T> folded;

  Maps(const NormLinear& problem, Arena& arena)
      : p(problem),
        scale(typed<T>(p.norm_weight)),
        shift(typed<T>(p.norm_bias)),
        weight(typed<T>(p.weight)),
        bias(typed<T>(p.bias)),
        norm(scale != nullptr),
        linear(weight != nullptr),
        columns(Columns::cut<T>(p)),
        folded(norm && linear ? p.out_channels : 0, p.channels, arena) {}

  // Takes the norm's scale and shift into W and b, if there are both.
  void set_weights() {
    if (!norm || !linear) return;
    folded.set(weight, bias, scale, shift);
    weight = folded.weight, bias = folded.bias;
  }
};

template <class T>
struct Forward {
  const NormLinear& p;
  Maps<T> maps;
  Prepared<T> product;
  TileMemory<T> memory;

  Forward(const NormLinear& problem, Arena& arena)
      : p(problem),
        maps(p, arena),
        product(Prepared<T>::whole(p.out_channels, p.channels, maps.linear && maps.columns.many(), arena)),
        memory(p.channels + p.out_channels, maps.columns.largest(), p.threads, arena) {}

  void run() {
    maps.set_weights();
    if (maps.linear) product.set(maps.weight, p.channels, 1);
    expect_writes(p, p.y, p.out_channels);
    parallel_for(maps.columns.tiles(), p.threads, [&](i64 index, int worker) {
      const Tile tile = maps.columns.tile(index);
      auto rows = memory.of(worker);
      const Rows<T> n = rows(p.channels), y = rows(p.out_channels);
      Rows<const T> x = n;
      if (maps.norm || p.x.data == p.y.data) {
        read<T>(maps.columns, tile, p.x, p.channels, n);
      } else {
        x = take<T>(maps.columns, tile, p.x, p.channels, n);
      }
      if (maps.norm) standardise<T>(p.channels, p.eps, n, n, tile.length, memory.scales(worker));
      put<T>(maps.columns, tile, p.y, p.out_channels, y, [&](Rows<T> to) {
        if (maps.linear) {
          multiply<T>(product.piece(0), x, to, tile.length, {false, maps.bias});
        } else {
          scale_and_shift<T>(p.channels, maps.scale, maps.shift, x, to, tile.length);
        }
      });
    });
  }
};

template <class T>
struct Backward {
  const NormLinear& p;
  Maps<T> maps;
  Prepared<T> transposed;
  bool weights;  // whether their gradients are wanted
  Shares<T> shares;
  Sum dweight, dbias, dscale;  // dbias: the shift's without a linear map, as dscale
  TileMemory<T> memory;

  Backward(const NormLinear& problem, Arena& arena)
      : p(problem),
        maps(p, arena),
        transposed(Prepared<T>::whole(p.channels, p.out_channels, maps.linear, arena)),
        weights(p.dweight != nullptr || p.dnorm_weight != nullptr),
        shares(maps.columns.tiles()),
        dweight(shares.matrix(maps.linear ? p.out_channels : 0, p.channels)),
        dbias(shares.vector(p.out_channels)),
        dscale(shares.vector(maps.linear ? 0 : p.channels)),
        memory((p.addend.data != nullptr ? 3 : 2) * p.channels + p.out_channels, maps.columns.largest(),
               p.threads, arena) {
    shares.take(weights, arena);
  }

  void run() {
    maps.set_weights();
    if (maps.linear) transposed.set(maps.weight, 1, p.channels);
    expect_writes(p, p.dx, p.channels);
    parallel_for(shares.groups(), p.threads, [&](i64 group, int worker) {
      for (i64 index = shares.begin(group); index < shares.end(group); ++index)
        tile(maps.columns.tile(index), group, worker, index > shares.begin(group));
    });
    if (weights) add_up();
  }

  void tile(const Tile& tile, i64 group, int worker, bool add) {
    auto rows = memory.of(worker);
    const Rows<T> n = rows(p.channels), dn = rows(p.channels), gradient = rows(p.out_channels);
    T* scales = memory.scales(worker);
    Rows<const T> x = n;
    if (maps.norm) {
      read<T>(maps.columns, tile, p.x, p.channels, n);
    } else {
      x = take<T>(maps.columns, tile, p.x, p.channels, n);
    }
    const Rows<const T> dy = take<T>(maps.columns, tile, p.dy, p.out_channels, gradient);
    const bool adds = p.addend.data != nullptr;
    if (maps.norm) {
      standardise<T>(p.channels, p.eps, n, n, tile.length, scales);
      clear_padding<T>(p.channels, n, tile.count, tile.length);
    }
    if (weights) {
      add_rows<T>(p.out_channels, dy, tile.length, shares.of(dbias, group)[0], add);
      if (maps.linear) {
        multiply_by_transpose<T>(p.out_channels, dy, p.channels, x, tile.length, shares.of(dweight, group),
                                 add);
      } else {
        add_products<T>(p.channels, dy, x, tile.length, shares.of(dscale, group)[0], add);
      }
    }
    const auto before_norm = [&](Rows<T> to) {
      if (maps.linear) {
        multiply<T>(transposed.piece(0), dy, to, tile.length);
      } else {
        scale_and_shift<T>(p.channels, maps.scale, nullptr, dy, to, tile.length);
      }
    };
    if (!maps.norm && !adds) return put<T>(maps.columns, tile, p.dx, p.channels, dn, before_norm);
    before_norm(dn);
    const Rows<T> total = adds ? rows(p.channels) : dn;
    if (adds) read<T>(maps.columns, tile, p.addend, p.channels, total);
    if (maps.norm) {
      standardise_backward<T>(p.channels, dn, n, scales, tile.length, total, adds);
    } else {
      add_to<T>(p.channels, dn, total, tile.length);
    }
    write<T>(maps.columns, tile, total, p.channels, p.dx);
  }

  void add_up() const {
    T *to_weight = typed<T>(p.dweight), *to_bias = typed<T>(p.dbias);
    if (!maps.linear) {
      shares.add_up(dscale, typed<T>(p.dnorm_weight), 1, 1, p.threads);
      shares.add_up(dbias, typed<T>(p.dnorm_bias), 1, 1, p.threads);
      return;
    }
    shares.add_up(dweight, to_weight, p.channels, 1, p.threads);
    shares.add_up(dbias, to_bias, 1, 1, p.threads);
    if (maps.norm)
      maps.folded.backward(typed<T>(p.weight), maps.scale, maps.shift, to_weight, to_bias,
                           typed<T>(p.dnorm_weight), typed<T>(p.dnorm_bias));
  }
};

}  // namespace

void norm_linear_forward(const NormLinear& p) { run_in_scratch<Forward>(p); }
void norm_linear_backward(const NormLinear& p) { run_in_scratch<Backward>(p); }

}  // namespace FK_ISA
}  // namespace factorizer
