// The exact GELU, x Φ(x), and its derivative, Φ(x) + x φ(x), in vector types.
//
// Both come from the tail Φ(-a) and the density φ(a) of the normal distribution, a = |x|.
//   float: log2 Φ(-a) is almost a parabola, and φ(a) / Φ(-a) almost a straight line: a polynomial each.
//   double: Φ(-a) = exp(-a²/2) R(a), where R (Mills' ratio over √2π) is a polynomial in 1 / (1 + a/5).
// The coefficients are fits of our own: float's minimise the largest error in Φ, double's interpolate at
// Chebyshev's nodes with 40 digits. Absolute error against exact arithmetic, anywhere: in Φ and in gelu(x)
// 1.5e-7 and 2e-16, and where x > 1 the rounding of gelu(x) itself; in the derivative 3e-7 and 1e-15.
// Past `largest` the tail is that of `largest`. NaN stays NaN.
#pragma once

#include <cstdint>

#include "cpu/common/rows.h"

namespace factorizer {
namespace FK_ISA {

// Some vectors in lockstep: each step of a long chain of operations is done for all of them, so that none
// waits for the one before. With one after another the processor's window holds too few chains.
template <class T>
struct Lockstep {
  static constexpr int count = 4;
  Vec<T> at[count];

  // f(i) for each vector.
  template <class F>
  static FK_INLINE Lockstep of(F&& f) {
    Lockstep result;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) result.at[i] = f(i);
    return result;
  }
};

// c[0] x^(N-1) + .. + c[N-1].
template <class T, int N>
FK_INLINE Lockstep<T> polynomial(const T (&c)[N], const Lockstep<T>& x) {
  Lockstep<T> sum = Lockstep<T>::of([&](int i) { return x.at[i] * c[0] + c[1]; });
#pragma GCC unroll 32
  for (int k = 2; k < N; ++k) sum = Lockstep<T>::of([&](int i) { return sum.at[i] * x.at[i] + c[k]; });
  return sum;
}

// 2^y for y <= 0 that is not too far from there. Adding `magic` rounds y to a whole number, which is then in
// the lowest bits of the sum; AVX-512 has an instruction to round, and one to scale by such a power.
template <class T, class Bits, int Mantissa, int N>
FK_INLINE Lockstep<T> power_of_two(const T (&c)[N], const Lockstep<T>& y) {
  using L = Lockstep<T>;
#if defined(__AVX512F__)
  const L rounded = L::of([&](int i) { return round_to_whole<T>(y.at[i]); });
  const L power = polynomial<T>(c, L::of([&](int i) { return y.at[i] - rounded.at[i]; }));
  return L::of([&](int i) { return scale_by_power_of_two<T>(power.at[i], rounded.at[i]); });
#else
  typedef Bits Lanes __attribute__((vector_size(FK_VECTOR_BYTES)));
  constexpr T magic = T(3) * T(Bits(1) << (Mantissa - 1));
  constexpr Bits one = Bits(sizeof(T) == 4 ? 127 : 1023) << Mantissa;
  const L rounded = L::of([&](int i) { return y.at[i] + magic; });
  const L power = polynomial<T>(c, L::of([&](int i) { return y.at[i] - (rounded.at[i] - magic); }));
  return L::of([&](int i) { return power.at[i] * (Vec<T>)(((Lanes)rounded.at[i] << Mantissa) + one); });
#endif
}

template <class T>
struct Normal;

template <>
struct Normal<float> {
  using L = Lockstep<float>;
  static constexpr float largest = 6.0f;

  static FK_INLINE L tail(const L& a) {
    constexpr float power[] = {1.32764099e-3f, 9.67554084e-3f, 5.55071347e-2f,
                               2.40221197e-1f, 6.93146967e-1f, 1.00000007f};
    constexpr float log2_tail[] = {4.36609686e-6f,  -1.52799541e-5f, -5.58379980e-4f, 7.61984401e-3f,
                                   -5.28796276e-2f, -4.59084285e-1f, -1.15111972f,    -9.99999728e-1f};
    return power_of_two<float, std::int32_t, 23>(power, polynomial<float>(log2_tail, a));
  }
  static FK_INLINE L density(const L& a, const L& tail) {
    constexpr float ratio[] = {1.52073053e-5f,  -1.87877765e-4f, 7.70832212e-4f, 4.61580901e-4f,
                               -1.95493024e-2f, 1.09134507e-1f,  6.36605739e-1f, 7.97884801e-1f};
    const L over_tail = polynomial<float>(ratio, a);
    return L::of([&](int i) { return over_tail.at[i] * tail.at[i]; });
  }
};

template <>
struct Normal<double> {
  using L = Lockstep<double>;
  static constexpr double largest = 9.0;

