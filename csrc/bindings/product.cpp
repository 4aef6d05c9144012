// Products of a small matrix with long columns: what the other kernels stand on, for tests and benchmarks.
#include "problems/product.h"

#include "bindings/memory.h"
#include "cpu/common/dispatch.h"

namespace factorizer {
namespace bindings {
namespace {

using Sizes = std::array<i64, 4>;    // batch, rows, depth, columns
using Strides = std::array<i64, 2>;  // of the batch and of a row

void check(const Sizes& sizes, int threads) {
  check_threads(threads);
  i64 elements = 1;
  for (i64 n : sizes) {
    if (n < 0) refuse("sizes", "four numbers of at least 0", n);
    elements = product({elements, n > 0 ? n : 1});
  }
  if (elements > limit) throw std::invalid_argument("the product is too large");
}

// The memory from the first to the farthest of rows x columns elements with these strides.
i64 reach(const char* name, i64 rows, i64 row, i64 columns, i64 column) {
  if (row < 0 || column < 0) throw std::invalid_argument(std::string(name) + " must have no negative stride");
  if (rows == 0 || columns == 0) return 0;
  return sum(sum(product({rows - 1, row}), product({columns - 1, column})), 1);
}

Columns columns(const char* name, const MemoryArgs& args, const Strides& strides, i64 batch, i64 rows,
                i64 columns, i64 element) {
  const i64 matrix = reach(name, rows, strides[1], columns, 1);
  const i64 elements = matrix == 0 ? 0 : sum(reach(name, batch, strides[0], 1, 0), matrix - 1);
  return {memory(args).holding(name, batch == 0 ? 0 : elements, element), strides[0], strides[1]};
}

}  // namespace

void def_product(py::module_& m) {
  m.def(
      "multiply",
      [](int dtype_code, const Sizes& sizes, const MemoryArgs& w, const Strides& w_strides,
         const MemoryArgs& x, const Strides& x_strides, const MemoryArgs& y, const Strides& y_strides,
         int threads) {
        check(sizes, threads);
        const auto [batch, rows, depth, length] = sizes;
        Multiply p{dtype(dtype_code), batch,        rows,         depth, length, threads,
                   nullptr,           w_strides[0], w_strides[1], {},    {}};
        p.w = memory(w).holding("w", reach("w", rows, w_strides[0], depth, w_strides[1]),
                                compute_element(p.dtype));
        p.x = columns("x", x, x_strides, batch, depth, length, element(p.dtype));
        p.y = columns("y", y, y_strides, batch, rows, length, element(p.dtype));
        py::gil_scoped_release release;
        cpu_kernels().multiply(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("w"), py::arg("w_strides"), py::arg("x"),
      py::arg("x_strides"), py::arg("y"), py::arg("y_strides"), py::arg("threads"),
      "y[b] = W x[b]; sizes: batch, rows and columns of W, columns. W's strides are of a row and a column, "
      "x's and y's "
      "of the batch and a row.");
  m.def(
      "multiply_by_transpose",
      [](int dtype_code, const Sizes& sizes, const MemoryArgs& a, const Strides& a_strides,
         const MemoryArgs& b, const Strides& b_strides, const MemoryArgs& out, int threads) {
        check(sizes, threads);
        const auto [batch, rows, depth, length] = sizes;
        MultiplyByTranspose p{dtype(dtype_code), batch, rows, depth, length, threads, {}, {}, nullptr};
        p.a = columns("a", a, a_strides, batch, rows, length, element(p.dtype));
        p.b = columns("b", b, b_strides, batch, depth, length, element(p.dtype));
        p.out = memory(out).holding("out", product({rows, depth}), compute_element(p.dtype));
        py::gil_scoped_release release;
        cpu_kernels().multiply_by_transpose(p);
      },
      py::arg("dtype"), py::arg("sizes"), py::arg("a"), py::arg("a_strides"), py::arg("b"),
      py::arg("b_strides"), py::arg("out"), py::arg("threads"),
      "out = the sum over the batch of a[b] b[b]ᵀ; sizes: batch, rows of a, rows of b, columns.");
}

}  // namespace bindings
}  // namespace factorizer
