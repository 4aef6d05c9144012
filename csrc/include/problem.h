// What a kernel is asked to do: plain descriptions on raw pointers, the same for every backend.
#pragma once

#include <cstdint>

// Always inline: the CPU kernels are compiled once per instruction set, and a shared out-of-line copy of a
// header's function would be of one of them.
#ifdef __CUDACC__
#define FK_INLINE __host__ __device__ __forceinline__
#define FK_UNROLL _Pragma("unroll")  // so that arrays become registers
#else
#define FK_INLINE inline __attribute__((always_inline))
#define FK_UNROLL
#endif

namespace factorizer {

using i64 = std::int64_t;

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

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
  i64 size[3], patch[3];
  i64 num_shifts;
  const i64* shifts;  // num_shifts x 3, each in [0, size)

  i64 grid(int axis) const { return size[axis] / patch[axis]; }
  i64 num_windows() const { return grid(0) * grid(1) * grid(2); }
  i64 columns() const { return patch[0] * patch[1] * patch[2]; }
  i64 voxels() const { return size[0] * size[1] * size[2]; }
  i64 num_matrices() const { return num_shifts * batch * heads * num_windows(); }
};

struct Options {
  i64 rank;
  i64 num_iters;
  i64 grad_steps;  // <= num_iters
  bool hals;       // else MU
  bool relu;       // act on x before the factorisation
  double eps;
};

// One factor of every matrix, transposed: rank rows, each of `extent` elements of the arithmetic's type
// (float, or double for float64). stride = 0: shared by all the matrices.
struct Factor {
  void* data = nullptr;
  i64 stride = 0;
};

// y = mean over the shifts of every window's U V^T, and its backward. x, dy, y and dx are of `dtype`;
// y and dx are contiguous. Pointers that are null are not wanted.
struct SwinNMF {
  DType dtype;
  Windows windows;
  Options options;
  int threads;
  Volume x;
  Factor u0, v0;

  // forward: y, or the factors of every matrix
  void* y = nullptr;
  Factor u, v;

  // backward: from dy, or from the gradients of the factors
  Volume dy;
  Factor du, dv;
  void* dx = nullptr;
  Factor du0, dv0;  // of u0's and v0's extent and sharing
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
