// A feature map and its cut into (shifted) windows: plain descriptions on raw pointers, the same for every
// backend. Above the kernels one speaks of head_dim and patch; below, of the rows (head_dim) and the columns
// (a window's voxels) of matrices.
#pragma once

#include "common/base.h"

namespace factorizer {

// A feature map (B, C, S1, S2, S3); 1-D and 2-D maps have leading spatial axes of size 1.
// Strides are in elements.
struct Volume {
  void* data = nullptr;
  i64 stride[5] = {0, 0, 0, 0, 0};
};

// The cut into windows. C = heads * head_dim, head_dim fastest. Matrix k of the batch of matrices has
// k = ((shift * batch + b) * heads + h) * grid + g; its columns run over the window, last axis fastest.
struct Windows {
  i64 batch, heads, head_dim;
  i64 size[3], patch[3], grid[3];  // of the map, of a window, and of the map in windows: size / patch
  i64 num_shifts;
  const i64* shifts;  // num_shifts x 3, each in [0, size)

  i64 num_windows() const { return grid[0] * grid[1] * grid[2]; }
  i64 columns() const { return patch[0] * patch[1] * patch[2]; }
  i64 voxels() const { return size[0] * size[1] * size[2]; }
  i64 num_matrices() const { return num_shifts * batch * heads * num_windows(); }
  i64 num_elements() const { return batch * heads * head_dim * voxels(); }  // of the map
};

// z (shifts*B*H, G, head_dim, P) contiguous <-> x. scale multiplies on the way.
struct Matricize {
  DType dtype;
  Windows windows;
  int threads;
  Volume x;
  void* z;
  double scale;
};

}  // namespace factorizer
