// The product of a small matrix with long columns, for a tile of columns that lies in cache:
//
//   multiply(w, in, out, length, start)     out (rows x length) = W in, W (rows x depth), in (depth x length)
//   multiply(wᵀ, ...)                       Wᵀ dY: the same, of weights taken with their strides swapped
//   multiply_by_transpose(a, b, ...)        out (rows x columns) += A Bᵀ, both with `length` columns: dY Xᵀ,
//   A Aᵀ
//
// One microkernel does all of it: some rows of `out` by some vectors of columns are held in registers while
// it goes along the depth. What is guaranteed:
//   - Every element of `out` is one sum over the depth, in order, in blocks of at most `depth_block`; it does
//     not depend on which columns or rows are computed beside it, so tiles can be cut and shared at will.
//   - `length` is a multiple of the vector width (round_up<T>); what lies past the true columns is computed
//     along with them. Memory needs no alignment. Nothing outside the rows and columns that are named is
//     touched.
//   - No allocation, no threads: the caller brings the memory and cuts the columns. 64 to 256 columns are a
//     good tile, 32 rows and more are what registers are used well with.
//   - Rows of a tile should lie an odd number of cache lines apart (row_stride): at a power of two they fall
//     into a few sets of the cache and evict one another.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/scalar_types.h"
#include "cpu/common/cache.h"
#include "cpu/common/rows.h"

namespace factorizer {
namespace FK_ISA {

// --- Lanes that change places ----------------------------------------------------------------

template <class V>
struct SameSize {
  using Lane = std::conditional_t<sizeof(V{}[0]) == 4, std::int32_t, std::int64_t>;
  typedef Lane Integers __attribute__((vector_size(sizeof(V))));
};

// Of each two blocks of S lanes the first of a and the first of b, or the second of both.
template <int S, class V, int... I>
FK_INLINE V firsts(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I & S) ? int(sizeof...(I)) + I - S : I)...);
#else
  return __builtin_shuffle(a, b,
                           typename SameSize<V>::Integers{((I & S) ? int(sizeof...(I)) + I - S : I)...});
#endif
}

template <int S, class V, int... I>
FK_INLINE V seconds(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, ((I & S) ? int(sizeof...(I)) + I : I + S)...);
#else
  return __builtin_shuffle(a, b,
                           typename SameSize<V>::Integers{((I & S) ? int(sizeof...(I)) + I : I + S)...});
#endif
}

template <class T>
constexpr std::make_integer_sequence<int, int(Simd<T>::width)> lanes_of{};

// Transposes a square of vectors: the blocks of S x S lanes off the diagonal change places, S = width/2 .. 1.
template <class T, int S = int(Simd<T>::width) / 2>
FK_INLINE void transpose_square(Vec<T> (&rows)[Simd<T>::width]) {
  if constexpr (S > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < int(Simd<T>::width); ++i) {
      if (i & S) continue;
      const Vec<T> a = rows[i], b = rows[i + S];
      rows[i] = firsts<S>(a, b, lanes_of<T>);
      rows[i + S] = seconds<S>(a, b, lanes_of<T>);
    }
    transpose_square<T, S / 2>(rows);
  }
}

// --- Weights ---------------------------------------------------------------------------------

// The registers' tile: at most max_height rows of `out` by two vectors, or fewer rows by more. Along a short
// depth a smaller one is better: there are fewer sums to begin and to store for what is done between.
#if defined(__AVX512F__)
constexpr i64 max_height = 12, short_height = 8;
#elif defined(__aarch64__)
constexpr i64 max_height = 8, short_height = 6;
#elif defined(__AVX__)
constexpr i64 max_height = 6, short_height = 4;
#else
constexpr i64 max_height = 4, short_height = 4;
#endif
constexpr i64 short_depth = 64;

// Vectors of sums in the registers: along a short depth one more than its tile has, where they hold it.
constexpr i64 most_sums = 2 * max_height;
constexpr i64 short_sums = 2 * short_height < most_sums ? 2 * short_height + 1 : most_sums;

// Columns of W that one go of the microkernel takes, and bytes of `in`: a panel of W stays in the first-level
// cache while columns of `in` pass, which come from the second-level cache, where they stay for all the
// panels.
constexpr i64 depth_block = 256;
constexpr i64 slice_bytes = product_bytes / 4;

// Panels of W that stay in the second-level cache while the columns of a tile pass.
template <class T>
constexpr i64 panel_group = product_bytes / 2 / (depth_block * max_height * i64(sizeof(T)));

