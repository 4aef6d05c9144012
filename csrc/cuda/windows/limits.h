// The windows that a block holds on chip, four columns and all the rows in each thread; the module tells
// these limits to Python.
#pragma once

#include "common/base.h"

namespace factorizer {
namespace cuda {

constexpr int max_rows = 8;        // head_dim
constexpr int max_columns = 1024;  // voxels of a window
constexpr int max_shifts = 16;
constexpr i64 max_windows = 0x7fffffff;  // of all the copies: blocks of a grid
constexpr i64 max_extent = 0x3fffffff;   // voxels along an axis: a voxel and a shift add up in 31 bits

}  // namespace cuda
}  // namespace factorizer
