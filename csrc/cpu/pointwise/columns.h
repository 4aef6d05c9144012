// The columns of a batch of maps: a voxel's channels. They are numbered through the batch, cut into tiles,
// and copied tile by tile to and from scratch memory, where they are of the arithmetic's type.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/common/cache.h"
#include "cpu/common/parallel.h"
#include "cpu/common/product.h"
#include "cpu/common/storage.h"
#include "problems/pointwise.h"

namespace factorizer {
namespace FK_ISA {

// A tile's scratch: rows of `length` columns, of which the first `count` are columns `begin`.. of the maps
// and the rest padding up to a multiple of the vector width.
struct Tile {
  i64 begin, count, length;
};

class Columns {
 public:
  // Tiles of at most 128 columns, a multiple of four vectors; for columns that stand for `fine` of a finer
  // grid, at most 128 of those. The cut depends on nothing but the sizes.
  template <class T>
  static Columns cut(const Pointwise& p, i64 fine = 1) {
    constexpr i64 unit = 4 * Simd<T>::width, most = 128 / unit;
    const i64 total = p.batch * p.voxels, units = most / fine;
    return {p.voxels, total, unit, Parts::of((total + unit - 1) / unit, units > 0 ? units : 1)};
  }

  // Whether so many that weights are worth packing.
  bool many() const { return total_ >= 512; }
  i64 tiles() const { return total_ > 0 ? units_.count : 0; }
  i64 largest() const { return units_.largest() * unit_; }
  Tile tile(i64 i) const {
    const i64 begin = units_.begin(i) * unit_, length = units_.size(i) * unit_;
    return {begin, length < total_ - begin ? length : total_ - begin, length};
  }

  // Whether so many channels of all columns are better written past the caches.
  bool outgrow_caches(i64 channels, DType dtype) const {
    return outgrows_caches(channels * total_ * element(dtype));
  }

  // Calls f(batch item, voxel, column of the tile, length) for the runs of neighbouring voxels of a tile.
  template <class F>
  void each_run(const Tile& tile, F&& f) const {
    i64 item = tile.begin / voxels_, voxel = tile.begin % voxels_;
    for (i64 column = 0; column < tile.count;) {
      const i64 left = tile.count - column, length = left < voxels_ - voxel ? left : voxels_ - voxel;
      f(item, voxel, column, length);
      column += length;
      voxel = 0;
      ++item;
    }
  }

 private:
  Columns(i64 voxels, i64 total, i64 unit, Parts units)
      : voxels_(voxels), total_(total), unit_(unit), units_(units) {}

