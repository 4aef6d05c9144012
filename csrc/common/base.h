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

// Bytes of an element as it is stored, and in the arithmetic's type.
inline i64 element(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline i64 compute_element(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

}  // namespace factorizer