// A cut into as few parts of at most `largest` as there can be, at least one; their sizes differ by one at
// most.
class Parts {
 public:
  i64 count = 1;

  Parts() = default;  // of nothing
  static Parts whole(i64 total) { return {1, total, 0}; }
  static Parts of(i64 total, i64 largest) {
    if (total <= largest) return whole(total);  // divisions cost as much as a small product
    i64 count = total + largest - 1;
    split(count, largest);
    return into(total, count);
  }
  static Parts into(i64 total, i64 count) {
    i64 least = total;
    const i64 longer = split(least, count);
    return {count, least, longer};
  }
  i64 begin(i64 i) const { return i * least_ + (i < longer_ ? i : longer_); }
  i64 size(i64 i) const { return least_ + (i < longer_ ? 1 : 0); }
  i64 largest() const { return size(0); }

 private:
  Parts(i64 count, i64 least, i64 longer) : count(count), least_(least), longer_(longer) {}

  i64 least_ = 0, longer_ = 0;  // of a part; so many of the first ones have one more
};

// The panels of rows that W is cut into.
inline Parts panels_of(i64 rows, i64 depth) {
  return Parts::of(rows, depth < short_depth ? short_height : max_height);
}

// The columns of `height` rows, one after another.
template <class T, class S, class Height>
void pack_panel(const S* from, Height height, i64 depth, i64 row, i64 column, T* to) {
  constexpr i64 width = Simd<T>::width;
  const i64 h = height;
  i64 k = 0;
  if constexpr (std::is_same_v<S, T>) {
    // By squares, as long as what a store leaves past its h elements is overwritten by the next ones.
    const i64 end = column == 1 && 0 < h && h <= width ? depth - width : 0;
    for (; k + width <= end; k += width) {
      Vec<T> square[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        square[i] = i < h ? load(from + i * row + k) : Vec<T>{};
        if (i < h) prefetch(from + i * row + k, h * row * i64(sizeof(T)), 1);  // of the next panel
      }
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) store(to + (k + i) * h, square[i]);
    }
  }
  for (; k < depth; ++k) {
    for (i64 p = 0; p < h; ++p) to[k * h + p] = T(to_compute(from[p * row + k * column]));
  }
}

// W as the microkernel reads it: where it lies with any strides, or packed in panels of some rows, in which
// the coefficients stand in the order of their use. A view: the memory is the caller's.
template <class T>
struct Weights {
  const T* data;
  i64 rows, depth;
  i64 row, column;  // strides; of no meaning where packed
  bool packed;

  // In place: good for weights that are used for few columns only.
  static Weights in_place(const T* w, i64 rows, i64 depth, i64 row, i64 column) {
    return {w, rows, depth, row, column, false};
  }

  // The elements that pack() writes: every coefficient once.
  static i64 packed_size(i64 rows, i64 depth) { return rows * depth; }

  // W[r, k] = w[r * row + k * column] to `memory`, converted from S. Swap the strides for Wᵀ.
  template <class S>
  static Weights pack(const S* w, i64 rows, i64 depth, i64 row, i64 column, T* memory) {
    const Parts blocks = Parts::of(depth, depth_block), panels = panels_of(rows, depth);
    // Where W's columns are contiguous, some panels together, a few columns at a time: every line of memory
    // is read once.
    const bool transposed = row == 1 && column != 1;
    const i64 together = transposed ? 8 : 1, step = transposed ? 8 : depth_block;
    for (i64 block = 0; block < blocks.count; ++block) {
      const S* const from = w + blocks.begin(block) * column;
      T* const to = memory + blocks.begin(block) * rows;
      const i64 length = blocks.size(block);
      for (i64 first = 0; first < panels.count; first += together) {
        const i64 last = first + together < panels.count ? first + together : panels.count;
        const i64 begin = panels.begin(first), bytes = (panels.begin(last) - begin) * i64(sizeof(S));
        for (i64 k = 0; k < length; k += step) {
          const i64 count = step < length - k ? step : length - k;
          for (i64 next = k + step; transposed && next < k + 2 * step; ++next)
            prefetch(from + begin, next * column * i64(sizeof(S)), bytes);
          for (i64 i = first; i < last; ++i) {
            const i64 at = panels.begin(i);
            with_small(panels.size(i), [&](auto height) {
              pack_panel<T>(from + at * row + k * column, height, count, row, column,
                            to + at * length + k * height);
            });
          }
        }
      }
    }
    return {memory, rows, depth, 1, 0, true};
  }

