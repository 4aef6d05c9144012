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
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

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

[[noreturn]] inline void refuse(const char* name, const char* needs, i64 got) {
  throw std::invalid_argument(std::string(name) + " must be " + needs + ", got " + std::to_string(got));
}

inline void check_threads(int threads) {
  if (threads < 1 || threads > max_threads) refuse("threads", "1 to 65536", threads);
}

// The address of contiguous or strided elements, and the bytes from there to the end of the memory.
struct Memory {
  Address address;
  i64 bytes;

  void* holding(const char* name, i64 elements, i64 element) const {
    const i64 needed = product({elements, element});
    if (needed > bytes || (needed > 0 && address == 0)) {
      throw std::invalid_argument(std::string(name) + " needs " + std::to_string(needed) + " bytes, got " +
                                  (address != 0 ? std::to_string(bytes) : "a null address"));
    }
    return reinterpret_cast<void*>(address);
  }
};

// As Python gives it: (address, bytes), or None for what is not wanted.
using MemoryArgs = std::pair<Address, i64>;
using OptionalMemory = std::optional<MemoryArgs>;
inline Memory memory(const MemoryArgs& args) { return {args.first, args.second}; }

struct DTypeName {
  const char* name;
  DType dtype;
};
constexpr DTypeName dtype_names[] = {{"float32", DType::float32},
                                     {"float64", DType::float64},
                                     {"bfloat16", DType::bfloat16},
                                     {"float16", DType::float16}};

inline DType dtype(int code) {
  for (const DTypeName& known : dtype_names) {
    if (static_cast<int>(known.dtype) == code) return known.dtype;
  }
  refuse("dtype", "one of DTYPES", code);
}

// A map (B, C, S1..Sp), p = 1 to 3, of any strides: (address, bytes, strides).
using VolumeArgs = std::tuple<Address, i64, std::vector<i64>>;

// With three spatial axes; missing ones come first, of size 1.
using Extent = std::array<i64, 5>;

inline Volume volume(const char* name, const VolumeArgs& args, const Extent& extent, i64 element) {
  const auto& [address, bytes, strides] = args;
  if (strides.size() < 3 || strides.size() > 5)
    refuse(name, "a map with 3 to 5 strides", static_cast<i64>(strides.size()));
  const int missing = 5 - static_cast<int>(strides.size());
  Volume v;
  i64 last = 0;  // the farthest element
  bool empty = false;
  for (int axis = 0; axis < 5; ++axis) {
    empty = empty || extent[axis] == 0;
    if (extent[axis] <= 1) continue;  // its stride, which may be anything, stays 0
    if (axis >= 2 && axis < 2 + missing) refuse(name, "a map with a stride for every axis", strides.size());
    const i64 stride = strides[axis < 2 ? axis : axis - missing];
    if (stride < 0) throw std::invalid_argument(std::string(name) + " must have no negative stride");
    v.stride[axis] = stride;
    last = sum(last, product({extent[axis] - 1, stride}));
  }
  v.data = Memory{address, bytes}.holding(name, empty ? 0 : sum(last, 1), element);
  return v;
}

}  // namespace bindings
}  // namespace factorizer
