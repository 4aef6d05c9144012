// depthwise_conv on the CPU.
//
// A task is a tile of one map. Planes of the map that is filtered (x; in the backward dy) are copied to a
// buffer that fits the cache, padded with zeros and in the arithmetic's type, so that the inner loops know no
// edges. Large maps stream through it: it is a ring of as many planes as the filter is deep, and rows are
// filtered. Of small maps it holds the whole depth, and a plane is filtered as one long row, the gaps between
// its rows included.
//
// The backward streams dy: dx is dy filtered by the mirrored weights, and the weights' gradients are what x
// and the shifted dy have in common, tile by tile; the tiles' shares are added up in their order.
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/common/storage.h"
#include "cpu/depthwise/filter.h"
#include "cpu/depthwise/maps.h"
#include "cpu/depthwise/plan.h"

namespace factorizer {
namespace FK_ISA {
namespace {

template <class T, i64 N>
FK_INLINE T lane_sum(const T* lanes, Constant<N>) {
  if constexpr (N == 1) {
    return *lanes;
  } else {
    return lane_sum(lanes, Constant<N / 2>{}) + lane_sum(lanes + N / 2, Constant<N / 2>{});
  }
}

// What one thread works with, and the work on one tile.
template <class T, class S>
class Worker {
 public:
  // Memory of the arena that is all zero; with a null arena it only counts.
  Worker(const Plan& plan, const DepthwiseConv& p, Arena& arena) : plan_(plan), p_(p) {
    across_ = p.kernel[plan.deep ? 0 : 1];
    padded_ = arena.take<T>(plan.lead + plan.planes * plan.plane + plan.reach[2] + Simd<T>::width);
    x_ = arena.take<T>(plan.deep ? plan.tile[0] * plan.length : plan.tile[1] * plan.pitch);
    rows_ = arena.take<T>(8 * round_up<T>(plan.length));
    totals_ = arena.take<T>((p.taps() + 1) * Simd<T>::width);
    weights_ = arena.take<T>(p.taps());
    packed_ = arena.take<i64>(p.taps());
    offsets_ = arena.take<i64>(p.taps() * p.kernel[0]);
  }

  // To be called once.
  void prepare() {
    set_taps();
    switch (across_) {
      case 1: return choose<1>();
      case 3: return choose<3>();
      case 5: return choose<5>();
      default: return choose<7>();
    }
  }

  void forward(const Tile& tile) {
    const T* bias = static_cast<const T*>(p_.bias);
    bias_ = bias == nullptr ? T(0) : bias[tile.channel];
    take_weights(tile.channel, false);
    run(tile, map_of<S>(p_.x, tile.sample, tile.channel), p_.y, false);
  }

  // shares: this tile's part of the gradients of the channel's weights and, after them, of its bias; or null.
  void backward(const Tile& tile, T* shares) {
    bias_ = T(0);
    if (p_.dx != nullptr) take_weights(tile.channel, true);
    if (shares != nullptr) fill(totals_, (p_.taps() + 1) * Simd<T>::width, T(0));
    run(tile, map_of<S>(p_.dy, tile.sample, tile.channel), p_.dx, shares != nullptr);
    if (shares == nullptr) return;
    const i64 taps = p_.taps();
    for (i64 tap = 0; tap < taps; ++tap) shares[taps - 1 - tap] = total(packed_[tap]);
    shares[taps] = total(taps);
  }

 private:
  template <int K>
  void choose() {
    filter_ = filter<T, K>;
    correlate_ = correlate<T, K>;
  }

  void take_weights(i64 channel, bool mirrored) {
    const i64 taps = p_.taps();
    const T* weights = static_cast<const T*>(p_.weight) + channel * taps;
    if (mirrored) {
      for (i64 tap = 0; tap < taps; ++tap) weights_[packed_[tap]] = weights[taps - 1 - tap];
    } else {
      for (i64 tap = 0; tap < taps; ++tap) weights_[packed_[tap]] = weights[tap];
    }
  }