  // The coefficients of rows [first_row, + height) from column first_k on.
  struct Panel {
    const T* data;
    i64 row, column;
  };
  Panel panel(i64 first_row, i64 height, i64 first_k, i64 block_depth) const {
    if (!packed) return {data + first_row * row + first_k * column, row, column};
    return {data + first_k * rows + first_row * block_depth, 1, height};
  }
};

// --- The microkernel -------------------------------------------------------------------------

// What the product is added to: nothing, or what `out` holds; and a number for each row.
template <class T>
struct Start {
  bool accumulate = false;
  const T* bias = nullptr;
};

// H rows of W by `length` columns, V vectors of them at a time; length is a multiple of that. Packed
// coefficients follow one another, so that one pointer finds them: a loop of fewer instructions.
template <int H, int V, bool Packed, class T>
void multiply_panel(const typename Weights<T>::Panel& w, i64 depth, Rows<const T> in, Rows<T> out, i64 length,
                    bool accumulate, const T* bias) {
  constexpr i64 width = Simd<T>::width;
  // One pointer for three rows: x86 addresses take a register times 0, 1 and 2.
  constexpr int together = Packed ? H : 3, pointers = (H + together - 1) / together;
  const i64 row = Packed ? 1 : w.row, column = Packed ? H : w.column;
  for (i64 n = 0; n < length; n += V * width) {
    Vec<T> sums[H][V];
    if (accumulate) {
#pragma GCC unroll 16
      for (int p = 0; p < H; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[p][v] = load(out[p] + n + v * width);
      }
    } else {
#pragma GCC unroll 16
      for (int p = 0; p < H; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[p][v] = Vec<T>{};
      }
    }
    if (bias != nullptr) {
#pragma GCC unroll 16
      for (int p = 0; p < H; ++p) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[p][v] += bias[p];
      }
    }
    const T* coefficients[pointers];
#pragma GCC unroll 16
    for (int i = 0; i < pointers; ++i) coefficients[i] = w.data + together * i * row;
    const T* x = in.data + n;
#pragma GCC unroll 1
    for (i64 k = 0; k < depth; ++k) {
      Vec<T> xs[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) xs[v] = load(x + v * width);
#pragma GCC unroll 16
      for (int p = 0; p < H; ++p) {
        const T coefficient = coefficients[p / together][p % together * row];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sums[p][v] += coefficient * xs[v];
      }
      x += in.stride;
#pragma GCC unroll 16
      for (int i = 0; i < pointers; ++i) coefficients[i] += column;
    }
#pragma GCC unroll 16
    for (int p = 0; p < H; ++p) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(out[p] + n + v * width, sums[p][v]);
    }
  }
}

// The same for a height that is known at run time only.
template <int V, bool Packed, class T, int H = max_height>
FK_INLINE void multiply_panel_of(i64 height, const typename Weights<T>::Panel& w, i64 depth, Rows<const T> in,
                                 Rows<T> out, i64 length, bool accumulate, const T* bias) {
  if constexpr (H > 0) {
    if (height != H)
      return multiply_panel_of<V, Packed, T, H - 1>(height, w, depth, in, out, length, accumulate, bias);
    if constexpr (H * V <= most_sums)
      multiply_panel<H, V, Packed, T>(w, depth, in, out, length, accumulate, bias);
  }
}

// --- W times a tile --------------------------------------------------------------------------

template <int V, bool Packed, class T>
void multiply_columns(const Weights<T>& w, Parts panels, Rows<const T> in, Rows<T> out, i64 length,
                      Start<T> start) {
  constexpr i64 step = V * Simd<T>::width;
  const Parts blocks = Parts::of(w.depth, depth_block);
  const i64 whole = length / step * step;
  const i64 step_bytes = blocks.largest() * step * i64(sizeof(T));
  i64 chunk = whole;
  if (whole / step * step_bytes > slice_bytes)
    chunk = step_bytes < slice_bytes ? slice_bytes / step_bytes * step : step;
  for (i64 block = 0; block < blocks.count; ++block) {
    const i64 first_k = blocks.begin(block), depth = blocks.size(block);
    const bool accumulate = start.accumulate || block > 0;
    const T* bias = block > 0 ? nullptr : start.bias;
    for (i64 first = 0; first < panels.count; first += panel_group<T>) {
      const i64 last = first + panel_group<T> < panels.count ? first + panel_group<T> : panels.count;
      const auto columns = [&](i64 n, i64 count, auto vectors) {
        for (i64 i = first; i < last; ++i) {
          const i64 row = panels.begin(i), height = panels.size(i);
          multiply_panel_of<decltype(vectors)::value, Packed, T>(
              height, w.panel(row, height, first_k, depth), depth, {in[first_k] + n, in.stride},
              {out[row] + n, out.stride}, count, accumulate, bias == nullptr ? nullptr : bias + row);
        }
      };
      for (i64 n = 0; n < whole; n += chunk)
        columns(n, chunk < whole - n ? chunk : whole - n, std::integral_constant<int, V>{});
      if (whole < length) columns(whole, length - whole, std::integral_constant<int, 1>{});
    }
  }
}

