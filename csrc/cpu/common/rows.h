// Small dense algebra on row lists, the two contractions that NMF is made of.
//
// A row list is some rows of equal length, each contiguous. Lengths given to these functions are multiples
// of the vector width; the caller keeps the elements past the true length at zero.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/simd.h"

namespace factorizer {
namespace FK_ISA {

template <class T>
struct Rows {
  T* data;
  i64 stride;

  T* operator[](i64 row) const { return data + row * stride; }
  operator Rows<const T>() const { return {data, stride}; }
};

// Where the next row of some padded columns may begin.
template <class T>
i64 row_stride(i64 columns) {
  // One line more than needed: rows at multiples of 4 KiB would evict one another.
  return round_up<T>(columns) + 64 / i64(sizeof(T));
}

template <class T>
inline void clear_padding(i64 rows, Rows<T> f, i64 valid, i64 length) {
  for (i64 r = 0; r < rows; ++r) fill(f[r] + valid, length - valid, T(0));
}

// Output rows whose sums are held in registers, of two vectors each: every broadcast serves both.
constexpr i64 row_block = 4;

template <int P, int V, class T>
inline void combine_block(const T* w, i64 w_row, i64 w_column, i64 q, Rows<const T> in, Rows<T> out,
                          i64 begin, i64 end, bool accumulate) {
  constexpr i64 width = Simd<T>::width;
  for (i64 n = begin; n < end; n += V * width) {
    Vec<T> sums[P][V];
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < V; ++v) sums[p][v] = accumulate ? load(out[p] + n + v * width) : Vec<T>{};
    }
    for (i64 k = 0; k < q; ++k) {
      Vec<T> x[V];
      for (int v = 0; v < V; ++v) x[v] = load(in[k] + n + v * width);
      for (int p = 0; p < P; ++p) {
        const T coefficient = w[p * w_row + k * w_column];
        for (int v = 0; v < V; ++v) sums[p][v] += coefficient * x[v];
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int v = 0; v < V; ++v) store(out[p] + n + v * width, sums[p][v]);
    }
  }
}

template <int P, class T>
void combine_rows(const T* w, i64 w_row, i64 w_column, i64 q, Rows<const T> in, Rows<T> out, i64 length,
                  bool accumulate) {
  // More columns at a time while the sums fit in registers: each coefficient is broadcast once for them.
  constexpr int V = P <= 2 ? 4 : 2;
  const i64 whole = length / (V * Simd<T>::width) * (V * Simd<T>::width);
  combine_block<P, V>(w, w_row, w_column, q, in, out, 0, whole, accumulate);
  combine_block<P, 1>(w, w_row, w_column, q, in, out, whole, length, accumulate);
}

// out_p (+)= sum_k w[p, k] in_k for p < rows, k < q: W X with w = (rows x q), or Wᵀ F with its strides
// swapped.
template <class T>
void combine(i64 rows, const T* w, i64 w_row, i64 w_column, i64 q, Rows<const T> in, Rows<T> out, i64 length,
             bool accumulate = false) {
  while (rows > 0) {
    const i64 block = rows < row_block ? rows : row_block;
    switch (block) {
      case 1: combine_rows<1>(w, w_row, w_column, q, in, out, length, accumulate); break;
      case 2: combine_rows<2>(w, w_row, w_column, q, in, out, length, accumulate); break;
      case 3: combine_rows<3>(w, w_row, w_column, q, in, out, length, accumulate); break;
      default: combine_rows<4>(w, w_row, w_column, q, in, out, length, accumulate); break;
    }
    rows -= block;
    w += block * w_row;
    out.data += block * out.stride;
  }
}

template <int P, int Q, class T>
inline void correlate_block(Rows<const T> f, Rows<const T> x, i64 length, T* out, i64 out_row) {
  Vec<T> sums[P][Q] = {};
  for (i64 n = 0; n < length; n += Simd<T>::width) {
    Vec<T> fs[P];
    for (int p = 0; p < P; ++p) fs[p] = load(f[p] + n);
    for (int q = 0; q < Q; ++q) {
      const Vec<T> xs = load(x[q] + n);
      for (int p = 0; p < P; ++p) sums[p][q] += fs[p] * xs;
    }
  }
  for (int p = 0; p < P; ++p) {
    for (int q = 0; q < Q; ++q) out[p * out_row + q] = sum<T>(sums[p][q]);
  }
}

template <int P, class T>
void correlate_rows(Rows<const T> f, i64 q, Rows<const T> x, i64 length, T* out, i64 out_row) {
  constexpr int Q = P <= 2 ? 4 : 2;
  i64 m = 0;
  for (; m + Q <= q; m += Q) correlate_block<P, Q>(f, {x[m], x.stride}, length, out + m, out_row);
  for (; m < q; ++m) correlate_block<P, 1>(f, {x[m], x.stride}, length, out + m, out_row);
}

// out[p, q] = sum_n f_p[n] x_q[n] for p < rows, q < columns.
template <class T>
void correlate(i64 rows, Rows<const T> f, i64 columns, Rows<const T> x, i64 length, T* out, i64 out_row) {
  while (rows > 0) {
    const i64 block = rows < row_block ? rows : row_block;
    switch (block) {
      case 1: correlate_rows<1>(f, columns, x, length, out, out_row); break;
      case 2: correlate_rows<2>(f, columns, x, length, out, out_row); break;
      case 3: correlate_rows<3>(f, columns, x, length, out, out_row); break;
      default: correlate_rows<4>(f, columns, x, length, out, out_row); break;
    }
    rows -= block;
    f.data += block * f.stride;
    out += block * out_row;
  }
}

// out[p, q] = sum_n x_p[n] x_q[n], rows x rows.
template <class T>
void gram(i64 rows, Rows<const T> x, i64 length, T* out) {
  for (i64 p = 0; p < rows; p += row_block) {
    const i64 block = rows - p < row_block ? rows - p : row_block;
    correlate<T>(block, {x[p], x.stride}, rows - p, {x[p], x.stride}, length, out + p * rows + p, rows);
    for (i64 i = p; i < p + block; ++i) {
      for (i64 j = p + block; j < rows; ++j) out[j * rows + i] = out[i * rows + j];
    }
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
