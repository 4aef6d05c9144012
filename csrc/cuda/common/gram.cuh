// Sums over the columns of half types by the tensor cores: products are exact, and added in float32.
#pragma once

#include <type_traits>

#include "cuda/common/storage.cuh"

namespace factorizer {
namespace cuda {

// sums += A B of a warp: A (16 x 16), B (16 x 8). Lane 4 g + t holds, as pairs of neighbours along the 16
// that are summed: of A row g at 2 t and at 2 t + 8 (a[0], a[2]) and row g + 8 there (a[1], a[3]); of B
// column g there; of the sums row g and row g + 8 at columns 2 t and 2 t + 1.
template <class S>
FK_DEVICE void multiply_add(const u32 (&a)[4], const u32 (&b)[2], float (&sums)[4]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<S, bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  // Lane i of a warp brings its pairs; every lane then takes what it needs of row g of A and columns of B.
  const auto number = [](u32 word, int i) {
    return to_compute(S{static_cast<std::uint16_t>(word >> (16 * i))});
  };
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int half = 0; half < 2; ++half) {
    for (int from = 0; from < 4; ++from) {
      const u32 upper = __shfl_sync(0xffffffffu, a[2 * half], 4 * g + from);
      const u32 lower = __shfl_sync(0xffffffffu, a[2 * half + 1], 4 * g + from);
      const u32 left = __shfl_sync(0xffffffffu, b[half], 4 * (2 * t) + from);
      const u32 right = __shfl_sync(0xffffffffu, b[half], 4 * (2 * t + 1) + from);
      for (int i = 0; i < 2; ++i) {
        sums[0] += number(upper, i) * number(left, i);
        sums[1] += number(upper, i) * number(right, i);
        sums[2] += number(lower, i) * number(left, i);
        sums[3] += number(lower, i) * number(right, i);
      }
    }
  }
#endif
}

// Four matrices of 8 x 8 halves: lane 8 i + r names row r of matrix i (16 bytes), lane 4 g + t gets of each
// row g at 2 t and 2 t + 1.
FK_DEVICE void read_matrices(const void* row, u32 (&to)[4]) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
               : "memory");
#else
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const auto from = __shfl_sync(0xffffffffu, reinterpret_cast<std::uint64_t>(row), 8 * i + lane / 4);
    to[i] = reinterpret_cast<const u32*>(from)[lane % 4];
  }
#endif
}

}  // namespace cuda
}  // namespace factorizer
