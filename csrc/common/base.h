// What every native file starts from: the integer of all sizes, the storage types, and how functions are
// inlined.
#pragma once

#include <cstdint>

// Always inline: the CPU kernels are compiled once per instruction set, and a shared out-of-line copy of a
// header's function would be of one of them.
#ifdef __CUDACC__
#define FK_INLINE __host__ __device__ __forceinline__
#define FK_UNROLL _Pragma("unroll")  // so that arrays become registers
#else
#define FK_INLINE inline __attribute__((always_inline))
#define FK_NOINLINE __attribute__((noinline))
#define FK_UNROLL
#endif

namespace factorizer {

using i64 = std::int64_t;

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// What is left of `index` by `size`, both not negative; index becomes the quotient. Many processors take
// longer to divide 64 bits than 32 (a Cascade Lake 42 cycles and 26), and a window is little work beside a
// division.
FK_INLINE i64 split(i64& index, i64 size) {
  const auto divide = [&](auto a, auto b) {
    index = i64(a / b);
    return i64(a % b);
  };
  if ((index | size) >> 32 == 0) return divide(std::uint32_t(index), std::uint32_t(size));
  return divide(index, size);
}

// Bytes of an element as it is stored, and in the arithmetic's type.
inline i64 element(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline i64 compute_element(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

}  // namespace factorizer
