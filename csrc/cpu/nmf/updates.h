// One update of a factor, and its adjoint, for a tile of its columns.
//
// The arithmetic is factor_update.h's. Up to `lane_rank` it goes lane by lane, all in registers. Above, most
// of it are products of the Gram matrix with the tile: MU's denominator is one; HALS, where each component
// needs those before it, takes lane_rank components at a time, of which the others' part is a product.
//
// A tile is `rank` rows of `length` columns, a multiple of the vector width, zero from `valid` on. `gram` is
// symmetric, its rows gram_stride(rank) apart.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/product.h"
#include "math/factor_update.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

constexpr i64 lane_rank = 8;

template <class T>
i64 gram_stride(i64 rank) {
  return round_up<T>(rank);
}

// --- Lanes -----------------------------------------------------------------------------------

// One vector of columns of a row list, as factor_update.h wants it.
template <class T>
struct LaneRows {
  T* data;
  i64 stride;

  LaneRows(Rows<T> rows, i64 column) : data(rows.data + column), stride(rows.stride) {}
  auto get(i64 r) const { return load(data + r * stride); }
  template <class V>
  void set(i64 r, V v) {
    store(data + r * stride, v);
  }
};

// The same, held in registers.
template <class T>
struct HeldRows {
  Vec<T> rows[lane_rank];

  template <class Rank, class From>
  HeldRows(Rank rank, const From& from) {
    for (i64 r = 0; r < rank; ++r) rows[r] = from.get(r);
  }
  Vec<T> get(i64 r) const { return rows[r]; }
  void set(i64 r, Vec<T> v) { rows[r] = v; }
  template <class Rank>
  void write(Rank rank, LaneRows<T> to) const {
    for (i64 r = 0; r < rank; ++r) to.set(r, rows[r]);
  }
};

// The difference of two tiles.
template <class T>
struct LaneDifference {
  LaneRows<const T> a, b;

  auto get(i64 r) const { return a.get(r) - b.get(r); }
};

// A square of the Gram matrix on its diagonal, rank x rank.
template <class T>
struct GramBlock {
  T data[lane_rank * lane_rank];

  GramBlock(Rows<const T> gram, i64 first, i64 rank) {
    for (i64 j = 0; j < rank; ++j) {
      for (i64 r = 0; r < rank; ++r) data[j * rank + r] = gram[first + j][first + r];
    }
  }
};

// f(column) for every vector of columns.
template <class T, class F>
FK_INLINE void each_lane(i64 length, F&& f) {
  for (i64 n = 0; n < length; n += Simd<T>::width) f(n);
}

// Calls f(rank) with the rank of a block as a constant.
template <class F>
inline void with_lane_rank(i64 rank, F&& f) {
  static_assert(lane_rank == 8, "as many as there are constants");
  with_small(rank, [&](auto constant) {
    if constexpr (!std::is_same_v<decltype(constant), i64>) f(constant);
  });
}

// --- HALS in blocks --------------------------------------------------------------------------

// Calls f(first, count) for the blocks of components, in their order or from the last on.
template <class F>
inline void each_component_block(i64 rank, bool reverse, F&& f) {
  const i64 blocks = (rank + lane_rank - 1) / lane_rank;
  for (i64 i = 0; i < blocks; ++i) {
    const i64 first = (reverse ? blocks - 1 - i : i) * lane_rank;
    f(first, rank - first < lane_rank ? rank - first : lane_rank);
  }
}

// out (+)= the part that components [from, to) have in what the Gram matrix makes of `f` in rows [first, +
// count).
template <class T>
inline void multiply_components(Rows<const T> gram, i64 first, i64 count, i64 from, i64 to, Rows<const T> f,
                                Rows<T> out, i64 length, bool accumulate) {
  if (accumulate && from == to) return;
  multiply<T>(Weights<T>::in_place(gram[first] + from, count, to - from, gram.stride, 1), {f[from], f.stride},
              out, length, {accumulate});
}

