// Where a window's columns lie in a map, and in which window of a copy a voxel lies: index arithmetic alone.
//
// Positions in a window and along an axis fit in 31 bits; whatever a stride multiplies is 64-bit.
#pragma once

#include "cuda/common/device.cuh"
#include "cuda/windows/limits.h"
#include "problems/windows.h"

namespace factorizer {
namespace cuda {

// Division of n < 2^31 by a number known at the launch, by a multiplication (Granlund and Montgomery, 1994):
// with 2^l >= d and m = floor(2^32 (2^l - d) / d) + 1, n / d = (floor(n m / 2^32) + n) >> l.
struct Divider {
  u32 divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(i64 d) : divisor(static_cast<u32>(d)) {
    while ((u32{1} << shift) < divisor) ++shift;
    const std::uint64_t power = std::uint64_t{1} << shift;
    multiplier = static_cast<u32>(((power - divisor) << 32) / divisor + 1);
  }

  FK_INLINE u32 quotient(u32 n) const {
    return (static_cast<u32>((static_cast<std::uint64_t>(n) * multiplier) >> 32) + n) >> shift;
  }
  // n becomes the quotient; returns the remainder.
  FK_INLINE u32 split(u32& n) const {
    const u32 q = quotient(n), remainder = n - q * divisor;
    n = q;
    return remainder;
  }
};

// A map (B, C, S1, S2, S3) in memory; strides in elements.
struct Map {
  void* data;
  i64 stride[5];
  DType dtype;
};

// One window of one copy: its matrix' number, where its channels begin, and its first voxel.
struct Window {
  i64 matrix;
  u32 batch, channel;
  u32 start[3];
};

// problems/windows.h's Windows, as kernels take it: by value, with the divisions prepared.
struct DeviceWindows {
  int rows;
  u32 columns, num_shifts;
  u32 size[3], patch[3], shifts[max_shifts][3];
  Divider by_patch[3], by_grid[3], by_heads, by_num_shifts;
  i64 per_shift;  // windows of one copy, fewer than 2^31
  // Four columns of a chunk lie side by side and on a multiple of their size, in every tensor of the launch.
  bool wide;

  DeviceWindows(const Windows& w, bool is_wide) : wide(is_wide) {
    rows = static_cast<int>(w.head_dim);
    columns = static_cast<u32>(w.columns());
    num_shifts = static_cast<u32>(w.num_shifts);
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = static_cast<u32>(w.size[axis]);
      patch[axis] = static_cast<u32>(w.patch[axis]);
      by_patch[axis] = Divider(w.patch[axis]);
      by_grid[axis] = Divider(w.grid[axis]);
      for (u32 copy = 0; copy < num_shifts; ++copy)
        shifts[copy][axis] = static_cast<u32>(w.shifts[3 * copy + axis]);
    }
    by_heads = Divider(w.heads);
    by_num_shifts = Divider(w.num_shifts);
    per_shift = w.batch * w.heads * w.num_windows();
  }

  // Windows that are `count` of these, neighbours along the last axis; count divides the grid there.
  void join(u32 count) {
    patch[2] *= count;
    columns *= count;
    by_patch[2] = Divider(patch[2]);
    by_grid[2] = Divider(by_grid[2].divisor / count);
    per_shift /= count;
  }

  // The copies of a place run side by side, so that the second finds it in cache.
  FK_INLINE Window window_of_block(u32 block) const {
    const u32 copy = by_num_shifts.split(block);
    return window(copy, block);
  }
  // Window `row` of a block of `together` neighbours; false where there is none.
  FK_INLINE bool window_of_row(u32 block, u32 together, u32 row, Window& to) const {
    const u32 copy = by_num_shifts.split(block), index = block * together + row;
    if (index >= per_shift) return false;
    to = window(copy, index);
    return true;
  }

  // Window `index` of a copy; copy == num_shifts: of the map as it lies, not rolled.
  FK_INLINE Window window(u32 copy, u32 index) const {
    Window w;
    w.matrix = copy * per_shift + index;
    for (int axis = 2; axis >= 0; --axis) {
      const u32 cell = by_grid[axis].split(index) * patch[axis];
      const u32 roll = copy < num_shifts ? shifts[copy][axis] : 0;
      // The map rolled by +shift holds voxel (i - shift) mod size at i.
      w.start[axis] = cell < roll ? cell + size[axis] - roll : cell - roll;
    }
    w.channel = by_heads.split(index) * rows;
    w.batch = index;
    return w;
  }

  // The voxel of column n, along each axis.
  FK_INLINE void voxel(const Window& w, u32 n, u32 (&at)[3]) const {
    for (int axis = 2; axis >= 0; --axis) {
      at[axis] = w.start[axis] + (axis > 0 ? by_patch[axis].split(n) : n);
      const u32 wrapped = at[axis] - size[axis];  // or, where it does not wrap, more than any position
      at[axis] = wrapped < at[axis] ? wrapped : at[axis];
    }
  }

  // Offset of the window's first channel, and of column n from there.
  FK_INLINE static i64 origin(const Window& w, const Map& map) {
    return w.batch * map.stride[0] + w.channel * map.stride[1];
  }
  FK_INLINE i64 offset(const Window& w, u32 n, const Map& map) const {
    u32 at[3];
    voxel(w, n, at);
    return offset(at, map);
  }
  FK_INLINE static i64 offset(const u32 (&at)[3], const Map& map) {
    return at[0] * map.stride[2] + at[1] * map.stride[3] + at[2] * map.stride[4];
  }
};

}  // namespace cuda
}  // namespace factorizer
