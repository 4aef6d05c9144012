// The caches that work is cut to fit: of the smaller processors in use, since a piece too small costs less
// than one too large.
#pragma once

#include "common/base.h"

namespace factorizer {
namespace FK_ISA {

constexpr i64 first_level_bytes = 32 << 10;    // of data, one core's
constexpr i64 second_level_bytes = 256 << 10;  // one core's
constexpr i64 last_level_bytes = 8 << 20;      // shared by the cores

}  // namespace FK_ISA
}  // namespace factorizer