template <class T>
void hals_blocks(i64 rank, T eps, Rows<const T> gram, Rows<const T> c, Rows<T> f, Rows<T> work, i64 length) {
  each_component_block(rank, false, [&](i64 first, i64 count) {
    multiply_components<T>(gram, first, count, 0, first, f, work, length, false);
    multiply_components<T>(gram, first, count, first + count, rank, f, work, length, true);
    const GramBlock<T> block(gram, first, count);
    with_lane_rank(count, [&](auto constant) {
      each_lane<T>(length, [&](i64 n) {
        const LaneRows<T> rows({f[first], f.stride}, n);
        const LaneDifference<T> projections{{{c[first], c.stride}, n}, {work, n}};
        HeldRows<T> held(constant, rows);
        hals_update<T>(constant, eps, block.data, held, projections, held);
        held.write(constant, rows);
      });
    });
  });
}

// df -= what `count` components have taken from the others' gradient is done where these are in turn. Only
// with reaches_f is df in the end the gradient of f.
template <class T>
void hals_blocks_backward(i64 rank, T eps, Rows<const T> gram, Rows<const T> f_new, Rows<T> df, Rows<T> dc,
                          Rows<T> work, i64 length, bool reaches_f) {
  each_component_block(rank, true, [&](i64 first, i64 count) {
    multiply_components<T>(gram, first, count, first + count, rank, dc, work, length, false);
    const GramBlock<T> block(gram, first, count);
    with_lane_rank(count, [&](auto constant) {
      each_lane<T>(length, [&](i64 n) {
        const LaneRows<T> rows({df[first], df.stride}, n);
        const LaneRows<const T> news({f_new[first], f_new.stride}, n);
        LaneRows<T> dcs({dc[first], dc.stride}, n);
        HeldRows<T> held(constant, LaneDifference<T>{{{df[first], df.stride}, n}, {work, n}});
        hals_update_backward<T>(constant, eps, block.data, news, held, dcs);
        held.write(constant, rows);
      });
    });
  });
  if (!reaches_f) return;
  // The components before have a part in the old ones' gradient only.
  each_component_block(rank, false, [&](i64 first, i64 count) {
    if (first == 0) return;
    multiply_components<T>(gram, first, count, 0, first, dc, work, length, false);
    for (i64 r = 0; r < count; ++r) {
      each_lane<T>(length,
                   [&](i64 n) { store(df[first + r] + n, load(df[first + r] + n) - load(work[r] + n)); });
    }
  });
}

// --- An update -------------------------------------------------------------------------------

// Whether update() leaves in `work` what update_backward() wants there.
inline bool keeps_work(const NMFOptions& o) { return !o.hals && o.rank > lane_rank; }

// out = the updated factor; it may be f itself. work: rank rows of scratch; with keeps_work() MU's
// denominator without its eps is left there.
template <class T>
void update(const NMFOptions& o, Rows<const T> gram, Rows<const T> f, Rows<const T> c, Rows<T> out,
            Rows<T> work, i64 valid, i64 length) {
  const T eps = T(o.eps);
  if (o.rank <= lane_rank) {
    const GramBlock<T> block(gram, 0, o.rank);
    with_lane_rank(o.rank, [&](auto rank) {
      each_lane<T>(length, [&](i64 n) {
        HeldRows<T> held(rank, LaneRows<const T>(f, n));
        const LaneRows<const T> cs(c, n);
        LaneRows<T> outs(out, n);
        if (o.hals) {
          hals_update<T>(rank, eps, block.data, held, cs, held);
          held.write(rank, outs);
        } else {
          mu_update<T>(rank, eps, block.data, held, cs, outs);
        }
      });
    });
  } else if (o.hals) {
    if (out.data != f.data) {
      for (i64 r = 0; r < o.rank; ++r) copy(f[r], length, out[r]);
    }
    hals_blocks<T>(o.rank, eps, gram, c, out, work, length);
  } else {
    multiply<T>(Weights<T>::in_place(gram.data, o.rank, o.rank, gram.stride, 1), f, work, length);
    for (i64 r = 0; r < o.rank; ++r) {
      each_lane<T>(length, [&](i64 n) {
        store(out[r] + n, load(f[r] + n) * load(c[r] + n) / (load(work[r] + n) + eps));
      });
    }
  }
  clear_padding(o.rank, out, valid, length);
}

