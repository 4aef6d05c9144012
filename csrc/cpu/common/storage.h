// From a dtype, known when a kernel is called, to code compiled for its storage type.
#pragma once

#include <type_traits>

#include "common/scalar_types.h"

namespace factorizer {
namespace FK_ISA {

// Calls f with a null pointer of the storage type.
template <class F>
inline void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<float16*>(nullptr));
  }
}

// The same where the arithmetic's type is known already.
template <class T, class F>
inline void with_storage_for(DType dtype, F&& f) {
  if constexpr (std::is_same_v<T, double>) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::bfloat16: return f(static_cast<bfloat16*>(nullptr));
      case DType::float16: return f(static_cast<float16*>(nullptr));
      default: return f(static_cast<float*>(nullptr));
    }
  }
}

// Calls f(T{}) for the arithmetic's type.
template <class F>
inline void with_compute(DType dtype, F&& f) {
  dtype == DType::float64 ? f(double{}) : f(float{});
}

}  // namespace FK_ISA
}  // namespace factorizer
