// Layer normalisation of a tile's columns, and its adjoint; scale and shift are left to what follows.
#pragma once

#include <cmath>

#include "cpu/common/rows.h"

namespace factorizer {
namespace FK_ISA {

template <class T>
FK_INLINE Vec<T> square_root(Vec<T> v) {
  T lanes[Simd<T>::width];
  store(lanes, v);
  for (T& lane : lanes) lane = std::sqrt(lane);
  return load(lanes);
}

// V vectors of columns at a time, so that their sums do not wait for one another.
template <int V, class T>
FK_INLINE void standardise_columns(i64 channels, T eps, Rows<const T> x, Rows<T> y, T* scales, i64 n) {
  constexpr i64 width = Simd<T>::width;
  const T share = T(1) / T(channels);
  Vec<T> means[V] = {}, squares[V] = {};
  for (i64 c = 0; c < channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) means[v] += load(x[c] + n + v * width);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) means[v] *= share;
  for (i64 c = 0; c < channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> centred = load(x[c] + n + v * width) - means[v];
      squares[v] += centred * centred;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    squares[v] = T(1) / square_root<T>(squares[v] * share + eps);
    store(scales + n + v * width, squares[v]);
  }
  for (i64 c = 0; c < channels; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const i64 at = n + v * width;
      store(y[c] + at, (load(x[c] + at) - means[v]) * squares[v]);
    }
  }
}

// y = x's columns with zero mean and unit variance; y may be x. scales[n]: by what column n was multiplied.
// The length is a multiple of two vectors.
template <class T>
void standardise(i64 channels, double eps, Rows<const T> x, Rows<T> y, i64 length, T* scales) {
  constexpr i64 width = Simd<T>::width;
  i64 n = 0;
  for (; n + 4 * width <= length; n += 4 * width) standardise_columns<4>(channels, T(eps), x, y, scales, n);
  for (; n < length; n += 2 * width) standardise_columns<2>(channels, T(eps), x, y, scales, n);
}

// out (+)= the gradient with respect to what was standardised to y, where dy is the one with respect to y.
template <class T>
void standardise_backward(i64 channels, Rows<const T> dy, Rows<const T> y, const T* scales, i64 length,
                          Rows<T> out, bool accumulate) {
  constexpr i64 width = Simd<T>::width;
  constexpr int V = 2;
  const T share = T(1) / T(channels);
  for (i64 n = 0; n < length; n += V * width) {
    Vec<T> means[V] = {}, products[V] = {}, scale[V];
    for (i64 c = 0; c < channels; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const Vec<T> g = load(dy[c] + n + v * width);
        means[v] += g;
        products[v] += g * load(y[c] + n + v * width);
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      means[v] *= share;
      products[v] *= share;
      scale[v] = load(scales + n + v * width);
    }
    for (i64 c = 0; c < channels; ++c) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const i64 at = n + v * width;
        const Vec<T> g = (load(dy[c] + at) - means[v] - load(y[c] + at) * products[v]) * scale[v];
        store(out[c] + at, accumulate ? load(out[c] + at) + g : g);
      }
    }
  }
}

// y += x.
template <class T>
void add_to(i64 rows, Rows<const T> x, Rows<T> y, i64 length) {
  for (i64 r = 0; r < rows; ++r) {
    for (i64 n = 0; n < length; n += Simd<T>::width) store(y[r] + n, load(y[r] + n) + load(x[r] + n));
  }
}

// y = scale x + shift, with a number of each for every row; y may be x.
template <class T>
void scale_and_shift(i64 channels, const T* scale, const T* shift, Rows<const T> x, Rows<T> y, i64 length) {
  for (i64 c = 0; c < channels; ++c) {
    for (i64 n = 0; n < length; n += Simd<T>::width)
      store(y[c] + n, load(x[c] + n) * scale[c] + (shift == nullptr ? T(0) : shift[c]));
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
