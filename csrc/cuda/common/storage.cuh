// How numbers lie in memory, and how some neighbours are moved by one instruction.
#pragma once

#include <type_traits>

#include "common/scalar_types.h"
#include "cuda/common/device.cuh"
#include "math/factor_update.h"

namespace factorizer {
namespace cuda {

template <int W, class S>
struct alignas(W * sizeof(S)) Pack {
  S at[W];
};

using Quad = Pack<4, float>;

// Calls f with a number of this dtype, on the host, so that a kernel is made for each.
template <class F>
void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::float32) {
    f(float{});
  } else if (dtype == DType::bfloat16) {
    f(bfloat16{});
  } else {
    f(float16{});
  }
}

// Calls f with the data of a map, as numbers of its dtype: inside, every load and conversion is that dtype's
// own.
template <class F>
FK_DEVICE void with_storage(void* data, DType dtype, F&& f) {
  if (dtype == DType::float32) {
    f(static_cast<float*>(data));
  } else if (dtype == DType::bfloat16) {
    f(static_cast<bfloat16*>(data));
  } else {
    f(static_cast<float16*>(data));
  }
}

// relu of the numbers of a word; NaN passes, -0 becomes 0.
template <class S>
FK_DEVICE u32 relu_word(u32 word) {
  if constexpr (std::is_same_v<S, float>) {
#ifdef __CUDA_ARCH__
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+r"(word));
    return word;
#else
    return bit_cast<u32>(relu(bit_cast<float>(word)));
#endif
  } else {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<S, bfloat16>) {
      asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(word) : "r"(0u));
    } else {
      asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(word) : "r"(0u));
    }
    return word;
#else
    const float low = to_compute(S{static_cast<std::uint16_t>(word)});
    const float high = to_compute(S{static_cast<std::uint16_t>(word >> 16)});
    return Storage<S>::from(relu(low)).bits | u32{Storage<S>::from(relu(high)).bits} << 16;
#endif
  }
}

// W neighbours as they lie in memory, in words: taken as numbers of 16 bits they would be split where they
// are read, and each read waited for there.
template <int W, class S>
struct alignas(W * sizeof(S)) Words {
  static constexpr int in_word = 4 / sizeof(S);
  u32 at[W / in_word];

  FK_DEVICE static Words read(const S* from) { return *reinterpret_cast<const Words*>(from); }
  FK_DEVICE float number(int c) const {
    if constexpr (in_word == 1) {
      return bit_cast<float>(at[c]);
    } else {
      return to_compute(S{static_cast<std::uint16_t>(at[c / 2] >> (c % 2 * 16))});
    }
  }
  FK_DEVICE void relu() {
    FK_UNROLL
    for (u32& word : at) word = relu_word<S>(word);
  }
  // Of words that are zero.
  FK_DEVICE void put(int c, S number) {
    if constexpr (in_word == 1) {
      at[c] = bit_cast<u32>(number);
    } else {
      at[c / 2] |= u32{number.bits} << (c % 2 * 16);
    }
  }
};

// Shared memory takes words from global memory by itself; zeros where `there` is false, and nothing is read.
template <int W, class S>
FK_DEVICE void copy_async(Words<W, S>& to, const S* from, bool there) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(&to))),
      "l"(from), "n"(sizeof(to)), "r"(there ? static_cast<u32>(sizeof(to)) : 0u)
      : "memory");
#else
  to = there ? Words<W, S>::read(from) : Words<W, S>{};
#endif
}

// This thread's copies are there.
FK_DEVICE void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// W neighbours, on a multiple of their size.
template <int W, class S>
FK_DEVICE void read(const S* from, float (&to)[W]) {
  const Pack<W, S> pack = *reinterpret_cast<const Pack<W, S>*>(from);
  FK_UNROLL
  for (int c = 0; c < W; ++c) to[c] = to_compute(pack.at[c]);
}

template <int W, class S>
FK_DEVICE void write(S* to, const float (&from)[W]) {
  Pack<W, S> pack;
  FK_UNROLL
  for (int c = 0; c < W; ++c) pack.at[c] = Storage<S>::from(from[c]);
  *reinterpret_cast<Pack<W, S>*>(to) = pack;
}

}  // namespace cuda
}  // namespace factorizer
