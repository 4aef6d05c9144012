// What a thread holds of a window: chunks of four columns, all the rows; read from a map and written to one.
//
// A window is a block's. Where the cut is wide, a thread's four columns are neighbours, and one instruction
// moves them; else they are a block's width apart, so that neighbouring threads touch neighbouring voxels.
#pragma once

#include <type_traits>

#include "factor_update.h"
#include "scalar_types.h"
#include "stages.cuh"

namespace factorizer {
namespace cuda {

template <int W, class S>
struct alignas(W * sizeof(S)) Pack {
  S at[W];
};

// How numbers of a map are stored. Both half precisions share their code: which it is, is asked for each
// number.
struct Single {
  FK_DEVICE static float decode(float x) { return x; }
  FK_DEVICE static float encode(float x) { return x; }
};

struct Half {
  bool brain;

  FK_DEVICE float decode(std::uint16_t bits) const {
    return brain ? to_compute(bfloat16{bits}) : to_compute(float16{bits});
  }
  FK_DEVICE std::uint16_t encode(float x) const {
    return brain ? Storage<bfloat16>::from(x).bits : Storage<float16>::from(x).bits;
  }
};

// Calls f with a map's data and their coding.
template <class F>
FK_DEVICE void with_storage(const Map& map, F&& f) {
  if (map.dtype == DType::float32) {
    f(static_cast<float*>(map.data), Single{});
  } else {
    f(static_cast<std::uint16_t*>(map.data), Half{map.dtype == DType::bfloat16});
  }
}

// W neighbours, on a multiple of their size.
template <int W, class S, class Coding = Single>
FK_DEVICE void read(const S* from, float (&to)[W], Coding coding = {}) {
  const Pack<W, S> pack = *reinterpret_cast<const Pack<W, S>*>(from);
  FK_UNROLL
  for (int c = 0; c < W; ++c) to[c] = coding.decode(pack.at[c]);
}

template <int W, class S, class Coding = Single>
FK_DEVICE void write(S* to, const float (&from)[W], Coding coding = {}) {
  Pack<W, S> pack;
  FK_UNROLL
  for (int c = 0; c < W; ++c) pack.at[c] = coding.encode(from[c]);
  *reinterpret_cast<Pack<W, S>*>(to) = pack;
}

// Column c of this thread's chunk k; it exists where it is less than cut.columns.
FK_DEVICE u32 column_of(const Cut& cut, int k, int c) {
  return cut.wide ? chunk * (k * blockDim.x + threadIdx.x) + c : (chunk * k + c) * blockDim.x + threadIdx.x;
}

// x = the chunks first, first + 1, ...; zero where there is no row or no column.
template <int K>
FK_DEVICE void load_tile(const Cut& cut, const Window& window, const Map& map, int first,
                         float (&x)[K][max_rows][chunk]) {
  with_storage(map, [&](auto* data, auto coding) {
    const auto* base = data + Cut::origin(window, map);
    FK_UNROLL
    for (int k = 0; k < K; ++k) {
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        FK_UNROLL
        for (int c = 0; c < chunk; ++c) x[k][m][c] = 0.0f;
      }
      if (cut.wide) {
        const u32 n = column_of(cut, first + k, 0);
        if (n >= cut.columns) continue;
        const auto* from = base + cut.offset(window, n, map);
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) {
          if (m < cut.rows) read(from + m * map.stride[1], x[k][m], coding);
        }
        continue;
      }
      FK_UNROLL
      for (int c = 0; c < chunk; ++c) {
        const u32 n = column_of(cut, first + k, c);
        if (n >= cut.columns) continue;
        const auto* from = base + cut.offset(window, n, map);
        FK_UNROLL
        for (int m = 0; m < max_rows; ++m) {
          if (m < cut.rows) x[k][m][c] = coding.decode(from[m * map.stride[1]]);
        }
      }
    }
  });
}

FK_DEVICE void store_chunk(const Cut& cut, const Window& window, const Map& map, int k,
                           const float (&x)[max_rows][chunk]) {
  with_storage(map, [&](auto* data, auto coding) {
    auto* base = data + Cut::origin(window, map);
    if (cut.wide) {
      const u32 n = column_of(cut, k, 0);
      if (n >= cut.columns) return;
      auto* to = base + cut.offset(window, n, map);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m < cut.rows) write(to + m * map.stride[1], x[m], coding);
      }
      return;
    }
    FK_UNROLL
    for (int c = 0; c < chunk; ++c) {
      const u32 n = column_of(cut, k, c);
      if (n >= cut.columns) continue;
      auto* to = base + cut.offset(window, n, map);
      FK_UNROLL
      for (int m = 0; m < max_rows; ++m) {
        if (m < cut.rows) to[m * map.stride[1]] = coding.encode(x[m][c]);
      }
    }
  });
}

// Chunk k of a row of cut.columns numbers; zero past its end.
FK_DEVICE void load_row(const Cut& cut, const float* row, int k, float (&v)[chunk]) {
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) v[c] = 0.0f;
  if (cut.wide) {
    const u32 n = column_of(cut, k, 0);
    if (n < cut.columns) read(row + n, v);
    return;
  }
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    const u32 n = column_of(cut, k, c);
    if (n < cut.columns) v[c] = row[n];
  }
}

FK_DEVICE void store_row(const Cut& cut, float* row, int k, const float (&v)[chunk]) {
  if (cut.wide) {
    const u32 n = column_of(cut, k, 0);
    if (n < cut.columns) write(row + n, v);
    return;
  }
  FK_UNROLL
  for (int c = 0; c < chunk; ++c) {
    const u32 n = column_of(cut, k, c);
    if (n < cut.columns) row[n] = v[c];
  }
}

// Where the rows of a matrix' factor begin.
FK_DEVICE const float* of_matrix(const Factor& factor, i64 matrix) {
  return static_cast<const float*>(factor.data) + matrix * factor.stride;
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