  // Where each tap lies among the packed ones, of which those across the rows are side by side; and, for
  // these, the way from a voxel to the first voxel across its row that they see. In a ring it depends on
  // where the first plane lies.
  void set_taps() {
    const i64* k = p_.kernel;
    i64* packed = packed_;
    for (i64 a = 0; a < k[0]; ++a) {
      for (i64 b = 0; b < k[1]; ++b) {
        for (i64 c = 0; c < k[2]; ++c) {
          *packed++ = plan_.deep ? (b * k[2] + c) * k[0] + a : (a * k[2] + c) * k[1] + b;
        }
      }
    }
    i64* offset = offsets_;
    const auto add = [&](i64 planes, i64 rows, i64 columns) {
      *offset++ = planes * plan_.plane + (rows - plan_.reach[1]) * plan_.pitch + columns - plan_.reach[2];
    };
    if (plan_.deep) {
      for (i64 b = 0; b < k[1]; ++b) {
        for (i64 c = 0; c < k[2]; ++c) add(0, b, c);
      }
      return;
    }
    for (i64 first = 0; first < k[0]; ++first) {
      for (i64 a = 0; a < k[0]; ++a) {
        for (i64 c = 0; c < k[2]; ++c) add((first + a) % k[0], 0, c);
      }
    }
  }

  // The tile's first voxel, in a plane of the buffer.
  T* plane_at(i64 slot) const {
    return padded_ + plan_.lead + slot * plan_.plane + plan_.reach[1] * plan_.pitch;
  }

  void clear(i64 slot) const {
    fill(padded_ + plan_.lead + slot * plan_.plane - plan_.reach[2], plan_.plane + plan_.reach[2], T(0));
  }

  // The tile's plane z, with what the filter sees around it.
  void read_plane(const Tile& tile, const Map<const S>& map, i64 z, i64 slot) const {
    if (!plan_.whole_planes()) clear(slot);  // of what another tile has left around it
    const i64* begin = tile.begin;
    const i64 above = std::min(begin[1], plan_.reach[1]), before = std::min(begin[2], plan_.reach[2]);
    const i64 rows = above + std::min(tile.extent[1] + plan_.reach[1], p_.size[1] - begin[1]);
    const i64 columns = before + std::min(tile.extent[2] + plan_.reach[2], p_.size[2] - begin[2]);
    read_rows(map.at(z, begin[1] - above, begin[2] - before), map.stride[1], map.stride[2],
              plane_at(slot) - above * plan_.pitch - before, plan_.pitch, rows, columns);
  }

  // Some rows of dy to the bias' gradient.
  void add_rows(i64 slot, i64 rows, i64 count) const {
    if (p_.dbias == nullptr) return;
    T* const to = totals_ + p_.taps() * Simd<T>::width;
    store(to, load(to) + sum_rows(plane_at(slot), plan_.pitch, rows, count));
  }

  T total(i64 packed) const {
    return lane_sum(totals_ + packed * Simd<T>::width, Constant<Simd<T>::width>{});
  }

  // Filters `in` to `out`, unless that is null, and correlates x with it.
  void run(const Tile& tile, const Map<const S>& in, void* out, bool correlates) {
    const i64 index = tile.sample * p_.channels + tile.channel;
    const Map<S> result{static_cast<S*>(out) + index * p_.voxels(), {p_.size[1] * p_.size[2], p_.size[2], 1}};
    const Map<const S> x = map_of<S>(p_.x, tile.sample, tile.channel);
    plan_.deep ? run_deep(tile, in, out ? &result : nullptr, correlates ? &x : nullptr)
               : run_ring(tile, in, out ? &result : nullptr, correlates ? &x : nullptr);
  }

  // --- A ring of planes, filtered row by row --------------------------------------------------

  void run_ring(const Tile& tile, const Map<const S>& in, const Map<S>* out, const Map<const S>* x) {
    const i64* k = p_.kernel;
    const i64 reach = plan_.reach[0], end = tile.begin[0] + tile.extent[0];
    i64 read = std::max<i64>(0, tile.begin[0] - reach);
    for (i64 z = tile.begin[0], phase = 0; z < end; ++z, phase = phase + 1 < k[0] ? phase + 1 : 0) {
      const auto slot =
          [&](i64 plane) {  // planes z - reach to z + reach lie one after another from `phase` on
            const i64 at = phase + plane - (z - reach);
            return at < k[0] ? at : at - k[0];
          };
      for (; read <= std::min(p_.size[0] - 1, z + reach); ++read) read_plane(tile, in, read, slot(read));
      // Planes outside of the map are left out.
      const i64 first = std::max<i64>(0, reach - z), last = std::min(k[0], p_.size[0] - z + reach);
      const i64* offsets = offsets_ + (phase * k[0] + first) * k[2];
      const i64 count = (last - first) * k[2], weights = first * k[2] * k[1];
      if (out != nullptr) filter_plane(tile, z, {offsets, count, weights_ + weights, bias_}, *out, in, x);
      if (x != nullptr) {
        correlate_plane(tile, z, offsets, count, totals_ + weights * Simd<T>::width, *x);
        add_rows(slot(z), tile.extent[1], tile.extent[2]);
      }
    }
  }

