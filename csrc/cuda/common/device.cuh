// What every device file starts from.
#pragma once

#include <cuda_runtime.h>

#include "common/base.h"

#define FK_DEVICE __device__ __forceinline__

namespace factorizer {
namespace cuda {

using u32 = std::uint32_t;

inline int round_up(i64 count, int multiple) {
  return static_cast<int>((count + multiple - 1) / multiple * multiple);
}

}  // namespace cuda
}  // namespace factorizer
