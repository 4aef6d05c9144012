// What the kernels of a depthwise convolution are asked to do.
#pragma once

#include "problems/windows.h"

namespace factorizer {

// y[b, c, p] = bias[c] + sum_t weight[c, t] x[b, c, p + t - k / 2], x being zero outside of the map, and its
// backward. x and dy are of `dtype` and of any strides; y and dx are of `dtype` and contiguous; weight
// (channels, k1, k2, k3), bias (channels) and their gradients are contiguous and of the arithmetic's type
// (float, or double for float64). 1-D and 2-D maps have leading axes of size 1, along which k is 1.
struct DepthwiseConv {
  DType dtype;
  i64 batch, channels;
  i64 size[3], kernel[3];  // kernel: 1, 3, 5 or 7 along each axis
  int threads;
  Volume x;
  const void* weight = nullptr;

  // forward
  const void* bias = nullptr;  // null: none
  void* y = nullptr;

  // backward: those that are null are not wanted
  Volume dy;
  void* dx = nullptr;
  void* dweight = nullptr;
  void* dbias = nullptr;

  i64 voxels() const { return size[0] * size[1] * size[2]; }
  i64 num_elements() const { return batch * channels * voxels(); }
  i64 taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

}  // namespace factorizer
