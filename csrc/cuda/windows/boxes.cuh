// A box: a few neighbouring windows of the map as it lies, along its last axis, so that what is read and
// written of a row are whole lines of memory. And the windows of the copies that meet it.
#pragma once

#include "cuda/windows/windows.cuh"

namespace factorizer {
namespace cuda {

constexpr u32 max_joined = 8;  // windows of a box
constexpr u32 max_met = 128;   // windows that meet a box, of all the copies
static_assert(max_shifts * 2 * 2 * 2 <= max_met, "a box of one window is met by no more");

// The windows of a copy that meet a box are numbered along each axis from that of the box' first voxel.
struct Boxes {
  DeviceWindows windows, cut;  // the map cut into windows, and into boxes
  u32 met[3];                  // windows of a copy that can meet a box, along each axis
  Divider by_met;              // by met[2]

  // Boxes as wide as `bytes` are, at most, where the grid allows. bytes_of: of a voxel.
  Boxes(const DeviceWindows& of, i64 bytes_of, i64 bytes) : windows(of), cut(of), met{2, 2, 2} {
    u32 joined = max_joined;
    while (joined > 1 && !fits(joined, bytes_of, bytes)) joined /= 2;
    met[2] = joined + 1;
    by_met = Divider(met[2]);
    cut.join(joined);
  }

  FK_INLINE u32 num_met() const { return windows.num_shifts * met[0] * met[1] * met[2]; }

  // Where a box begins in the first window of a copy that meets it; that window's cell in the grid.
  FK_INLINE void place(const Window& box, u32 copy, u32 (&begin)[3], u32 (&cell)[3]) const {
    for (int axis = 0; axis < 3; ++axis) {
      u32 q = box.start[axis] + windows.shifts[copy][axis];
      if (q >= windows.size[axis]) q -= windows.size[axis];
      begin[axis] = windows.by_patch[axis].split(q);
      cell[axis] = q;
    }
  }

  // The matrix of window `number` of those that can meet a box; -1 where it does not meet it.
  FK_INLINE int matrix(const Window& box, u32 number) const {
    const u32 last = by_met.split(number);
    const u32 step[3] = {number / 2 % 2, number % 2, last}, copy = number / 4;
    u32 begin[3], cell[3], index = windows.by_heads.divisor * box.batch + box.channel / windows.rows;
    place(box, copy, begin, cell);
    for (int axis = 0; axis < 3; ++axis) {
      if (step[axis] * windows.patch[axis] >= begin[axis] + cut.patch[axis]) return -1;
      const u32 grid = windows.by_grid[axis].divisor;
      cell[axis] += step[axis];
      index = index * grid + (cell[axis] < grid ? cell[axis] : cell[axis] - grid);
    }
    return static_cast<int>(copy * static_cast<u32>(windows.per_shift) + index);
  }

  // The number of the window of a copy that holds voxel `at` of a box, and the voxel's column there.
  FK_INLINE u32 number(u32 copy, const u32 (&begin)[3], const u32 (&at)[3], u32& column) const {
    u32 number = copy;
    column = 0;
    for (int axis = 0; axis < 3; ++axis) {
      u32 q = begin[axis] + at[axis];
      const u32 place = windows.by_patch[axis].split(q);
      number = number * met[axis] + q;
      column = column * windows.patch[axis] + place;
    }
    return number;
  }

 private:
  bool fits(u32 joined, i64 bytes_of, i64 bytes) const {
    return windows.by_grid[2].divisor % joined == 0 && joined * windows.patch[2] * bytes_of <= bytes &&
           windows.num_shifts * 4 * (joined + 1) <= max_met;
  }
};

}  // namespace cuda
}  // namespace factorizer