  static FK_INLINE L exponential(const L& a) {
    constexpr double half_log2e = 0.72134752044448170368;
    constexpr double power[] = {2.5733568308756891235e-11,
                                4.4566753410492058782e-10,
                                7.0548943863483480445e-9,
                                1.017805119296064896e-7,
                                1.3215486815999976975e-6,
                                1.5252733856293466416e-5,
                                1.5403530393362755291e-4,
                                1.3333558146390352775e-3,
                                9.6181291076284830543e-3,
                                5.5504108664821698992e-2,
                                2.4022650695910071228e-1,
                                6.9314718055994530835e-1,
                                1.0};
    return power_of_two<double, std::int64_t, 52>(
        power, L::of([&](int i) { return a.at[i] * a.at[i] * -half_log2e; }));
  }
  static FK_INLINE L tail(const L& a) {
    constexpr double ratio[] = {
        2.1842618338544808742e-11, 3.2642403272328936025e-10, -7.0199016256416660303e-10,
        -8.2659890744024623396e-9, 1.3892350454507114962e-8,  2.0272211423013403123e-7,
        -6.3645228111275567293e-8, -5.3441922321291712235e-6, -1.4821982906862439627e-5,
        9.4700634983066675984e-5,  1.0596635464970833916e-3,  5.4075657963251182742e-3,
        1.8921225999126555176e-2,  5.0132702054778046294e-2,  1.0435487521953343599e-1,
        1.7247078648816356714e-1,  1.4757850208620838711e-1};
    // 1 / (1 + a/5), from [5/14, 1] to [-1, 1].
    const L u = L::of([&](int i) { return (28.0 / 9.0) / (1.0 + 0.2 * a.at[i]) - 19.0 / 9.0; });
    const L r = polynomial<double>(ratio, u), e = exponential(a);
    return L::of([&](int i) { return r.at[i] * e.at[i]; });
  }
  static FK_INLINE L density(const L& a, const L&) {
    const L e = exponential(a);
    return L::of([&](int i) { return e.at[i] * 0.39894228040143267794; });
  }
};

// |x|, but no more than there is to tell the tail of.
template <class T>
FK_INLINE Lockstep<T> tail_argument(const Lockstep<T>& x) {
  const Vec<T> limit = Vec<T>{} + Normal<T>::largest;
  return Lockstep<T>::of([&](int i) { return smaller<T>(limit, magnitude<T>(x.at[i])); });
}

// x Φ(x) = max(x, 0) - a Φ(-a).
template <class T>
FK_INLINE Lockstep<T> gelu(const Lockstep<T>& x, const Lockstep<T>& a, const Lockstep<T>& tail) {
  return Lockstep<T>::of([&](int i) { return larger<T>(Vec<T>{}, x.at[i]) - a.at[i] * tail.at[i]; });
}

template <class T>
FK_INLINE Lockstep<T> gelu_derivative(const Lockstep<T>& x, const Lockstep<T>& a, const Lockstep<T>& tail) {
  const Lockstep<T> density = Normal<T>::density(a, tail);
  return Lockstep<T>::of([&](int i) {
    const Vec<T> below = tail.at[i] - a.at[i] * density.at[i];
    return x.at[i] < T(0) ? below : T(1) - below;
  });
}

// x becomes gelu(x). The length is a multiple of four vectors.
template <class T>
void gelu(i64 rows, Rows<T> x, i64 length) {
  using L = Lockstep<T>;
  constexpr i64 width = Simd<T>::width;
  for (i64 r = 0; r < rows; ++r) {
    for (T* row = x[r]; row < x[r] + length; row += L::count * width) {
      const L v = L::of([&](int i) { return load(row + i * width); });
      const L a = tail_argument(v), y = gelu(v, a, Normal<T>::tail(a));
#pragma GCC unroll 8
      for (int i = 0; i < L::count; ++i) store(row + i * width, y.at[i]);
    }
  }
}

// x becomes gelu(x), and d, the gradient with respect to that, the one with respect to x.
template <class T>
void gelu_backward(i64 rows, Rows<T> x, Rows<T> d, i64 length) {
  using L = Lockstep<T>;
  constexpr i64 width = Simd<T>::width;
  for (i64 r = 0; r < rows; ++r) {
    for (i64 n = 0; n < length; n += L::count * width) {
      T *row = x[r] + n, *gradients = d[r] + n;
      const L v = L::of([&](int i) { return load(row + i * width); });
      const L a = tail_argument(v), tail = Normal<T>::tail(a);
      const L y = gelu(v, a, tail), derivative = gelu_derivative(v, a, tail);
#pragma GCC unroll 8
      for (int i = 0; i < L::count; ++i) {
        store(row + i * width, y.at[i]);
        store(gradients + i * width, load(gradients + i * width) * derivative.at[i]);
      }
    }
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
