// The kernels' index arithmetic, for the tests to hold against integers that do not overflow.
#include "cuda/windows/boxes.cuh"

namespace fk = factorizer;
using fk::i64;

namespace {

// numbers: batch, heads, head_dim, size (3), patch (3), the number of shifts, and the shifts (3 each).
fk::cuda::DeviceWindows windows_of(const i64* numbers) {
  fk::Windows w{};
  w.batch = numbers[0];
  w.heads = numbers[1];
  w.head_dim = numbers[2];
  for (int axis = 0; axis < 3; ++axis) {
    w.size[axis] = numbers[3 + axis];
    w.patch[axis] = numbers[6 + axis];
    w.grid[axis] = w.size[axis] / w.patch[axis];
  }
  w.num_shifts = numbers[9];
  w.shifts = numbers + 10;
  return fk::cuda::DeviceWindows(w, false);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

std::uint32_t emulation_quotient(std::uint32_t n, i64 divisor) {
  return fk::cuda::Divider(divisor).quotient(n);
}

// Of element (m, n) of window `index` of a copy, in a map of these five strides; returns the matrix' number.
i64 emulation_offset(const i64* numbers, i64 copy, i64 index, i64 m, i64 n, const i64* strides, i64* offset) {
  const fk::cuda::DeviceWindows windows = windows_of(numbers);
  fk::cuda::Map map{};
  for (int axis = 0; axis < 5; ++axis) map.stride[axis] = strides[axis];
  const auto window = windows.window(static_cast<fk::cuda::u32>(copy), static_cast<fk::cuda::u32>(index));
  *offset = windows.origin(window, map) + windows.offset(window, static_cast<fk::cuda::u32>(n), map) +
            m * map.stride[1];
  return window.matrix;
}

// Which matrix of a copy, and which of its columns, holds column n of box `index` of the map as it lies; a
// box is as many windows as go into `bytes`, of one byte each voxel, and joined says how many.
i64 emulation_matrix_at(const i64* numbers, i64 bytes, i64 copy, i64 index, i64 n, i64* column, i64* joined) {
  const fk::cuda::Boxes boxes(windows_of(numbers), 1, bytes);
  const auto box = boxes.cut.window(boxes.windows.num_shifts, static_cast<fk::cuda::u32>(index));
  fk::cuda::u32 rest = static_cast<fk::cuda::u32>(n), at[3], begin[3], cell[3], in_copy = 0;
  for (int axis = 2; axis >= 0; --axis) at[axis] = axis > 0 ? boxes.cut.by_patch[axis].split(rest) : rest;
  boxes.place(box, static_cast<fk::cuda::u32>(copy), begin, cell);
  const fk::cuda::u32 number = boxes.number(static_cast<fk::cuda::u32>(copy), begin, at, in_copy);
  *column = in_copy;
  *joined = boxes.cut.columns / boxes.windows.columns;
  return boxes.matrix(box, number);
}
}
