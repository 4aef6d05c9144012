// Gradients of weights: sums over all columns. The tiles are cut into groups, each worked off in order by one
// thread into a share of its own, and the shares are added in the groups' order. Neither cut depends on the
// number of threads, so that the sums do not.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/common/product.h"

namespace factorizer {
namespace FK_ISA {

// One sum, rows x columns, of which each share holds a part; a vector has one column.
struct Sum {
  i64 rows, columns, stride, offset;
};

template <class T>
class Shares {
 public:
  explicit Shares(i64 tiles) : tiles_(tiles) {}

  // Before take().
  Sum matrix(i64 rows, i64 columns) {
    const Sum sum{rows, columns, round_up<T>(columns), size_};
    size_ += rows * sum.stride;
    return sum;
  }
  Sum vector(i64 rows) {
    const Sum sum{rows, 1, 1, size_};
    size_ += round_up<T>(rows);
    return sum;
  }

  // `wanted`: whether there are sums at all, or groups only.
  void take(bool wanted, Arena& arena) {
    // Enough groups for many threads, unless their shares would take more memory than that is worth.
    constexpr i64 most = 64, least = 4, elements = 1 << 21;
    const i64 fitting = elements / (size_ + 1), groups = fitting < least  ? least
                                                         : fitting > most ? most
                                                                          : fitting;
    groups_ = Parts::into(tiles_, tiles_ < groups ? (tiles_ > 0 ? tiles_ : 1) : groups);
    if (wanted) memory_ = arena.take<T>(groups_.count * size_);
  }

  i64 groups() const { return tiles_ > 0 ? groups_.count : 0; }
  i64 begin(i64 group) const { return groups_.begin(group); }
  i64 end(i64 group) const { return groups_.begin(group) + groups_.size(group); }

  Rows<T> of(const Sum& sum, i64 group) const { return {memory_ + group * size_ + sum.offset, sum.stride}; }

  // to[r * row + c * column] = the sum of all shares; zero where there are no tiles.
  void add_up(const Sum& sum, T* to, i64 row, i64 column, int threads) const {
    constexpr i64 block = 4096;
    const Parts parts = Parts::of(sum.rows, block / sum.stride > 0 ? block / sum.stride : 1);
    parallel_for(sum.rows > 0 ? parts.count : 0, threads, [&](i64 part, int) {
      for (i64 r = parts.begin(part); r < parts.begin(part) + parts.size(part); ++r) {
        for (i64 first = 0; first < sum.columns; first += 64) {
          const i64 count = sum.columns - first < 64 ? sum.columns - first : 64;
          double totals[64] = {};
          for (i64 group = 0; group < groups(); ++group) {
            const T* share = of(sum, group)[r] + first;
            for (i64 c = 0; c < count; ++c) totals[c] += double(share[c]);
          }
          for (i64 c = 0; c < count; ++c) to[r * row + (first + c) * column] = T(totals[c]);
        }
      }
    });
  }

 private:
  i64 tiles_, size_ = 0;
  Parts groups_;
  T* memory_ = nullptr;
};

template <class T>
inline Rows<T> from_row(Rows<T> rows, i64 first) {
  return {rows[first], rows.stride};
}

// sums[r] (+)= the sum of row r.
template <class T>
void add_rows(i64 rows, Rows<const T> x, i64 length, T* sums, bool accumulate) {
  for (i64 r = 0; r < rows; ++r) {
    Vec<T> total[2] = {};
    for (i64 n = 0; n < length; n += 2 * Simd<T>::width) {
      total[0] += load(x[r] + n);
      total[1] += load(x[r] + n + Simd<T>::width);
    }
    const T row = sum<T>(total[0] + total[1]);
    sums[r] = accumulate ? sums[r] + row : row;
  }
}

// sums[r] (+)= the sum of the products of row r of x and of y.
template <class T>
void add_products(i64 rows, Rows<const T> x, Rows<const T> y, i64 length, T* sums, bool accumulate) {
  for (i64 r = 0; r < rows; ++r) {
    Vec<T> total{};
    for (i64 n = 0; n < length; n += Simd<T>::width) total += load(x[r] + n) * load(y[r] + n);
    sums[r] = (accumulate ? sums[r] : T(0)) + sum<T>(total);
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
