// What a thread holds of a window: chunks of four columns, all the rows; read from a map and written to one.
//
// A window is a row's of a block's threads, most often all of them. Where the windows are wide, a thread's
// four columns are neighbours, and one instruction moves them; else they are a block's width apart, so that
// neighbouring threads touch neighbouring voxels.
#pragma once

#include <type_traits>

#include "cuda/common/storage.cuh"
#include "cuda/windows/windows.cuh"
#include "math/factor_update.h"

namespace factorizer {
namespace cuda {

constexpr int chunk = 4;  // columns that a thread moves together

// Column c of this thread's chunk k; it exists where it is less than windows.columns.
FK_DEVICE u32 column_of(const DeviceWindows& windows, int k, int c) {
  return windows.wide ? chunk * (k * blockDim.x + threadIdx.x) + c
                      : (chunk * k + c) * blockDim.x + threadIdx.x;
}

// x = the chunks first, first + 1, ...; zero where there is no row or no column.
//
// Everything is read before the first number is converted: a conversion between the reads of two chunks would
// wait for the first, once for each chunk.
template <class S, int K>
FK_DEVICE void load_tile(const DeviceWindows& windows, const Window& window, const Map& map, int first,
                         float (&x)[K][max_rows][chunk]) {
  const S* base = static_cast<const S*>(map.data) + DeviceWindows::origin(window, map);
  using Chunk = Words<chunk, S>;
  Chunk words[K][max_rows] = {};  // zeros, in every dtype
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    if (windows.wide) {
      const u32 n = column_of(windows, first + k, 0);
      if (n >= windows.columns) continue;
      const auto* from = base + windows.offset(window, n, map);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m < windows.rows) words[k][m] = Chunk::read(from + m * map.stride[1]);
      }
      continue;
    }
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      const u32 n = column_of(windows, first + k, c);
      if (n >= windows.columns) continue;
      const auto* from = base + windows.offset(window, n, map);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m < windows.rows) words[k][m].put(c, from[m * map.stride[1]]);
      }
    }
  }
  FK_UNROLL
  for (int k = 0; k < K; ++k) {
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) x[k][m][c] = words[k][m].number(c);
    }
  }
}

// Where the map's dtype is known at the launch alone: a branch around the whole of it.
template <int K>
FK_DEVICE void load_tile(const DeviceWindows& windows, const Window& window, const Map& map, int first,
                         float (&x)[K][max_rows][chunk]) {
  with_storage(map.data, map.dtype,
               [&](auto* data) { load_tile<std::decay_t<decltype(*data)>>(windows, window, map, first, x); });
}

template <class S>
FK_DEVICE void store_chunk(const DeviceWindows& windows, const Window& window, const Map& map, int k,
                           const float (&x)[max_rows][chunk]) {
  S* base = static_cast<S*>(map.data) + DeviceWindows::origin(window, map);
  if (windows.wide) {
    const u32 n = column_of(windows, k, 0);
    if (n >= windows.columns) return;
    auto* to = base + windows.offset(window, n, map);
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      if (m < windows.rows) write(to + m * map.stride[1], x[m]);
    }
    return;
  }
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    const u32 n = column_of(windows, k, c);
    if (n >= windows.columns) continue;
    auto* to = base + windows.offset(window, n, map);
    FK_UNROLL
    for (int m = 0; m < max_rows; ++m) {
      if (m < windows.rows) to[m * map.stride[1]] = Storage<S>::from(x[m][c]);
    }
  }
}

FK_DEVICE void store_chunk(const DeviceWindows& windows, const Window& window, const Map& map, int k,
                           const float (&x)[max_rows][chunk]) {
  with_storage(map.data, map.dtype,
               [&](auto* data) { store_chunk<std::decay_t<decltype(*data)>>(windows, window, map, k, x); });
}

// Chunk k of a row of windows.columns numbers; zero past its end.
FK_DEVICE void load_row(const DeviceWindows& windows, const float* row, int k, float (&v)[chunk]) {
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) v[c] = 0.0f;
  if (windows.wide) {
    const u32 n = column_of(windows, k, 0);
    if (n < windows.columns) read(row + n, v);
    return;
  }
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    const u32 n = column_of(windows, k, c);
    if (n < windows.columns) v[c] = row[n];
  }
}

FK_DEVICE void store_row(const DeviceWindows& windows, float* row, int k, const float (&v)[chunk]) {
  if (windows.wide) {
    const u32 n = column_of(windows, k, 0);
    if (n < windows.columns) write(row + n, v);
    return;
  }
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    const u32 n = column_of(windows, k, c);
    if (n < windows.columns) row[n] = v[c];
  }
}

template <int W>
FK_DEVICE void relu_rows(float (&x)[max_rows][W]) {
  FK_UNROLL
  for (int m = 0; m < max_rows; ++m) {
    FK_UNROLL
    for (int c = 0; c < W; ++c) x[m][c] = relu(x[m][c]);
  }
}

// The adjoint of relu, which keeps x where it is positive (or NaN).
template <int W>
FK_DEVICE void mask_rows(const float (&x)[max_rows][W], float (&dx)[max_rows][W]) {
  FK_UNROLL
  for (int m = 0; m < max_rows; ++m) {
    FK_UNROLL
    for (int c = 0; c < W; ++c) dx[m][c] = x[m][c] <= 0.0f ? 0.0f : dx[m][c];
  }
}

}  // namespace cuda
}  // namespace factorizer
