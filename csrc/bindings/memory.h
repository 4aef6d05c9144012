// What a call may touch. Every address comes with the bytes that are there, and no kernel starts unless they
// hold the elements that it will touch: a wrong caller gets an exception. Sizes are checked here, by no
// kernel.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/base.h"
#include "problems/windows.h"

namespace factorizer {
namespace bindings {

namespace py = pybind11;

using Address = std::uintptr_t;

// Sums and products of nonnegative numbers; one too large to be represented is the largest there is.
inline i64 sum(i64 a, i64 b) {
  i64 result;
  return __builtin_add_overflow(a, b, &result) ? std::numeric_limits<i64>::max() : result;
}
inline i64 product(std::initializer_list<i64> factors) {
  i64 result = 1;
  for (i64 factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) return std::numeric_limits<i64>::max();
  }
  return result;
}

// Bounds what the kernels count themselves: sums of a few such numbers, times the bytes of one, fit in an
// i64.
constexpr i64 limit = i64{1} << 54;
constexpr int max_threads = 1 << 16;

// The address of contiguous or strided elements, and the bytes from there to the end of the memory. A null
// address stands for an argument that is not given.
struct Memory {
  Address address = 0;
  i64 bytes = 0;

  bool given() const { return address != 0; }
  void* holding(const char* name, i64 elements, i64 element) const {
    const i64 needed = product({elements, element});
    if (needed > bytes || (needed > 0 && !given())) {
      throw std::invalid_argument(std::string(name) + " needs " + std::to_string(needed) + " bytes, got " +
                                  (given() ? std::to_string(bytes) : "a null address"));
    }
    return reinterpret_cast<void*>(address);
  }
};
using MemoryArgs = std::pair<Address, i64>;
inline Memory memory(const MemoryArgs& args) { return {args.first, args.second}; }

inline DType dtype(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype must be 0, 1, 2 or 3");
  return static_cast<DType>(code);
}

inline i64 element(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline i64 compute_element(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// A map (B, C, S1, S2, S3) of any strides.
struct VolumeArgs {
  Memory memory;
  std::array<i64, 5> stride;
};

using Extent = std::array<i64, 5>;

inline Volume volume(const char* name, const VolumeArgs& args, const Extent& extent, i64 element) {
  Volume v;
  i64 last = 0;  // the farthest element
  bool empty = false;
  for (int axis = 0; axis < 5; ++axis) {
    empty = empty || extent[axis] == 0;
    if (extent[axis] <= 1) continue;  // its stride, which may be anything, stays 0
    v.stride[axis] = args.stride[axis];
    if (v.stride[axis] < 0) throw std::invalid_argument(std::string(name) + " must have no negative stride");
    last = sum(last, product({extent[axis] - 1, v.stride[axis]}));
  }
  v.data = args.memory.holding(name, empty ? 0 : sum(last, 1), element);
  return v;
}

}  // namespace bindings
}  // namespace factorizer
