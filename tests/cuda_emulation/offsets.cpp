// The kernels' index arithmetic, for the tests to hold against integers that do not overflow.
#include "cuda/windows/windows.cuh"

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

// Which matrix of a copy, and which of its columns, holds column n of window `index` of the map as it lies.
i64 emulation_matrix_at(const i64* numbers, i64 copy, i64 index, i64 n, i64* column) {
  const fk::cuda::DeviceWindows windows = windows_of(numbers);
  const auto window = windows.window(windows.num_shifts, static_cast<fk::cuda::u32>(index));
  fk::cuda::u32 at[3], in_copy = 0;
  windows.voxel(window, static_cast<fk::cuda::u32>(n), at);
  const i64 matrix = windows.matrix_at(window, static_cast<fk::cuda::u32>(copy), at, in_copy);
  *column = in_copy;
  return matrix;
}
}