  void filter_plane(const Tile& tile, i64 z, const Taps<T>& taps, const Map<S>& out, const Map<const S>& in,
                    const Map<const S>* x) {
    const i64 columns = tile.extent[2], length = round_up<T>(columns);
    const T* first = padded_ + plan_.lead + plan_.reach[1] * plan_.pitch;
    each_row_block(tile.extent[1], [&](i64 row, i64 rows) {
      const i64 y = tile.begin[1] + row, next = z + plan_.reach[0] + 1;
      S* const to = out.at(z, y, tile.begin[2]);
      // What is written next, the plane that is read next, and x, which is correlated next.
      const Ahead ahead[] = {
          {to + rows * out.stride[1], out.stride[1]},
          {in.at(next, y, tile.begin[2]), in.stride[1]},
          x == nullptr ? Ahead(to, 0) : Ahead(x->at(z, y, tile.begin[2]), x->stride[1]),
      };
      const AheadList list{ahead, in.stride[2] > 1 ? 1 : x == nullptr ? 2 : 3};
      const T* from = first + row * plan_.pitch;
      if constexpr (std::is_same_v<T, S>) {
        if (columns >= Simd<T>::width) {
          return filter_(rows, from, plan_.pitch, taps, to, out.stride[1], columns, list);
        }
      }
      filter_(rows, from, plan_.pitch, taps, rows_, length, length, list);
      write_rows(rows_, length, to, out.stride[1], rows, columns);
    });
  }

  void correlate_plane(const Tile& tile, i64 z, const i64* offsets, i64 count, T* totals,
                       const Map<const S>& x) {
    const S* from = x.at(z, tile.begin[1], tile.begin[2]);
    const i64 columns = tile.extent[2], length = round_up<T>(columns);
    const T* dy = padded_ + plan_.lead + plan_.reach[1] * plan_.pitch;
    if constexpr (std::is_same_v<T, S>) {
      if (x.stride[2] == 1 && length == columns) {
        return correlate_(tile.extent[1], from, x.stride[1], dy, plan_.pitch, offsets, count, length, totals);
      }
    }
    if (columns < plan_.tile[2]) fill(x_, tile.extent[1] * plan_.pitch, T(0));  // the gaps between the rows
    read_rows(from, x.stride[1], x.stride[2], x_, plan_.pitch, tile.extent[1], columns);
    correlate_(tile.extent[1], x_, plan_.pitch, dy, plan_.pitch, offsets, count, length, totals);
  }

  // --- All planes, each filtered as one row ---------------------------------------------------

  void run_deep(const Tile& tile, const Map<const S>& in, const Map<S>* out, const Map<const S>* x) {
    const i64 depth = tile.extent[0], rows = p_.size[1], columns = p_.size[2];
    for (i64 slot = 0; slot < depth + p_.kernel[0] - 1; ++slot) {
      const i64 z = tile.begin[0] - plan_.reach[0] + slot;
      if (0 <= z && z < p_.size[0]) {
        read_plane(tile, in, z, slot);
      } else if (plan_.tiles[0] > 1) {  // else no tile has left anything there
        clear(slot);
      }
    }
    const T* first = plane_at(0);
    const Taps<T> taps{offsets_, p_.kernel[1] * p_.kernel[2], weights_, bias_};
    if (out != nullptr) {
      each_row_block(depth, [&](i64 z, i64 planes) {
        filter_(planes, first + z * plan_.plane, plan_.plane, taps, rows_, plan_.length, plan_.length, {});
        for (i64 plane = 0; plane < planes; ++plane) {
          write_rows(rows_ + plane * plan_.length, plan_.pitch, out->at(tile.begin[0] + z + plane, 0, 0),
                     columns, rows, columns);
        }
      });
    }
    if (x != nullptr) {
      for (i64 z = 0; z < depth; ++z) {
        read_rows(x->at(tile.begin[0] + z, 0, 0), x->stride[1], x->stride[2], x_ + z * plan_.length,
                  plan_.pitch, rows, columns);
        add_rows(plan_.reach[0] + z, 1, (rows - 1) * plan_.pitch + columns);
      }
      correlate_(depth, x_, plan_.length, first, plan_.plane, taps.offsets, taps.count, plan_.length,
                 totals_);
    }
  }

