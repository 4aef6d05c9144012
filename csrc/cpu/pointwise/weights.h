// A chain's weights as its tiles need them: cut into pieces, packed where many columns share that work, and
// with a norm's scale and shift taken into the linear map that follows it.
#pragma once

#include "cpu/common/memory.h"
#include "cpu/common/product.h"

namespace factorizer {
namespace FK_ISA {

// A matrix, used in pieces of its rows or of its columns.
template <class T>
class Prepared {
 public:
  // `packed`: worth it for transposes, whose coefficients lie far apart, and for many columns.
  static Prepared of_rows(i64 rows, i64 depth, Parts parts, bool packed, Arena& arena) {
    return {rows, depth, parts, true, packed, arena};
  }
  static Prepared of_columns(i64 rows, i64 depth, Parts parts, bool packed, Arena& arena) {
    return {rows, depth, parts, false, packed, arena};
  }
  static Prepared whole(i64 rows, i64 depth, bool packed, Arena& arena) {
    return of_rows(rows, depth, Parts::whole(rows), packed, arena);
  }

  // W[r, k] = w[r * row + k * column].
  void set(const T* w, i64 row, i64 column) {
    w_ = w, row_ = row, column_ = column;
    if (packed_ == nullptr) return;
    for (i64 i = 0; i < parts_.count; ++i) {
      const Weights<T> place = in_place(i);
      Weights<T>::pack(place.data, place.rows, place.depth, row, column, packed_ + offset(i));
    }
  }

  Weights<T> piece(i64 i) const {
    Weights<T> piece = in_place(i);
    if (packed_ != nullptr) piece = {packed_ + offset(i), piece.rows, piece.depth, 1, 0, true};
    return piece;
  }

 private:
  Prepared(i64 rows, i64 depth, Parts parts, bool of_rows, bool packed, Arena& arena)
      : rows_(rows), depth_(depth), parts_(parts), of_rows_(of_rows) {
    if (packed) packed_ = arena.take<T>(Weights<T>::packed_size(rows, depth));
  }

  i64 offset(i64 i) const { return parts_.begin(i) * (of_rows_ ? depth_ : rows_); }
  Weights<T> in_place(i64 i) const {
    const i64 first = parts_.begin(i), size = parts_.size(i);
    return Weights<T>::in_place(w_ + first * (of_rows_ ? row_ : column_), of_rows_ ? size : rows_,
                                of_rows_ ? depth_ : size, row_, column_);
  }

  i64 rows_, depth_;
  Parts parts_;
  bool of_rows_;
  T* packed_ = nullptr;
  const T* w_ = nullptr;
  i64 row_ = 0, column_ = 0;
};

// The linear map W n + b after a norm's scale and shift, as one of what is standardised only:
// W diag(scale), b + W shift.
template <class T>
class Folded {
 public:
  T *weight, *bias;

  Folded(i64 rows, i64 depth, Arena& arena)
      : weight(arena.take<T>(rows * depth)), bias(arena.take<T>(rows)), rows_(rows), depth_(depth) {}

  void set(const T* w, const T* b, const T* scale, const T* shift) {
    for (i64 r = 0; r < rows_; ++r) {
      T sum = b == nullptr ? T(0) : b[r];
      for (i64 k = 0; k < depth_; ++k) {
        weight[r * depth_ + k] = w[r * depth_ + k] * scale[k];
        sum += w[r * depth_ + k] * shift[k];
      }
      bias[r] = sum;
    }
  }

  // dw and db hold the gradients of the folded map; dw becomes that of W.
  void backward(const T* w, const T* scale, const T* shift, T* dw, const T* db, T* dscale, T* dshift) const {
    fill(dscale, depth_, T(0));
    fill(dshift, depth_, T(0));
    for (i64 r = 0; r < rows_; ++r) {
      for (i64 k = 0; k < depth_; ++k) {
        const i64 at = r * depth_ + k;
        dscale[k] += dw[at] * w[at];
        dshift[k] += db[r] * w[at];
        dw[at] = dw[at] * scale[k] + db[r] * shift[k];
      }
    }
  }

 private:
  i64 rows_, depth_;
};

}  // namespace FK_ISA
}  // namespace factorizer
