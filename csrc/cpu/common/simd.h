// SIMD vectors of the width that this translation unit is compiled for (GCC and Clang vector types).
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/base.h"

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

// A vector that stays in a register: GCC would load it again for each multiply-add that uses it.
template <class T>
FK_INLINE Vec<T> load_once(const T* p) {
  Vec<T> v = load(p);
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// The processor's own operation of a name, where it is one instruction and the vector types have none for it.
#if !defined(__x86_64__) && !defined(_M_X64)
#elif defined(__AVX512F__)
#define FK_X86(name) _mm512_##name
#elif defined(__AVX__)
#define FK_X86(name) _mm256_##name
#else
#define FK_X86(name) _mm_##name
#endif

// a where it is smaller, or larger, and otherwise b: also where one of them is NaN.
template <class T>
FK_INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
#if !defined(FK_X86)
  return a < b ? a : b;
#else
  if constexpr (sizeof(T) == 4) {
    return FK_X86(min_ps)(a, b);
  } else {
    return FK_X86(min_pd)(a, b);
  }
#endif
}

template <class T>
FK_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if !defined(FK_X86)
  return a > b ? a : b;
#else
  if constexpr (sizeof(T) == 4) {
    return FK_X86(max_ps)(a, b);
  } else {
    return FK_X86(max_pd)(a, b);
  }
#endif
}

// |v|, by its bits.
template <class T>
FK_INLINE Vec<T> magnitude(Vec<T> v) {
  using Lane = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
  typedef Lane Lanes __attribute__((vector_size(FK_VECTOR_BYTES)));
  return (Vec<T>)((Lanes)v & std::numeric_limits<Lane>::max());
}

#if defined(__AVX512F__)
// The nearest whole number.
template <class T>
FK_INLINE Vec<T> round_to_whole(Vec<T> v) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
}

// v times 2^power, for a power that is a whole number.
template <class T>
FK_INLINE Vec<T> scale_by_power_of_two(Vec<T> v, Vec<T> power) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_scalef_ps(v, power);
  } else {
    return _mm512_scalef_pd(v, power);
  }
}
#endif

// Past the caches, for results that they could not hold: the memory is not read before it is written. `p` is
// aligned to the vector. parallel_for() lets nothing that follows it overtake such a store.
template <class T>
FK_INLINE void stream(T* p, Vec<T> v) {
#if !defined(FK_X86)
  store(p, v);
#else
  if constexpr (sizeof(T) == 4) {
    FK_X86(stream_ps)(p, v);
  } else {
    FK_X86(stream_pd)(p, v);
  }
#endif
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

// Calls f with n as a constant where it is small, so that its loops unroll.
template <class F>
inline void with_small(i64 n, F&& f) {
  switch (n) {
    case 1: return f(Constant<1>{});
    case 2: return f(Constant<2>{});
    case 3: return f(Constant<3>{});
    case 4: return f(Constant<4>{});
    case 5: return f(Constant<5>{});
    case 6: return f(Constant<6>{});
    case 7: return f(Constant<7>{});
    case 8: return f(Constant<8>{});
    default: return f(n);
  }
}

// Calls f with the length of a run of voxels, as a constant where it is common.
template <class F>
inline void with_length(i64 length, F&& f) {
  switch (length) {
    case 4: return f(Constant<4>{});
    case 8: return f(Constant<8>{});
    case 16: return f(Constant<16>{});
    default: return f(length);
  }
}

// Some elements side by side; the compiler makes of them the vectors that there are.
template <class T, i64 N>
struct Block {
  typedef T Elements __attribute__((vector_size(N * sizeof(T))));

  FK_INLINE static Elements load(const T* p) {
    Elements e;
    __builtin_memcpy(&e, p, sizeof(e));
    return e;
  }
  FK_INLINE static Elements fill(T value) { return Elements{} + value; }
  FK_INLINE static void store(T* p, Elements e) { __builtin_memcpy(p, &e, sizeof(e)); }
};

// Calls f(Block<T, n>{}, i) for blocks of n elements from element i on that make up the length.
template <class T, i64 N, class F>
inline void each_block(Constant<N>, F&& f) {
  f(Block<T, N>{}, i64{0});
}

template <class T, class F>
inline void each_block(i64 length, F&& f) {
  constexpr i64 width = Simd<T>::width;
  i64 i = 0;
  for (; i + width <= length; i += width) f(Block<T, width>{}, i);
  for (; i < length; ++i) f(Block<T, 1>{}, i);
}

// to = op(from), element by element. A function of its own for `__restrict`: without it, loops of constant
// length are unrolled into scalar code.
template <class Length, class S, class Step, class T, class Op>
inline void transform(Length length, const S* __restrict from, Step step, T* __restrict to, Op op) {
  const i64 count = length;
#pragma GCC unroll 1
  for (i64 i = 0; i < count; ++i) to[i] = op(from[i * step]);
}

}  // namespace FK_ISA
}  // namespace factorizer
