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

// A thread's chunks of a window, as they lie in memory, in registers: for one chunk or few rows.
template <class S, int K>
struct Held {
  Words<chunk, S> at[K][max_rows];

  FK_DEVICE Words<chunk, S> get(int k, int m) const { return at[k][m]; }
  FK_DEVICE void set(int k, int m, const Words<chunk, S>& words) { at[k][m] = words; }
  // Zero where there is no row or no column.
  FK_DEVICE void load(const DeviceWindows& windows, const Window& window, const Map& map, int first = 0) {
    const S* base = static_cast<const S*>(map.data) + DeviceWindows::origin(window, map);
    FK_UNROLL
    for (int k = 0; k < K; ++k) {
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) at[k][m] = {};  // zeros, in every dtype
      if (windows.wide) {
        const u32 n = column_of(windows, first + k, 0);
        if (n >= windows.columns) continue;
        const auto* from = base + windows.offset(window, n, map);
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) {
          if (m < windows.rows) at[k][m] = Words<chunk, S>::read(from);
          from += map.stride[1];
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
          if (m < windows.rows) at[k][m].put(c, from[m * map.stride[1]]);
        }
      }
    }
  }
};

// The same in shared memory, where they leave the registers to more warps: of one warp of each row of a
// block's threads, and of wide windows alone. A lane has its own chunks; another's are there after the warp
// has met.
template <class S, int K, int WARPS>
struct Staged {
  struct alignas(16) Row {
    Words<chunk, S> of_lane[32];
    u32 gap[4];  // the rows of a chunk begin in different banks
  };
  using Rows = Row[K][max_rows];
  Rows& at = place();

  FK_DEVICE static Rows& place() {
    __shared__ Rows of_warp[WARPS];
    return of_warp[threadIdx.y];
  }
  FK_DEVICE Words<chunk, S> get(int k, int m) const { return at[k][m].of_lane[threadIdx.x]; }
  FK_DEVICE void set(int k, int m, const Words<chunk, S>& words) { at[k][m].of_lane[threadIdx.x] = words; }
  FK_DEVICE void load(const DeviceWindows& windows, const Window& window, const Map& map) {
    const S* base = static_cast<const S*>(map.data) + DeviceWindows::origin(window, map);
#pragma unroll 1  // the copies wait for nothing, and all their addresses at once would take the registers
    for (int k = 0; k < K; ++k) {
      const u32 n = column_of(windows, k, 0);
      const bool there = n < windows.columns;
      const auto* from = base + (there ? windows.offset(window, n, map) : 0);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        copy_async(at[k][m].of_lane[threadIdx.x], from, there && m < windows.rows);
        from += map.stride[1];  // past the last row it is not read
      }
    }
    wait_for_copies();
  }
};

template <class Tile>
FK_DEVICE void numbers_of(const Tile& tile, int k, float (&x)[max_rows][chunk]) {
  FK_UNROLL
  for (int m = 0; m < max_rows; ++m) {
    const auto words = tile.get(k, m);
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) x[m][c] = words.number(c);
  }
}

// The numbers of a tile, where the map's dtype is known at the launch alone: a branch around the whole of it.
//
// Everything is read before the first number is converted: a conversion between the reads of two chunks would
// wait for the first, once for each chunk.
template <int K>
FK_DEVICE void load_numbers(const DeviceWindows& windows, const Window& window, const Map& map,
                            float (&x)[K][max_rows][chunk]) {
  with_storage(map.data, map.dtype, [&](auto* data) {
    using S = std::decay_t<decltype(*data)>;
    Held<S, K> words;
    words.load(windows, window, map);
    FK_UNROLL
    for (int k = 0; k < K; ++k) numbers_of(words, k, x[k]);
  });
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