  i64 voxels_, total_, unit_;
  Parts units_;
};

template <class S, class T>
inline void convert(const S* __restrict from, T* __restrict to, i64 length) {
  for (i64 i = 0; i < length; ++i) to[i] = T(to_compute(from[i]));
}

template <class S, class T>
inline void convert_back(const T* __restrict from, S* __restrict to, i64 length) {
  for (i64 i = 0; i < length; ++i) to[i] = Storage<S>::from(from[i]);
}

// Past the caches, where the map that the row is of outgrows them.
template <class S, class T>
inline void write_row(const T* from, S* to, i64 length, bool outgrows_caches) {
  i64 i = 0;
  if constexpr (std::is_same_v<S, T>) {
    constexpr i64 width = Simd<T>::width, size = sizeof(T), bytes = width * size;
    const i64 past = i64(reinterpret_cast<std::uintptr_t>(to) % bytes);
    if (outgrows_caches && past % size == 0) {
      for (const i64 first = (bytes - past) % bytes / size; i < length && i < first; ++i) to[i] = from[i];
      for (; i + width <= length; i += width) stream(to + i, load(from + i));
    }
  }
  if (i < length) convert_back(from + i, to + i, length - i);
}

// Before a large fresh map is written, whose voxels lie side by side from its first to its last.
inline void expect_writes(const Pointwise& p, const FeatureMap& map, i64 channels) {
  factorizer::expect_writes(map.data, p.batch * channels * p.voxels * element(map.dtype));
}

// Zero in the padding, so that it adds nothing to sums over columns.
template <class T>
void read(const Columns& columns, const Tile& tile, const FeatureMap& map, i64 channels, Rows<T> to) {
  with_storage_for<T>(map.dtype, [&](auto* storage) {
    const auto* data = static_cast<const std::remove_pointer_t<decltype(storage)>*>(map.data);
    columns.each_run(tile, [&](i64 item, i64 voxel, i64 column, i64 length) {
      const auto* from = data + item * map.batch + voxel;
      for (i64 c = 0; c < channels; ++c) {
        // The next tile's, which lies too far from the rows beside it for the processor to foresee.
        prefetch<2>(from + c * map.channel, tile.length * i64(sizeof(*from)), length * i64(sizeof(*from)));
        convert(from + c * map.channel, to[c] + column, length);
      }
    });
  });
  clear_padding<T>(channels, to, tile.count, tile.length);
}

template <class T>
void write(const Columns& columns, const Tile& tile, Rows<const T> from, i64 channels,
           const FeatureMap& map) {
  const bool outgrows = columns.outgrow_caches(channels, map.dtype);
  with_storage_for<T>(map.dtype, [&](auto* storage) {
    auto* data = static_cast<decltype(storage)>(map.data);
    columns.each_run(tile, [&](i64 item, i64 voxel, i64 column, i64 length) {
      auto* to = data + item * map.batch + voxel;
      for (i64 c = 0; c < channels; ++c) write_row(from[c] + column, to + c * map.channel, length, outgrows);
    });
  });
}

// A tile's rows in the map itself, where they are of the arithmetic's type, whole vectors and of one batch
// item; else none.
template <class T>
Rows<T> in_place(const Columns& columns, const Tile& tile, const FeatureMap& map) {
  Rows<T> rows{nullptr, map.channel};
  if (element(map.dtype) != sizeof(T) || tile.count != tile.length) return rows;
  columns.each_run(tile, [&](i64 item, i64 voxel, i64, i64 length) {
    if (length == tile.length) rows.data = static_cast<T*>(map.data) + item * map.batch + voxel;
  });
  return rows;
}

// A tile's rows as they lie in the map, or copied to `scratch`: many, a power of two apart, would fall into
// few sets of the cache and evict one another.
template <class T>
Rows<const T> take(const Columns& columns, const Tile& tile, const FeatureMap& map, i64 channels,
                   Rows<T> scratch) {
  constexpr i64 few = 8;
  const Rows<T> there = in_place<T>(columns, tile, map);
  if (channels <= few && there.data != nullptr) return there;
  read<T>(columns, tile, map, channels, scratch);
  return scratch;
}

// f(rows) puts a tile together, once: in the map itself where it can and should, else in `scratch`.
template <class T, class F>
void put(const Columns& columns, const Tile& tile, const FeatureMap& map, i64 channels, Rows<T> scratch,
         F&& f) {
  const Rows<T> there = in_place<T>(columns, tile, map);
  if (there.data != nullptr && !columns.outgrow_caches(channels, map.dtype)) return f(there);
  f(scratch);
  write<T>(columns, tile, scratch, channels, map);
}

// Scratch for the tiles that a worker has in hand: some rows, and a number for each column.
template <class T>
class TileMemory {
 public:
  TileMemory(i64 rows, i64 columns, int threads, Arena& arena)
      : stride_(row_stride<T>(columns)), size_((rows + 1) * stride_) {
    memory_ = arena.take<T>(threads * size_);
  }

  // Hands out rows of a worker's, after one another.
  struct Pile {
    T* next;
    i64 stride;
    Rows<T> operator()(i64 rows) {
      const Rows<T> taken{next, stride};
      next += rows * stride;
      return taken;
    }
  };
  Pile of(int worker) const { return {scales(worker) + stride_, stride_}; }
  T* scales(int worker) const { return memory_ + worker * size_; }

 private:
  i64 stride_, size_;
  T* memory_;
};

template <class T>
inline const T* typed(const void* data) {
  return static_cast<const T*>(data);
}
template <class T>
inline T* typed(void* data) {
  return static_cast<T*>(data);
}

// Runs Call<T>(problem, arena).run() in scratch memory of the size that its constructor asks for.
template <template <class> class Call, class Problem>
void run_in_scratch(const Problem& p) {
  const auto run = [&](auto* compute) {
    using T = std::remove_pointer_t<decltype(compute)>;
    Arena counting(nullptr);
    Call<T>(p, counting);
    const Scratch scratch(counting.used());
    Arena arena(scratch.data());
    Call<T>(p, arena).run();
  };
  p.compute == DType::float64 ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
}

}  // namespace FK_ISA
}  // namespace factorizer
