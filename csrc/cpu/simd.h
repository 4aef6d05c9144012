// SIMD vectors of the width that this translation unit is compiled for (GCC and Clang vector types).
#pragma once

#include "problem.h"

#if defined(__AVX512F__)
#define FK_VECTOR_BYTES 64
#elif defined(__AVX__)
#define FK_VECTOR_BYTES 32
#else
#define FK_VECTOR_BYTES 16
#endif

namespace factorizer {
namespace FK_ISA {

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(FK_VECTOR_BYTES)));
  static constexpr i64 width = FK_VECTOR_BYTES / sizeof(T);
};

template <class T>
using Vec = typename Simd<T>::Vector;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// Pairwise, so that the error grows with the logarithm of the width.
template <class T>
inline T sum(Vec<T> v) {
  T lanes[Simd<T>::width];
  store(lanes, v);
  for (i64 half = Simd<T>::width / 2; half > 0; half /= 2) {
    for (i64 i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

template <class T>
constexpr i64 round_up(i64 n) {
  return (n + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;
}

// A length known at compile time, for code that takes one known only at run time as well.
template <i64 N>
struct Constant {
  constexpr operator i64() const { return N; }
};

}  // namespace FK_ISA
}  // namespace factorizer
