// Rows of maps, read into the arithmetic's type and written from it.
#pragma once

#include <type_traits>

#include "common/scalar_types.h"
#include "cpu/common/simd.h"
#include "problems/windows.h"

namespace factorizer {
namespace FK_ISA {

// One channel of one sample: where its first voxel lies, and its strides.
template <class S>
struct Map {
  S* data;
  i64 stride[3];

  S* at(i64 i1, i64 i2, i64 i3) const { return data + i1 * stride[0] + i2 * stride[1] + i3 * stride[2]; }
};

template <class S>
inline Map<const S> map_of(const Volume& v, i64 sample, i64 channel) {
  return {static_cast<const S*>(v.data) + sample * v.stride[0] + channel * v.stride[1],
          {v.stride[2], v.stride[3], v.stride[4]}};
}

// Rows in blocks of N elements, the last of which begins before the end of the one before it; shorter rows in
// smaller blocks.
template <class T, i64 N>
FK_INLINE void copy_rows(Constant<N>, const T* from, i64 from_step, T* to, i64 to_step, i64 rows, i64 count) {
  using Elements = Block<T, N>;
  if (count >= N) {
    for (; rows > 0; --rows, from += from_step, to += to_step) {
      for (i64 i = 0; i < count - N; i += N) Elements::store(to + i, Elements::load(from + i));
      Elements::store(to + count - N, Elements::load(from + count - N));
    }
  } else if constexpr (N > 1) {
    copy_rows(Constant<N / 2>{}, from, from_step, to, to_step, rows, count);
  }
}

template <class S, class T, class Step>
FK_NOINLINE void convert_rows(const S* from, i64 from_step, Step stride, T* to, i64 to_step, i64 rows,
                              i64 count) {
  for (i64 row = 0; row < rows; ++row, from += from_step, to += to_step) {
    transform(count, from, stride, to, [](S value) {
      if constexpr (std::is_same_v<T, decltype(to_compute(value))>) {
        return to_compute(value);
      } else {
        return Storage<T>::from(value);
      }
    });
  }
}

// Elements of a row lie `stride` apart.
template <class S, class T>
inline void read_rows(const S* from, i64 from_step, i64 stride, T* to, i64 to_step, i64 rows, i64 count) {
  if (stride != 1) return convert_rows(from, from_step, stride, to, to_step, rows, count);
  if constexpr (std::is_same_v<S, T>) {
    copy_rows(Constant<Simd<T>::width>{}, from, from_step, to, to_step, rows, count);
  } else {
    convert_rows(from, from_step, Constant<1>{}, to, to_step, rows, count);
  }
}

template <class T, class S>
inline void write_rows(const T* from, i64 from_step, S* to, i64 to_step, i64 rows, i64 count) {
  if constexpr (std::is_same_v<S, T>) {
    copy_rows(Constant<Simd<T>::width>{}, from, from_step, to, to_step, rows, count);
  } else {
    convert_rows(from, from_step, Constant<1>{}, to, to_step, rows, count);
  }
}

// Lane by lane.
template <class T>
inline Vec<T> sum_rows(const T* from, i64 step, i64 rows, i64 count) {
  const i64 whole = count / Simd<T>::width * Simd<T>::width;
  Vec<T> total = {};
  for (; rows > 0; --rows, from += step) {
    Vec<T> row = {};
    for (i64 n = 0; n < whole; n += Simd<T>::width) row += load(from + n);
    for (i64 n = whole; n < count; ++n) row[n - whole] += from[n];
    total += row;
  }
  return total;
}

}  // namespace FK_ISA
}  // namespace factorizer
