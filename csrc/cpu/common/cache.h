// The caches that work is cut to fit (of the smaller processors in use, since a piece too small costs less
// than one too large), and a hint to them.
#pragma once

#include "common/base.h"

namespace factorizer {
namespace FK_ISA {

constexpr i64 first_level_bytes = 32 << 10;    // of data, one core's
constexpr i64 second_level_bytes = 256 << 10;  // one core's
constexpr i64 last_level_bytes = 8 << 20;      // shared by the cores

// Of the second level, for the tiles of products. No processor with AVX-512 has less than 512 KiB; windows
// and filters gain nothing by it.
#if defined(__AVX512F__)
constexpr i64 product_bytes = 2 * second_level_bytes;
#else
constexpr i64 product_bytes = second_level_bytes;
#endif

// Whether a result is better written past the caches: it would evict what they hold, and itself.
constexpr bool outgrows_caches(i64 bytes) { return bytes > last_level_bytes; }

// A hint, of an address that need not exist. Level: of the cache that it is for.
template <int Level = 1>
inline void prefetch(const void* near, i64 offset, i64 bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(near) + std::uintptr_t(offset);
  for (i64 byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + std::uintptr_t(byte)), 0, 4 - Level);
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
