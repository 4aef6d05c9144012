// Products against float64 loops: tiles (cpu/common/product.h) for the instruction set that this file is
// compiled for, whole products by the kernels of the processor.
#define FK_ISA product_test
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "cpu/common/dispatch.h"
#include "cpu/common/product.h"
#include "problems/product.h"

namespace factorizer {
namespace product_test {
FK_PRODUCT(, float)
FK_PRODUCT(, double)
}  // namespace product_test
}  // namespace factorizer

namespace {

namespace fk = factorizer;
namespace isa = factorizer::product_test;
using fk::i64;

template <class T>
using Numbers = std::vector<T>;

int failures = 0;

void expect(bool condition, const char* what, double value) {
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s (%g)\n", what, value);
}

// Of a sum of so many products of numbers in (-1, 1): each addition rounds a partial sum, which grows with
// the root of their number.
template <class T>
void expect_close(double value, double expected, i64 terms, const char* what) {
  const double error = std::fabs(value - expected);
  expect(error <= double(std::numeric_limits<T>::epsilon()) * double(terms + 2), what, error);
}

std::mt19937 generator(3);

template <class T>
Numbers<T> draw(i64 count) {
  std::uniform_real_distribution<T> uniform(-1, 1);
  Numbers<T> numbers(count);
  for (T& n : numbers) n = uniform(generator);
  return numbers;
}

template <class T>
T nan() {
  return static_cast<T>(std::nan(""));
}

// What must not be touched is NaN and stays it.
template <class T>
void check_tile(i64 rows, i64 depth, i64 valid) {
  const i64 length = isa::round_up<T>(valid), gap = 3;  // rows that begin anywhere
  const i64 in_stride = length + gap, out_stride = length + gap;
  const Numbers<T> w = draw<T>(rows * depth), in = draw<T>(depth * in_stride), bias = draw<T>(rows);
  const Numbers<T> before = draw<T>(rows * out_stride);
  Numbers<T> packed(isa::Weights<T>::packed_size(rows, depth));
  using isa::Weights;
  // W as it is, and as the transpose of what lies there.
  for (bool transposed : {false, true}) {
    const i64 row = transposed ? 1 : depth, column = transposed ? rows : 1;
    for (bool packs : {false, true}) {
      const Weights<T> weights = packs ? Weights<T>::pack(w.data(), rows, depth, row, column, packed.data())
                                       : Weights<T>::in_place(w.data(), rows, depth, row, column);
      for (bool accumulate : {false, true}) {
        for (const T* b : {static_cast<const T*>(nullptr), bias.data()}) {
          Numbers<T> out(rows * out_stride, nan<T>());
          for (i64 p = 0; accumulate && p < rows; ++p)
            for (i64 n = 0; n < length; ++n) out[p * out_stride + n] = before[p * out_stride + n];
          isa::multiply<T>(weights, {in.data(), in_stride}, {out.data(), out_stride}, length,
                           {accumulate, b});
          for (i64 p = 0; p < rows; ++p) {
            for (i64 n = 0; n < length; ++n) {
              double expected = (accumulate ? before[p * out_stride + n] : 0.0) + (b ? b[p] : 0.0);
              for (i64 k = 0; k < depth; ++k)
                expected += double(w[p * row + k * column]) * double(in[k * in_stride + n]);
              expect_close<T>(out[p * out_stride + n], expected, depth, "a tile's product");
            }
            for (i64 n = length; n < out_stride; ++n)
              expect(std::isnan(out[p * out_stride + n]), "nothing beyond a tile's columns is written", 0);
          }
        }
      }
    }
  }
}

template <class T>
void check_tile_by_transpose(i64 rows, i64 columns, i64 length) {
  length = isa::round_up<T>(length);
  const i64 stride = length + 5, out_stride = isa::round_up<T>(columns) + 1;
  const Numbers<T> a = draw<T>(rows * stride), b = draw<T>(columns * stride);
  const Numbers<T> before = draw<T>(rows * out_stride);
  for (bool accumulate : {false, true}) {
    for (auto wanted : {isa::Wanted::all, isa::Wanted::lower}) {
      if (wanted == isa::Wanted::lower && rows != columns) continue;
      Numbers<T> out(rows * out_stride, nan<T>());
      if (accumulate) out = before;
      isa::multiply_by_transpose<T>(rows, {a.data(), stride}, columns, {b.data(), stride}, length,
                                    {out.data(), out_stride}, accumulate, wanted);
      for (i64 p = 0; p < rows; ++p) {
        for (i64 q = 0; q < (wanted == isa::Wanted::lower ? p + 1 : columns); ++q) {
          double expected = accumulate ? before[p * out_stride + q] : 0.0;
          for (i64 n = 0; n < length; ++n) expected += double(a[p * stride + n]) * double(b[q * stride + n]);
          expect_close<T>(out[p * out_stride + q], expected, length, "a tile's product with a transpose");
        }
      }
      if (accumulate || wanted == isa::Wanted::all) continue;
      isa::mirror<T>(rows, {out.data(), out_stride});
      for (i64 p = 0; p < rows; ++p) {
        for (i64 q = 0; q < rows; ++q)
          expect(out[p * out_stride + q] == out[q * out_stride + p], "symmetric once mirrored", 0);
      }
    }
  }
}

// Rows `spread` elements apart and more; several threads must give the same bits as one.
template <class T>
void check_whole(i64 batch, i64 rows, i64 depth, i64 columns, i64 spread) {
  const fk::DType dtype = sizeof(T) == 4 ? fk::DType::float32 : fk::DType::float64;
  const i64 row = columns + spread, x_batch = depth * row, y_batch = rows * row;
  Numbers<T> x = draw<T>(batch * x_batch), w = draw<T>(rows * depth);
  Numbers<T> y(batch * y_batch, nan<T>()), again = y, out(rows * depth, nan<T>()), out_again = out;
  fk::Multiply p{dtype,
                 batch,
                 rows,
                 depth,
                 columns,
                 1,
                 w.data(),
                 depth,
                 1,
                 {x.data(), x_batch, row},
                 {y.data(), y_batch, row}};
  fk::cpu_kernels().multiply(p);
  p.threads = 3;
  p.y.data = again.data();
  fk::cpu_kernels().multiply(p);
  for (i64 b = 0; b < batch; ++b) {
    for (i64 r = 0; r < rows; ++r) {
      for (i64 n = 0; n < row; ++n) {
        const i64 at = b * y_batch + r * row + n;
        if (n >= columns) {
          expect(std::isnan(y[at]) && std::isnan(again[at]), "nothing between the rows is written", 0);
          continue;
        }
        double expected = 0;
        for (i64 k = 0; k < depth; ++k)
          expected += double(w[r * depth + k]) * double(x[b * x_batch + k * row + n]);
        expect_close<T>(y[at], expected, depth, "a product");
        expect(y[at] == again[at], "the same bits for any number of threads", y[at] - again[at]);
      }
    }
  }
  fk::MultiplyByTranspose q{
      dtype, batch, rows, depth, columns, 1, {y.data(), y_batch, row}, {x.data(), x_batch, row}, out.data()};
  fk::cpu_kernels().multiply_by_transpose(q);
  q.threads = 3;
  q.out = out_again.data();
  fk::cpu_kernels().multiply_by_transpose(q);
  for (i64 r = 0; r < rows; ++r) {
    for (i64 k = 0; k < depth; ++k) {
      double expected = 0, norm = 0;
      for (i64 b = 0; b < batch; ++b) {
        for (i64 n = 0; n < columns; ++n) {
          const double term = double(y[b * y_batch + r * row + n]) * double(x[b * x_batch + k * row + n]);
          expected += term;
          norm += term * term;
        }
      }
      const double error = std::fabs(out[r * depth + k] - expected);
      // y is made of x: partial sums may grow as their number of terms.
      const double terms = double(batch * columns), size = std::sqrt(norm * terms);
      const double bound =
          2 * std::numeric_limits<T>::epsilon() * (size + std::fabs(expected) * std::sqrt(terms));
      expect(error <= bound, "a product with a transpose", error);
      expect(out[r * depth + k] == out_again[r * depth + k], "the same bits for any number of threads", 0);
    }
  }
}

// Of 32 bits and of more.
void check_divisions() {
  const i64 large = i64(1) << 32;
  for (i64 n : {i64(0), i64(7), large - 1, large, large + 5, 1000 * large + 1}) {
    for (i64 size : {i64(1), i64(3), large - 1, large, 2 * large + 1}) {
      i64 quotient = n;
      const i64 rest = fk::split(quotient, size);
      expect(quotient == n / size && rest == n % size, "a quotient and its rest", double(n));
    }
    for (i64 largest : {i64(3), large / 2, large + 1}) {
      const isa::Parts parts = isa::Parts::of(n, largest);
      const i64 last = parts.count - 1;
      expect(parts.count == (n > 0 ? (n + largest - 1) / largest : 1), "as few parts as there can be",
             double(n));
      expect(parts.begin(0) == 0 && parts.begin(last) + parts.size(last) == n, "all of it", double(n));
      expect(parts.largest() <= largest && parts.size(0) - parts.size(last) <= 1, "of a size", double(n));
      expect(parts.begin(last / 2) + parts.size(last / 2) == parts.begin(last / 2 + 1) || last == 0,
             "one behind the other", double(n));
    }
  }
}

template <class T>
void check_all() {
  for (i64 rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 25, 40}) {
    for (i64 depth : {0, 1, 2, 5, 16, 63, 65}) {
      for (i64 length : {1, 8, 20, 33}) check_tile<T>(rows, depth, length);
    }
  }
  check_tile<T>(70, 600, 100);  // several blocks of the depth, several groups of panels
  check_tile<T>(300, 257, 17);
  for (i64 rows : {1, 2, 3, 5, 7, 8, 9, 16, 21, 40}) {
    for (i64 columns : {1, 2, 3, 4, 6, 8, 9, 17, 40}) {
      for (i64 length : {1, 30, 64}) check_tile_by_transpose<T>(rows, columns, length);
    }
  }
  check_tile_by_transpose<T>(33, 33, 700);
  check_whole<T>(1, 1, 1, 1, 0);
  check_whole<T>(2, 3, 5, 7, 4);
  check_whole<T>(3, 17, 9, 1001, 1);
  check_whole<T>(1, 40, 33, 3000, 0);
  check_whole<T>(2, 130, 300, 70, 58);  // rows a power of two apart, shared out among the threads
  check_whole<T>(5, 8, 8, 1024, 0);
  check_whole<T>(0, 4, 4, 4, 0);
  check_whole<T>(1, 4, 0, 20, 0);
  check_whole<T>(1, 3, 4, 0, 0);
}

}  // namespace

int main() {
  check_divisions();
  check_all<float>();
  check_all<double>();
  std::printf("%s, %s\n", fk::cpu_kernels().isa, failures == 0 ? "passed" : "failed");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
