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

// W neighbours, on a multiple of their size.
template <int W, class S>
FK_DEVICE Pack<W, S> pack_at(const S* from) {
  return *reinterpret_cast<const Pack<W, S>*>(from);
}

template <int W, class S>
FK_DEVICE void read(const S* from, float (&to)[W]) {
  const Pack<W, S> pack = pack_at<W>(from);
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