// The adjoint. In: df = the gradient of f_new; dc = c (HALS does not look at it); work, rank rows: scratch,
// or with keeps_work() what update() left there. Out: dc = the gradient of c; with reaches_f df = that of f;
// dgram, where it is not null, (+)= what symmetric_gram_gradient() wants.
template <class T>
void update_backward(const NMFOptions& o, Rows<const T> gram, Rows<const T> f, Rows<const T> f_new,
                     Rows<T> dc, Rows<T> df, Rows<T> work, Rows<T> dgram, bool accumulate, i64 length,
                     bool reaches_f) {
  const T eps = T(o.eps);
  const i64 rank = o.rank;
  if (o.hals) {
    if (rank <= lane_rank) {
      const GramBlock<T> block(gram, 0, rank);
      with_lane_rank(rank, [&](auto constant) {
        each_lane<T>(length, [&](i64 n) {
          LaneRows<T> dcs(dc, n);
          HeldRows<T> held(constant, LaneRows<T>(df, n));
          hals_update_backward<T>(constant, eps, block.data, LaneRows<const T>(f_new, n), held, dcs);
          held.write(constant, LaneRows<T>(df, n));
        });
      });
    } else {
      hals_blocks_backward<T>(rank, eps, gram, f_new, df, dc, work, length, reaches_f);
    }
    if (dgram.data == nullptr) return;
    // dD_jr = - sum (j <= r ? F+_j : F_j) dC_r. Of dD + dDᵀ the lower triangle, negative, the diagonal once
    // more: there F+ stands for F.
    multiply_by_transpose<T>(rank, f, rank, dc, length, dgram, accumulate, Wanted::lower);
    multiply_by_transpose<T>(rank, dc, rank, f_new, length, dgram, true, Wanted::lower);
    for (i64 r = 0; r < rank; ++r) {
      Vec<T> sums{};
      each_lane<T>(length, [&](i64 n) { sums += (load(f_new[r] + n) - load(f[r] + n)) * load(dc[r] + n); });
      dgram[r][r] += sum<T>(sums);
    }
    return;
  }
  if (rank <= lane_rank) {
    const GramBlock<T> block(gram, 0, rank);
    with_lane_rank(rank, [&](auto constant) {
      each_lane<T>(length, [&](i64 n) {
        const LaneRows<const T> fs(f, n), news(f_new, n);
        LaneRows<T> dfs(df, n), dcs(dc, n), dqs(work, n);
        mu_update_backward<T>(constant, eps, block.data, fs, news, dcs, dfs, dcs, dqs);
      });
    });
  } else {
    for (i64 r = 0; r < rank; ++r) {
      each_lane<T>(length, [&](i64 n) {
        const Vec<T> dp = load(df[r] + n) / (load(work[r] + n) + eps);
        store(work[r] + n, -dp * load(f_new[r] + n));
        store(df[r] + n, dp * load(dc[r] + n));
        store(dc[r] + n, dp * load(f[r] + n));
      });
    }
    if (reaches_f)
      multiply<T>(Weights<T>::in_place(gram.data, rank, rank, gram.stride, 1), work, df, length, {true});
  }
  // dD_jr = sum F_j dQ_r
  if (dgram.data != nullptr) multiply_by_transpose<T>(rank, f, rank, work, length, dgram, accumulate);
}

// dD + dDᵀ of update_backward's dgram, in place: what D's gradient is multiplied with is symmetric.
template <class T>
void symmetric_gram_gradient(const NMFOptions& o, Rows<T> dgram) {
  for (i64 j = 0; j < o.rank; ++j) {
    for (i64 r = 0; r <= j; ++r) {
      dgram[j][r] = o.hals ? -dgram[j][r] : dgram[j][r] + dgram[r][j];
      dgram[r][j] = dgram[j][r];
    }
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