  const Plan& plan_;
  const DepthwiseConv& p_;
  i64 across_;  // the filter's extent across the rows
  Filter<T> filter_ = nullptr;
  Correlate<T> correlate_ = nullptr;
  T *padded_, *x_, *rows_;  // x_: a plane of x, or all of them
  T *weights_, *totals_;    // packed; of totals a vector each, and one for the bias
  i64 *packed_, *offsets_;
  T bias_ = T(0);
};

// Calls work(worker, tile's number) for all tiles.
template <class T, class S, class F>
void each_tile(const DepthwiseConv& p, const Plan& plan, F&& work) {
  const i64 tiles = p.channels * p.batch * plan.num_tiles();
  // Small tiles are handed out several at a time.
  constexpr i64 enough = 8192;  // voxels
  const i64 voxels = plan.tile[0] * plan.tile[1] * plan.tile[2];
  const i64 group = std::clamp<i64>(enough / voxels, 1, std::max<i64>(1, tiles / (4 * p.threads)));
  const i64 tasks = parts(tiles, group);
  const int threads = static_cast<int>(std::min<i64>(p.threads, tasks));
  Arena counter(nullptr);
  Worker<T, S>(plan, p, counter);
  const Scratch scratch(threads * counter.used());
  std::vector<std::optional<Worker<T, S>>> workers(threads);
  parallel_for(tasks, threads, [&](i64 task, int thread) {
    auto& worker = workers[thread];
    if (!worker) {
      char* const memory = static_cast<char*>(scratch.data()) + thread * counter.used();
      fill(memory, counter.used(), char(0));
      Arena arena(memory);
      worker.emplace(plan, p, arena).prepare();
    }
    const i64 end = std::min(tiles, (task + 1) * group);
    for (i64 tile = task * group; tile < end; ++tile) work(*worker, tile);
  });
}

template <class T, class S>
void forward(const DepthwiseConv& p) {
  if (p.num_elements() == 0) return;
  const Plan plan = plan_of<T>(p);
  expect_writes(p.y, p.num_elements() * i64(sizeof(S)));
  each_tile<T, S>(p, plan, [&](Worker<T, S>& worker, i64 tile) { worker.forward(Tile(plan, p, tile)); });
}

template <class T, class S>
void backward(const DepthwiseConv& p) {
  const bool shared = p.dweight != nullptr || p.dbias != nullptr, empty = p.num_elements() == 0;
  const Plan plan = empty ? Plan{} : plan_of<T>(p);
  const i64 size = p.taps() + 1, tiles = p.batch * plan.num_tiles();  // of a channel
  const Scratch scratch(shared ? p.channels * tiles * size * sizeof(T) : 0);
  T* const shares = static_cast<T*>(scratch.data());
  if (!empty) {
    if (p.dx != nullptr) expect_writes(p.dx, p.num_elements() * i64(sizeof(S)));
    each_tile<T, S>(p, plan, [&](Worker<T, S>& worker, i64 tile) {
      worker.backward(Tile(plan, p, tile), shared ? shares + tile * size : nullptr);
    });
  }
  if (!shared) return;
  std::vector<double> sums(size);
  for (i64 channel = 0; channel < p.channels; ++channel) {
    fill(sums.data(), size, 0.0);
    add_in_order(shares + channel * tiles * size, tiles, size, sums.data(), 1);
    if (p.dweight != nullptr) {
      T* const to = static_cast<T*>(p.dweight) + channel * p.taps();
      for (i64 tap = 0; tap < p.taps(); ++tap) to[tap] = T(sums[tap]);
    }
    if (p.dbias != nullptr) static_cast<T*>(p.dbias)[channel] = T(sums[p.taps()]);
  }
}

}  // namespace

void depthwise_conv_forward(const DepthwiseConv& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    forward<typename Storage<S>::Compute, S>(p);
  });
}

void depthwise_conv_backward(const DepthwiseConv& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    backward<typename Storage<S>::Compute, S>(p);
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
