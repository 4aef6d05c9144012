// A row list: some rows of equal length, each contiguous.
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

// Elements from one row to the next where the rows are the caller's own to lay out: whole cache lines, an odd
// number of them, since rows at a power of two fall into a few sets of the cache and evict one another.
template <class T>
constexpr i64 row_stride(i64 columns) {
  constexpr i64 line = 64 / i64(sizeof(T));
  return ((columns + line - 1) / line | 1) * line;
}

template <class T>
inline void clear_padding(i64 rows, Rows<T> f, i64 valid, i64 length) {
  for (i64 r = 0; r < rows; ++r) fill(f[r] + valid, length - valid, T(0));
}

}  // namespace FK_ISA
}  // namespace factorizer
