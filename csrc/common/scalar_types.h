// The storage types and their conversion to the arithmetic's type, branch-free so that loops vectorise.
#pragma once

#include "common/base.h"

namespace factorizer {

template <class To, class From>
FK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct bfloat16 {
  std::uint16_t bits;
};

struct float16 {
  std::uint16_t bits;
};

FK_INLINE float to_compute(float x) { return x; }
FK_INLINE double to_compute(double x) { return x; }
FK_INLINE float to_compute(bfloat16 x) { return bit_cast<float>(std::uint32_t{x.bits} << 16); }

FK_INLINE float to_compute(float16 x) {
#ifdef __CUDA_ARCH__  // one instruction, as twice below
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fffu) << 13;
  // Scaling by 2^112 re-biases the exponent and normalises subnormals.
  const float finite = bit_cast<float>(magnitude) * bit_cast<float>(std::uint32_t{(127 + 112) << 23});
  const std::uint32_t bits =
      (x.bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : bit_cast<std::uint32_t>(finite);
  return bit_cast<float>(bits | sign);
#endif
}

template <class S>
struct Storage;

template <>
struct Storage<float> {
  using Compute = float;
  FK_INLINE static float from(float x) { return x; }
};

template <>
struct Storage<double> {
  using Compute = double;
  FK_INLINE static double from(double x) { return x; }
};

template <>
struct Storage<bfloat16> {
  using Compute = float;
  FK_INLINE static bfloat16 from(float x) {
#ifdef __CUDA_ARCH__
    bfloat16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
#else
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {std::uint16_t(nan ? 0x7fc0u : rounded)};
#endif
  }
};

template <>
struct Storage<float16> {
  using Compute = float;
  FK_INLINE static float16 from(float x) {
#ifdef __CUDA_ARCH__
    float16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
#else
    const std::uint32_t bits = bit_cast<std::uint32_t>(x);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    // Below 2^-14 the result is subnormal: adding 0.5 aligns the binary point, and the addition rounds.
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;   // NaN
    return {std::uint16_t(half | sign)};
#endif
  }
};

}  // namespace factorizer
