// How numbers lie in memory, and how some neighbours are moved by one instruction.
#pragma once

#include "common/scalar_types.h"
#include "cuda/common/device.cuh"

namespace factorizer {
namespace cuda {

template <int W, class S>
struct alignas(W * sizeof(S)) Pack {
  S at[W];
};

// How numbers of a map are stored. Both half precisions share their code: which it is, is asked for each
// number.
struct Single {
  FK_DEVICE static float decode(float x) { return x; }
  FK_DEVICE static float encode(float x) { return x; }
};

struct Half {
  bool brain;

  FK_DEVICE float decode(std::uint16_t bits) const {
    return brain ? to_compute(bfloat16{bits}) : to_compute(float16{bits});
  }
  FK_DEVICE std::uint16_t encode(float x) const {
    return brain ? Storage<bfloat16>::from(x).bits : Storage<float16>::from(x).bits;
  }
};

// Calls f with the data of a map of this dtype, and their coding.
template <class F>
FK_DEVICE void with_storage(void* data, DType dtype, F&& f) {
  if (dtype == DType::float32) {
    f(static_cast<float*>(data), Single{});
  } else {
    f(static_cast<std::uint16_t*>(data), Half{dtype == DType::bfloat16});
  }
}

// W neighbours, on a multiple of their size.
template <int W, class S, class Coding = Single>
FK_DEVICE void read(const S* from, float (&to)[W], Coding coding = {}) {
  const Pack<W, S> pack = *reinterpret_cast<const Pack<W, S>*>(from);
  FK_UNROLL
  for (int c = 0; c < W; ++c) to[c] = coding.decode(pack.at[c]);
}

template <int W, class S, class Coding = Single>
FK_DEVICE void write(S* to, const float (&from)[W], Coding coding = {}) {
  Pack<W, S> pack;
  FK_UNROLL
  for (int c = 0; c < W; ++c) pack.at[c] = coding.encode(from[c]);
  *reinterpret_cast<Pack<W, S>*>(to) = pack;
}

}  // namespace cuda
}  // namespace factorizer
