// How the maps of a depthwise convolution are cut into tiles, and how a tile lies in its buffer.
#pragma once

#include <algorithm>

#include "cpu/common/cache.h"
#include "cpu/common/simd.h"
#include "problems/depthwise.h"

namespace factorizer {
namespace FK_ISA {

inline i64 parts(i64 whole, i64 part) { return (whole + part - 1) / part; }

// It depends on the problem alone, not on the number of threads: so does the order of sums.
struct Plan {
  bool deep;              // the buffer holds all planes of a tile, and one of them is filtered as one row
  i64 reach[3];           // how far the filter sees on either side
  i64 tile[3], tiles[3];  // voxels of a tile along each axis, and how many tiles there are
  i64 planes;             // that the buffer holds; if not all, it is a ring
  i64 pitch, plane;       // elements from row to row and from plane to plane; the gaps are zero
  i64 lead;               // elements before the first voxel
  i64 length;             // elements of a row that is filtered: a row of the tile, or a plane with its gaps

  i64 num_tiles() const { return tiles[0] * tiles[1] * tiles[2]; }
  bool whole_planes() const { return tiles[1] * tiles[2] == 1; }
};

template <class T>
Plan plan_of(const DepthwiseConv& p) {
  constexpr i64 width = Simd<T>::width;
  constexpr i64 bytes = sizeof(T);
  Plan plan;
  i64* const tile = plan.tile;
  const i64 rows = p.size[1], columns = p.size[2];
  std::copy(p.size, p.size + 3, tile);
  for (int axis = 0; axis < 3; ++axis) plan.reach[axis] = p.kernel[axis] / 2;

  // One gap between two rows serves both.
  const i64 pitch = columns + plan.reach[2];
  const i64 length = round_up<T>((rows - 1) * pitch + columns);
  const i64 plane = (rows + p.kernel[1] - 1) * pitch;
  const i64 held = second_level_bytes / 2 / (bytes * plane) - (p.kernel[0] - 1);
  const i64 by_rows = rows * round_up<T>(columns);
  plan.deep =
      p.kernel[0] > 1 && p.size[0] >= 4 && held >= std::min<i64>(p.size[0], 8) && 8 * length < 7 * by_rows;
  if (plan.deep) {
    if (held < p.size[0]) tile[0] = held / 8 * 8;
    plan.pitch = pitch;
    plan.lead = plan.reach[2];
    plan.length = length;
  } else {
    constexpr i64 longest = 4096;  // columns
    if (columns > longest) tile[2] = longest / 2;
    plan.pitch = round_up<T>(tile[2] + plan.reach[2] * (tile[2] < columns ? 2 : 1));
    plan.lead = round_up<T>(plan.reach[2]);
    plan.length = std::max(tile[2], width);
    const i64 held_rows = second_level_bytes / 2 / (bytes * plan.pitch * p.kernel[0]) - (p.kernel[1] - 1);
    if (held_rows < rows) tile[1] = std::min(rows, std::max<i64>(held_rows / 8 * 8, 8));
  }
  for (int axis = 1; axis < 3; ++axis) plan.tiles[axis] = parts(p.size[axis], tile[axis]);
  // Few maps are cut along their depth too, for many threads to work on them.
  constexpr i64 enough = 32;
  const i64 tasks = p.batch * p.channels * plan.tiles[1] * plan.tiles[2];
  if (tasks < enough) {
    tile[0] = std::min(tile[0], std::max(parts(p.size[0], parts(enough, tasks)), 4 * p.kernel[0]));
  }
  plan.tiles[0] = parts(p.size[0], tile[0]);
  plan.planes = plan.deep ? tile[0] + p.kernel[0] - 1 : p.kernel[0];
  plan.plane = (tile[1] + p.kernel[1] - 1) * plan.pitch;
  return plan;
}

// Voxels [begin, begin + extent) of one map. Tiles are numbered by (channel, sample, place in the map).
struct Tile {
  i64 channel, sample, begin[3], extent[3];

  Tile(const Plan& plan, const DepthwiseConv& p, i64 index) {
    if (plan.num_tiles() == 1) {
      std::fill(begin, begin + 3, 0);
      std::copy(p.size, p.size + 3, extent);
    } else
      for (int axis = 2; axis >= 0; --axis) {
        begin[axis] = index % plan.tiles[axis] * plan.tile[axis];
        extent[axis] = std::min(plan.tile[axis], p.size[axis] - begin[axis]);
        index /= plan.tiles[axis];
      }
    sample = index % p.batch;
    channel = index / p.batch;
  }
};

}  // namespace FK_ISA
}  // namespace factorizer
