// The two inner loops of a depthwise convolution, on rows that lie a fixed step apart.
//
// A row is a row of a map, or a whole plane of it. Of the filter's axes one runs across the rows: a vector of
// one row, once loaded, serves K rows of the result. The taps along the other axes are a list of offsets.
#pragma once

#include <cstdint>

#include "cpu/common/simd.h"

namespace factorizer {
namespace FK_ISA {

// A filter: for each of the offsets K weights across the rows, K being 1, 3, 5 or 7.
template <class T>
struct Taps {
  const i64* offsets;
  i64 count;
  const T* weights;  // count x K
  T bias;
};

// Rows as many and as long as those that are filtered, which will be wanted soon: they are asked for a few
// lines at a time, because memory has nothing to do while the filter computes. They need not exist.
class Ahead {
 public:
  template <class S>
  Ahead(const S* first, i64 step)
      : first_(reinterpret_cast<std::uintptr_t>(first)), step_(step * i64(sizeof(S))), element_(sizeof(S)) {}

  // The part of `rows` of them that a block of elements from n on stands for.
  void fetch(i64 rows, i64 n, i64 block) const {
    const i64 blocks = block * element_ < line ? line / (block * element_) : 1;  // in a line
    for (i64 row = n / block % blocks; row < rows; row += blocks) {
      __builtin_prefetch(reinterpret_cast<const void*>(first_ + std::uintptr_t(row * step_ + n * element_)));
    }
  }

 private:
  static constexpr i64 line = 64;
  std::uintptr_t first_;
  i64 step_, element_;  // in bytes
};

struct AheadList {
  const Ahead* data = nullptr;
  int count = 0;
};

// Vectors of sums that are in registers at once: enough to hide the latency of multiply-adds.
constexpr int chains = 8;

// Loops over registers must be unrolled, or there are none.
template <class T, int K, int R, int V>
FK_INLINE void filter_block(const T* in, i64 step, const Taps<T>& taps, T* out, i64 out_step) {
  constexpr i64 width = Simd<T>::width;
  Vec<T> sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = taps.bias - Vec<T>{};
  }
  const T* weights = taps.weights;
  for (i64 j = 0; j < taps.count; ++j, weights += K) {
    Vec<T> w[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) w[k] = weights[k] - Vec<T>{};
    const T* row = in + taps.offsets[j];
#pragma GCC unroll 16
    for (int i = 0; i < R + K - 1; ++i, row += step) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<T> x = load_once(row + v * width);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          if (0 <= i - k && i - k < R) sums[i - k][v] += w[k] * x;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(out + r * out_step + v * width, sums[r][v]);
  }
}

// Blocks of V vectors; the last one begins before the end of the one before it where the length asks for it.
template <class T, int K, int R, int V>
void filter_rows(const T* in, i64 step, const Taps<T>& taps, T* out, i64 out_step, i64 length,
                 AheadList ahead) {
  constexpr i64 block = V * Simd<T>::width;
  if (V > 1 && length < block) return filter_rows<T, K, R, 1>(in, step, taps, out, out_step, length, ahead);
  for (i64 n = 0; n < length; n += block) {
    for (int i = 0; i < ahead.count; ++i) ahead.data[i].fetch(R, n, block);
    const i64 at = n + block <= length ? n : length - block;
    filter_block<T, K, R, V>(in + at, step, taps, out + at, out_step);
  }
}

template <class T>
using Filter = void (*)(i64 rows, const T* in, i64 step, const Taps<T>& taps, T* out, i64 out_step,
                        i64 length, AheadList ahead);

// out[r][n] = bias + the sum over taps j and k of weights[j][k] in[r + k][n + offsets[j]], for r < rows, 8, 4
// or 1 of them, and n < length, one vector at least.
template <class T, int K>
void filter(i64 rows, const T* in, i64 step, const Taps<T>& taps, T* out, i64 out_step, i64 length,
            AheadList ahead) {
  switch (rows) {
    case 8: return filter_rows<T, K, 8, chains / 8>(in, step, taps, out, out_step, length, ahead);
    case 4: return filter_rows<T, K, 4, chains / 4>(in, step, taps, out, out_step, length, ahead);
    default: return filter_rows<T, K, 1, chains>(in, step, taps, out, out_step, length, ahead);
  }
}

// Calls f(row, rows) for blocks of 8, 4 or 1 rows that make up all of them. Where it is cheaper, the last
// block begins before the end of the one before it.
template <class F>
inline void each_row_block(i64 rows, F&& f) {
  i64 row = 0;
  for (; row + 8 <= rows; row += 8) f(row, i64{8});
  if (row == rows) return;
  if (row + 4 == rows) return f(row, i64{4});
  if (rows >= 8) return f(rows - 8, i64{8});
  if (rows >= 4) {
    f(i64{0}, i64{4});
    return f(rows - 4, i64{4});
  }
  for (; row < rows; ++row) f(row, i64{1});
}

template <class T, int K, int D, int R>
FK_INLINE void correlate_block(const T* x, i64 x_step, const T* dy, i64 step, const i64* offsets, i64 length,
                               Vec<T> (&sums)[D][K]) {
  for (i64 n = 0; n < length; n += Simd<T>::width) {
    Vec<T> xs[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) xs[r] = load_once(x + r * x_step + n);
    const T* row = dy + n;
#pragma GCC unroll 16
    for (int i = 0; i < R + K - 1; ++i, row += step) {
#pragma GCC unroll 8
      for (int d = 0; d < D; ++d) {
        const Vec<T> value = load_once(row + offsets[d]);
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          if (0 <= i - k && i - k < R) sums[d][k] += xs[i - k] * value;
        }
      }
    }
  }
}

template <class T, int K, int D>
void correlate_taps(i64 rows, const T* x, i64 x_step, const T* dy, i64 step, const i64* offsets, i64 length,
                    T* totals) {
  constexpr int R = 4;
  Vec<T> sums[D][K];
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sums[d][k] = Vec<T>{};
  }
  for (; rows >= R; rows -= R, x += R * x_step, dy += R * step) {
    correlate_block<T, K, D, R>(x, x_step, dy, step, offsets, length, sums);
  }
  for (; rows > 0; --rows, x += x_step, dy += step) {
    correlate_block<T, K, D, 1>(x, x_step, dy, step, offsets, length, sums);
  }
#pragma GCC unroll 8
  for (int d = 0; d < D; ++d) {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k, totals += Simd<T>::width) store(totals, load(totals) + sums[d][k]);
  }
}

template <class T>
using Correlate = void (*)(i64 rows, const T* x, i64 x_step, const T* dy, i64 step, const i64* offsets,
                           i64 count, i64 length, T* totals);

// totals[j][k] += the sum over r < rows and n < length of x[r][n] dy[r + k][n + offsets[j]], lane by lane: a
// total is a vector; length is a multiple of its width. The sums of one call are added up before they join
// the totals.
template <class T, int K>
void correlate(i64 rows, const T* x, i64 x_step, const T* dy, i64 step, const i64* offsets, i64 count,
               i64 length, T* totals) {
  constexpr int D = K <= 3 ? 3 : K == 5 ? 2 : 1;  // offsets whose sums are in registers at once
  i64 j = 0;
  for (; j + D <= count; j += D) {
    correlate_taps<T, K, D>(rows, x, x_step, dy, step, offsets + j, length, totals + j * K * Simd<T>::width);
  }
  for (; j < count; ++j) {
    correlate_taps<T, K, 1>(rows, x, x_step, dy, step, offsets + j, length, totals + j * K * Simd<T>::width);
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
