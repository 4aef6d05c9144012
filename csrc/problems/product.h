// Products of a small matrix with long columns: plain descriptions on raw pointers.
#pragma once

#include "common/base.h"

namespace factorizer {

// A batch of row lists; the elements of a row lie side by side. Strides are in elements.
struct Columns {
  void* data = nullptr;
  i64 batch = 0, row = 0;
};

// y[b] = W x[b], with W (rows x depth) of the arithmetic's type (float, or double for float64) and any
// strides, x[b] (depth x columns), y[b] (rows x columns) of `dtype`.
struct Multiply {
  DType dtype;
  i64 batch, rows, depth, columns;
  int threads;
  const void* w;
  i64 w_row, w_column;
  Columns x, y;
};

// out = the sum over b of a[b] b[b]ᵀ, with a[b] (rows x columns), b[b] (depth x columns) of `dtype`; out
// (rows x depth) is contiguous, of the arithmetic's type.
struct MultiplyByTranspose {
  DType dtype;
  i64 batch, rows, depth, columns;
  int threads;
  Columns a, b;
  void* out;
};

}  // namespace factorizer