// out (rows x length) = W in (+ out) (+ bias), in (depth x length).
template <class T>
void multiply(const Weights<T>& w, Rows<const T> in, Rows<T> out, i64 length, Start<T> start = {}) {
  if (w.rows == 0) return;
  const Parts panels = panels_of(w.rows, w.depth);
  const i64 sums = w.depth < short_depth ? short_sums : most_sums, height = panels.largest();
  const auto columns = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    if (w.packed) return multiply_columns<V, true>(w, panels, in, out, length, start);
    multiply_columns<V, false>(w, panels, in, out, length, start);
  };
  if (4 * height <= sums) return columns(std::integral_constant<int, 4>{});
  if (3 * height <= sums) return columns(std::integral_constant<int, 3>{});
  columns(std::integral_constant<int, 2>{});
}

// --- Sums over lanes -------------------------------------------------------------------------

// Adds the lanes of N vectors until these are as few as hold the sums, one in a lane.
template <class T, int N, int S>
FK_INLINE void fold_lanes(Vec<T>* vectors) {
  if constexpr (S > 0) {
    constexpr int half = N > 1 ? N / 2 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) {
      const Vec<T> a = vectors[i], b = vectors[N > 1 ? i + half : i];
      vectors[i] = firsts<S>(a, b, lanes_of<T>) + seconds<S>(a, b, lanes_of<T>);
    }
    fold_lanes<T, half, S / 2>(vectors);
  }
}

// The sums over the lanes of N vectors, a power of two, to sums[0 .. N).
template <class T, int N>
FK_INLINE void sum_lanes(Vec<T> (&vectors)[N], T* sums) {
  constexpr int width = int(Simd<T>::width), left = N > width ? N / width : 1;
  fold_lanes<T, N, width / 2>(vectors);
  T lanes[left][width];
#pragma GCC unroll 16
  for (int i = 0; i < left; ++i) store(lanes[i], vectors[i]);
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) sums[i] = lanes[i % left][N > width ? i / left : i * (width / N)];
}

// --- The product with a transpose ------------------------------------------------------------

// All of a product, or its elements at and below the diagonal; what is above them is then undefined.
enum class Wanted { all, lower };

// So many sums are held in registers: where there are enough of these, as many as a vector has lanes.
#if defined(__AVX512F__)
constexpr i64 most_dots = 16;
#else
constexpr i64 most_dots = 8;
#endif

// P rows of A by Q of B, whose sums are held in registers while they go along the columns.
template <int P, int Q, class T>
void dot_block(Rows<const T> a, Rows<const T> b, i64 length, Rows<T> out, bool accumulate) {
  Vec<T> sums[P * Q] = {};
  for (i64 n = 0; n < length; n += Simd<T>::width) {
    Vec<T> as[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) as[p] = load(a[p] + n);
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      const Vec<T> bs = load(b[q] + n);
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) sums[p * Q + q] += as[p] * bs;
    }
  }
  T totals[P * Q];
  sum_lanes<T, P * Q>(sums, totals);
  for (int p = 0; p < P; ++p) {
    for (int q = 0; q < Q; ++q) out[p][q] = (accumulate ? out[p][q] : T(0)) + totals[p * Q + q];
  }
}

// Elements one by one, each the sum of a product along the columns: for few rows.
template <int P, class T>
void dot_rows(i64 first, i64 columns, Rows<const T> a, Rows<const T> b, i64 length, Rows<T> out,
              bool accumulate, Wanted wanted) {
  const i64 end = wanted == Wanted::lower && first + P < columns ? first + P : columns;
  const Rows<const T> rows{a[first], a.stride};
  i64 q = 0;
  const auto blocks = [&](auto together) {
    constexpr int Q = int(decltype(together){});
    for (; q + Q <= end; q += Q)
      dot_block<P, Q, T>(rows, {b[q], b.stride}, length, {out[first] + q, out.stride}, accumulate);
  };
  if constexpr (most_dots > 8) blocks(Constant<most_dots / P>{});
  blocks(Constant<8 / P>{});
  blocks(Constant<1>{});
}

