// Maps that treat every voxel of a feature map alike, and chains of them, with their adjoints: plain
// descriptions on raw pointers, the same for every backend.
#pragma once

#include "common/base.h"

namespace factorizer {

// A map (batch, channels, voxels), the voxels of a channel side by side. Strides are in elements.
struct FeatureMap {
  void* data = nullptr;
  DType dtype = DType::float32;
  i64 batch = 0, channel = 0;
};

// What the chains share. `compute` is the dtype of the arithmetic and of all weights, biases and their
// gradients, float32 or float64; maps are of float64 if and only if it is. Matrices are (rows, columns),
// contiguous. A bias that is null is zero. Gradients of weights are wanted all, or none: then they are null.
struct Pointwise {
  DType compute;
  i64 batch, voxels;
  double eps;
  int threads;
};

// y = W n(x) + b: n normalises the channels of every voxel, then scales and shifts them. Without norm_weight
// there is no n, without weight no W and b; then out_channels = channels.
struct NormLinear : Pointwise {
  i64 channels, out_channels;
  FeatureMap x, y;
  const void *norm_weight, *norm_bias;  // channels
  const void* weight;                   // out_channels x channels
  const void* bias;                     // out_channels

  // backward
  FeatureMap dy, dx;
  FeatureMap addend;  // is added to dx; null data: nothing
  void *dnorm_weight, *dnorm_bias, *dweight, *dbias;
};

// z + W2 gelu(W1 n(z) + b1) + b2, where z = x + W y + b.
struct LinearNormMLP : Pointwise {
  i64 in_channels, channels, hidden;
  FeatureMap y, x, out;                 // y of in_channels
  const void *weight, *bias;            // channels x in_channels
  const void *norm_weight, *norm_bias;  // channels
  const void *weight1, *bias1;          // hidden x channels
  const void *weight2, *bias2;          // channels x hidden

  // backward
  FeatureMap dout, dy, dx;
  void *dweight, *dbias, *dnorm_weight, *dnorm_bias, *dweight1, *dbias1, *dweight2, *dbias2;
};

// A fine grid over a coarse one: every coarse voxel is a block of scale[0] x scale[1] x scale[2] fine ones.
// Maps of the coarse grid have `voxels` voxels, the product of `size`; 1-D and 2-D grids have leading axes of
// size and scale 1.
struct Blocks : Pointwise {
  i64 size[3], scale[3];

  i64 block() const { return scale[0] * scale[1] * scale[2]; }
};

// y = V s + (the transposed convolution of x by W, whose stride is its kernel) + b: s and y are fine, x is
// coarse.
struct Join : Blocks {
  i64 skip_channels, channels, out_channels;
  FeatureMap skip, x, y;
  const void* skip_weight;  // out_channels x skip_channels
  const void* weight;       // channels x (out_channels, block)
  const void* bias;         // out_channels

  // backward
  FeatureMap dy, dskip, dx;
  void *dskip_weight, *dweight, *dbias;
};

// y = W x + b, the convolution whose stride is its kernel: x is fine, y is coarse.
struct PatchConv : Blocks {
  i64 channels, out_channels;
  FeatureMap x, y;
  const void* weight;  // out_channels x (channels, block)
  const void* bias;    // out_channels

  // backward
  FeatureMap dy, dx;
  void *dweight, *dbias;
};

}  // namespace factorizer
