// Tiles of coarse voxels, and the fine voxels of their blocks: line by line along the last axis, of which a
// block has scale[0] x scale[1].
#pragma once

#include "cpu/pointwise/columns.h"

namespace factorizer {
namespace FK_ISA {

// The fine lines (k0, k1) of a tile's blocks, as a tile of scale[2] times as many columns.
template <class T>
class Lines {
 public:
  Lines(const Blocks& p, const Columns& columns) : p_(p), columns_(columns) {}

  i64 count() const { return p_.scale[0] * p_.scale[1]; }

  // Zero in the padding.
  void read(const Tile& tile, i64 line, const FeatureMap& map, i64 channels, Rows<T> to) const {
    with_storage_for<T>(map.dtype, [&](auto* storage) {
      const auto* data = static_cast<const std::remove_pointer_t<decltype(storage)>*>(map.data);
      const i64 ahead = to_next_line(line);
      each_run(tile, line, map, [&](i64 offset, i64 column, i64 length) {
        for (i64 c = 0; c < channels; ++c) {
          const auto* from = data + offset + c * map.channel;
          prefetch<2>(from, ahead * i64(sizeof(*from)), length * i64(sizeof(*from)));
          convert(from, to[c] + column, length);
        }
      });
    });
    clear_padding<T>(channels, to, tile.count * p_.scale[2], tile.length * p_.scale[2]);
  }

  void write(const Tile& tile, i64 line, Rows<const T> from, i64 channels, const FeatureMap& map) const {
    const bool outgrows = columns_.outgrow_caches(channels * p_.block(), map.dtype);
    with_storage_for<T>(map.dtype, [&](auto* storage) {
      auto* data = static_cast<decltype(storage)>(map.data);
      each_run(tile, line, map, [&](i64 offset, i64 column, i64 length) {
        for (i64 c = 0; c < channels; ++c)
          write_row(from[c] + column, data + offset + c * map.channel, length, outgrows);
      });
    });
  }

  // Between a line's columns and the blocks' rows (channel, k0, k1, k2), a row for each place in a block.
  void gather(const Tile& tile, i64 line, Rows<const T> fine, i64 channels, Rows<T> blocks) const {
    for (i64 c = 0; c < channels; ++c) {
      T* rows = blocks[c * p_.block() + line * p_.scale[2]];
      each_scale([&](auto scale) { take(fine[c], tile.length, rows, blocks.stride, scale); });
    }
  }
  void scatter(const Tile& tile, i64 line, Rows<const T> blocks, i64 channels, Rows<T> fine) const {
    for (i64 c = 0; c < channels; ++c) {
      const T* rows = blocks[c * p_.block() + line * p_.scale[2]];
      each_scale([&](auto scale) { put(rows, blocks.stride, tile.length, fine[c], scale); });
    }
  }

 private:
  // Elements from a line to the one that is read after it; the first of the next tile is left to the
  // processor.
  i64 to_next_line(i64 line) const {
    const i64 row = p_.size[2] * p_.scale[2], plane = p_.size[1] * p_.scale[1] * row;
    return (line + 1) % p_.scale[1] > 0 ? row : plane - (p_.scale[1] - 1) * row;
  }

  // Calls f(offset in the map, column, length) for every run of fine voxels that lie side by side.
  template <class F>
  void each_run(const Tile& tile, i64 line, const FeatureMap& map, F&& f) const {
    const i64 k0 = line / p_.scale[1], k1 = line % p_.scale[1];
    columns_.each_run(tile, [&](i64 item, i64 voxel, i64 column, i64 length) {
      while (length > 0) {
        const i64 i2 = voxel % p_.size[2], i1 = voxel / p_.size[2] % p_.size[1];
        const i64 i0 = voxel / (p_.size[2] * p_.size[1]);
        const i64 left = p_.size[2] - i2, run = length < left ? length : left;
        const i64 fine = ((i0 * p_.scale[0] + k0) * p_.size[1] * p_.scale[1] + i1 * p_.scale[1] + k1) *
                             p_.size[2] * p_.scale[2] +
                         i2 * p_.scale[2];
        f(item * map.batch + fine, column * p_.scale[2], run * p_.scale[2]);
        voxel += run, column += run, length -= run;
      }
    });
  }

  template <class F>
  void each_scale(F&& f) const {
    p_.scale[2] == 2 ? f(Constant<2>{}) : f(p_.scale[2]);
  }
  template <class Scale>
  static void take(const T* __restrict from, i64 count, T* __restrict to, i64 stride, Scale scale) {
    const i64 places = scale;
    for (i64 k = 0; k < places; ++k) {
      for (i64 i = 0; i < count; ++i) to[k * stride + i] = from[i * places + k];
    }
  }
  template <class Scale>
  static void put(const T* __restrict from, i64 stride, i64 count, T* __restrict to, Scale scale) {
    const i64 places = scale;
    for (i64 i = 0; i < count; ++i) {
      for (i64 k = 0; k < places; ++k) to[i * places + k] = from[k * stride + i];
    }
  }

  const Blocks& p_;
  const Columns& columns_;
};

}  // namespace FK_ISA
}  // namespace factorizer