template <class T>
void multiply_by_dots(i64 rows, Rows<const T> a, i64 columns, Rows<const T> b, i64 length, Rows<T> out,
                      bool accumulate, Wanted wanted) {
  i64 p = 0;
  for (; p + 4 <= rows; p += 4) dot_rows<4>(p, columns, a, b, length, out, accumulate, wanted);
  for (; p + 2 <= rows; p += 2) dot_rows<2>(p, columns, a, b, length, out, accumulate, wanted);
  for (; p < rows; ++p) dot_rows<1>(p, columns, a, b, length, out, accumulate, wanted);
}

// to_n[q] = from_q[n] for n < length, and zero for q from `rows` to the next multiple of the vector width.
// Rows of `from` are read up to such a multiple.
template <class T>
void transpose(i64 rows, Rows<const T> from, i64 length, Rows<T> to) {
  constexpr i64 width = Simd<T>::width;
  for (i64 q = 0; q < rows; q += width) {
    for (i64 n = 0; n < length; n += width) {
      Vec<T> square[width];
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) square[i] = q + i < rows ? load(from[q + i] + n) : Vec<T>{};
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < width; ++i) {
        if (n + i < length) store(to[n + i] + q, square[i]);
      }
    }
  }
}

// Whether B is left as it is: for want of rows that would share the work, or because much of the last vector
// of its transpose would be padding, where sums of dots are as fast as the microkernel.
template <class T>
bool multiplies_by_dots(i64 rows, i64 columns) {
  constexpr i64 width = Simd<T>::width, step = 2 * width;
  if (columns < width || rows < width / 2 || (columns <= step && rows <= step)) return true;
  return most_dots > 8 && 10 * columns < 9 * round_up<T>(columns);
}

// out (rows x columns) (+)= A Bᵀ, with A (rows x length) and B (columns x length). Where both have rows
// enough B is transposed on the way, a work that A's rows share: let B be the one of fewer. out's rows hold
// round_up(columns) elements.
template <class T>
void multiply_by_transpose(i64 rows, Rows<const T> a, i64 columns, Rows<const T> b, i64 length, Rows<T> out,
                           bool accumulate, Wanted wanted = Wanted::all) {
  constexpr i64 step = 2 * Simd<T>::width;
  if (multiplies_by_dots<T>(rows, columns))
    return multiply_by_dots(rows, a, columns, b, length, out, accumulate, wanted);
  alignas(64) T transposed[depth_block * step];
  for (i64 n = 0; n < length; n += depth_block) {
    const i64 depth = length - n < depth_block ? length - n : depth_block;
    for (i64 q = 0; q < columns; q += step) {
      const i64 count = columns - q < step ? columns - q : step, first = wanted == Wanted::lower ? q : 0;
      const i64 vectors = round_up<T>(count);
      transpose<T>(count, {b[q] + n, b.stride}, depth, {transposed, vectors});
      multiply<T>(Weights<T>::in_place(a[first] + n, rows - first, depth, a.stride, 1), {transposed, vectors},
                  {out[first] + q, out.stride}, vectors, {accumulate || n > 0});
    }
  }
}

// What lies above the diagonal, from below it.
template <class T>
void mirror(i64 rows, Rows<T> out) {
  for (i64 p = 0; p < rows; ++p) {
    for (i64 q = p + 1; q < rows; ++q) out[p][q] = out[q][p];
  }
}

// Compiled once, in product.cpp.
#define FK_PRODUCT(keyword, T)                                                                               \
  keyword template Weights<T> Weights<T>::pack<T>(const T*, i64, i64, i64, i64, T*);                         \
  keyword template void multiply<T>(const Weights<T>&, Rows<const T>, Rows<T>, i64, Start<T>);               \
  keyword template void multiply_by_transpose<T>(i64, Rows<const T>, i64, Rows<const T>, i64, Rows<T>, bool, \
                                                 Wanted);
FK_PRODUCT(extern, float)
FK_PRODUCT(extern, double)

}  // namespace FK_ISA
}  // namespace factorizer
