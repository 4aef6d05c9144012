// The windows that a block holds on chip, four columns and all the rows in each thread; the module tells
// these limits to Python.
#pragma once

namespace factorizer {
namespace cuda {

constexpr int max_rows = 8;        // head_dim
constexpr int max_columns = 1024;  // voxels of a window
constexpr int max_shifts = 16;

}  // namespace cuda
}  // namespace factorizer
