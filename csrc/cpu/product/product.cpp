// Whole products with long columns, by tiles of these (product.h), on several threads.
//
// A tile whose rows are far apart, or of another storage type, is first copied to where they are not:
// channels of a volume may lie a power of two apart, in one set of the cache. Elements of y do not depend on
// how the work is cut, so it is cut as the threads like it: by columns, the batch and rows. The sums of a bᵀ
// are formed section by section, whatever the threads, and added in the sections' order.
#include "cpu/common/product.h"
#include "cpu/common/cache.h"

#include <type_traits>

#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/common/storage.h"
#include "problems/product.h"

namespace factorizer {
namespace FK_ISA {

FK_PRODUCT(, float)
FK_PRODUCT(, double)

namespace {

constexpr i64 prefetched_rows = 8;
constexpr i64 serial_operations = i64(1) << 18;  // below that, threads cost more than they bring

// The rows from one on.
template <class S>
Columns rows_from(const Columns& c, i64 row) {
  return {static_cast<S*>(c.data) + row * c.row, c.batch, c.row};
}

// A tile of some rows: where it lies, if it can be worked on there, else copied to `buffer`, zero in the
// padding. next: how many rows will be read after these.
template <class T, class S>
Rows<const T> read_tile(const Columns& from, i64 batch, i64 rows, i64 begin, i64 valid, bool in_place,
                        Rows<T> buffer, i64 next = 0) {
  const S* first = static_cast<const S*>(from.data) + batch * from.batch + begin;
  const i64 length = round_up<T>(valid);
  if constexpr (std::is_same_v<S, T>) {
    if (in_place && length == valid) return {first, from.row};
  }
  for (i64 r = 0; r < rows; ++r) {
    const S* row = first + r * from.row;
    if (r + prefetched_rows < rows + next)
      prefetch(row, prefetched_rows * from.row * i64(sizeof(S)), valid * i64(sizeof(S)));
    transform(valid, row, Constant<1>{}, buffer[r], [](S x) { return T(to_compute(x)); });
  }
  clear_padding(rows, buffer, valid, length);
  return buffer;
}

template <class T, class S>
void write_tile(Rows<const T> from, i64 rows, i64 begin, i64 valid, const Columns& to, i64 batch) {
  for (i64 r = 0; r < rows; ++r) {
    S* row = static_cast<S*>(to.data) + batch * to.batch + r * to.row + begin;
    transform(valid, from[r], Constant<1>{}, row, [](T value) { return Storage<S>::from(value); });
  }
}

// Columns of a tile whose `rows` rows take half of the second-level cache.
template <class T>
i64 tile_columns(i64 rows) {
  constexpr i64 least = 64, most = 1024;
  const i64 fit = product_bytes / 2 / (rows * i64(sizeof(T))) / least * least;
  return fit < least ? least : fit < most ? fit : most;
}

template <class T, class S>
void multiply_all(const Multiply& p) {
  if (p.batch == 0 || p.rows == 0 || p.columns == 0) return;
  const int threads = p.batch * p.columns * p.rows * (p.depth + 1) < serial_operations ? 1 : p.threads;
  const Parts tiles = Parts::of((p.columns + Simd<T>::width - 1) / Simd<T>::width,
                                tile_columns<T>(p.depth + p.rows) / Simd<T>::width);
  // Rows are shared out where there are too few tiles for that.
  const i64 panels = panels_of(p.rows, p.depth).count, wanted = 2 * threads / (p.batch * tiles.count);
  const Parts groups = Parts::of(p.rows, (p.rows + 1) / (wanted < 1 ? 1 : wanted < panels ? wanted : panels));
  const bool x_in_place = p.rows <= 2 * max_height;
  const i64 stride = row_stride<T>(tiles.largest() * Simd<T>::width);

  const bool packs = p.batch * tiles.count > 1;
  const Scratch packed(packs ? Weights<T>::packed_size(p.rows, p.depth) * sizeof(T) : 0);
  const T* w = static_cast<const T*>(p.w);
  // By groups, since the rows of a panel belong to one of them, and by blocks of the depth.
  const Parts blocks = Parts::of(p.depth, depth_block);
  parallel_for(packs ? groups.count * blocks.count : 0, threads, [&](i64 task, int) {
    const i64 group = task / blocks.count, first = groups.begin(group), rows = groups.size(group);
    const i64 block = task % blocks.count, k = blocks.begin(block);
    Weights<T>::pack(w + first * p.w_row + k * p.w_column, rows, blocks.size(block), p.w_row, p.w_column,
                     static_cast<T*>(packed.data()) + first * p.depth + k * rows);
  });
  const i64 buffer_size = (p.depth + groups.largest()) * stride;
  const Scratch buffers(threads * buffer_size * sizeof(T));
  parallel_for(p.batch * tiles.count * groups.count, threads, [&](i64 task, int worker) {
    const i64 group = task % groups.count, tile = task / groups.count % tiles.count;
    const i64 batch = task / groups.count / tiles.count;
    const i64 begin = tiles.begin(tile) * Simd<T>::width, end = begin + tiles.size(tile) * Simd<T>::width;
    const i64 valid = (end < p.columns ? end : p.columns) - begin, length = round_up<T>(valid);
    const Rows<T> buffer{static_cast<T*>(buffers.data()) + worker * buffer_size, stride};
    const Rows<const T> x = read_tile<T, S>(p.x, batch, p.depth, begin, valid, x_in_place, buffer);

    const i64 first = groups.begin(group), rows = groups.size(group);
    const Weights<T> weights =
        packs ? Weights<T>{static_cast<const T*>(packed.data()) + first * p.depth, rows, p.depth, 1, 0, true}
              : Weights<T>::in_place(w + first * p.w_row, rows, p.depth, p.w_row, p.w_column);
    const Columns y = rows_from<S>(p.y, first);
    if constexpr (std::is_same_v<S, T>) {
      if (length == valid)
        return multiply<T>(weights, x, {static_cast<T*>(y.data) + batch * y.batch + begin, y.row}, length);
    }
    const Rows<T> out{buffer.data + p.depth * stride, stride};
    multiply<T>(weights, x, out, length);
    write_tile<T, S>(out, rows, begin, valid, y, batch);
  });
}

// What one worker of a product with a transpose needs for a tile of columns, and the tile's share of the
// sums. Strips of B's rows are transposed, all of them before A's rows go by in blocks that stay in cache; a
// product of few rows is formed of dots (product.h).
template <class T, class S>
class TransposeTile {
 public:
  // rows: the most of A's that are asked for.
  TransposeTile(const MultiplyByTranspose& p, i64 rows, Arena& arena)
      : p_(p),
        by_dots_(multiplies_by_dots<T>(p.rows, p.depth)),
        in_place_(p.depth <= strip),  // A is read once, and B a few times
        block_(rows < most_rows ? rows : most_rows),
        a_(arena.take<T>(block_ * stride)),
        b_(arena.take<T>((by_dots_ ? p.depth : strip) * stride)),
        transposed_(arena.take<T>(by_dots_ ? 0 : round_up<T>(p.depth) * depth_block)) {}

  // out (+)= rows [first, + rows) of A Bᵀ, of the columns from `begin` on.
  void add(i64 batch, i64 begin, i64 first, i64 rows, Rows<T> out, bool accumulate) const {
    const i64 valid = p_.columns - begin < depth_block ? p_.columns - begin : depth_block;
    const i64 length = round_up<T>(valid);
    const auto read_block = [&](i64 r, i64 height) {
      return read(p_.a, first + r, height, batch, begin, valid, {a_, stride}, rows - r - height);
    };
    if (by_dots_) {
      const Rows<const T> b = read(p_.b, 0, p_.depth, batch, begin, valid, {b_, stride}, 0);
      return each(rows, block_, [&](i64 r, i64 height) {
        const Rows<const T> a = read_block(r, height);
        multiply_by_dots<T>(height, a, p_.depth, b, length, {out[r], out.stride}, accumulate, Wanted::all);
      });
    }
    each(p_.depth, strip, [&](i64 q, i64 count) {
      const Rows<const T> b = read(p_.b, q, count, batch, begin, valid, {b_, stride}, p_.depth - q - count);
      transpose<T>(count, b, length, strip_at(q, count));
    });
    each(rows, block_, [&](i64 r, i64 height) {
      const Rows<const T> a = read_block(r, height);
      const Weights<T> weights = Weights<T>::in_place(a.data, height, length, a.stride, 1);
      each(p_.depth, strip, [&](i64 q, i64 count) {
        multiply<T>(weights, strip_at(q, count), {out[r] + q, out.stride}, round_up<T>(count), {accumulate});
      });
    });
  }

 private:
  static constexpr i64 most_rows = 128, strip = 2 * Simd<T>::width;
  static constexpr i64 stride = row_stride<T>(depth_block);

  // f(begin, size) for pieces of at most `most`.
  template <class F>
  static void each(i64 total, i64 most, F&& f) {
    for (i64 begin = 0; begin < total; begin += most) f(begin, most < total - begin ? most : total - begin);
  }
  Rows<T> strip_at(i64 q, i64 count) const { return {transposed_ + q * depth_block, round_up<T>(count)}; }
  Rows<const T> read(const Columns& from, i64 first, i64 rows, i64 batch, i64 begin, i64 valid, Rows<T> to,
                     i64 next) const {
    return read_tile<T, S>(rows_from<S>(from, first), batch, rows, begin, valid, in_place_, to, next);
  }

  const MultiplyByTranspose& p_;
  const bool by_dots_, in_place_;
  const i64 block_;
  T *a_, *b_, *transposed_;
};

template <class T, class S>
void multiply_all_by_transpose(const MultiplyByTranspose& p) {
  constexpr i64 least_tiles = 4, most_sections = 64, most_bytes = i64(64) << 20, least_rows = 32;
  if (p.rows == 0 || p.depth == 0) return;
  const int threads = p.batch * p.columns * p.rows * p.depth < serial_operations ? 1 : p.threads;
  const i64 tiles = (p.columns + depth_block - 1) / depth_block, all_tiles = p.batch * tiles;
  T* const out = static_cast<T*>(p.out);
  const i64 sum_stride = row_stride<T>(p.depth);
  const i64 bytes = p.rows * sum_stride * i64(sizeof(T));
  i64 most = most_bytes / bytes < most_sections ? most_bytes / bytes : most_sections;
  if (most * least_tiles > all_tiles) most = all_tiles / least_tiles;
  const Parts sections = Parts::of(all_tiles, most > 1 ? (all_tiles + most - 1) / most : all_tiles);
  // Rows are shared out where there are few sections; each group transposes B for itself.
  const i64 tasks = sections.count == 1 ? threads : 2 * threads, most_groups = p.rows / least_rows;
  const i64 wanted = threads == 1 ? 1 : (tasks + sections.count - 1) / sections.count;
  const i64 cuts = wanted < most_groups ? wanted : most_groups;
  const Parts groups = Parts::of(p.rows, cuts > 1 ? (p.rows + cuts - 1) / cuts : p.rows);

  // The only share is the result, where its rows hold whole vectors.
  const bool direct = sections.count == 1 && all_tiles > 0 && round_up<T>(p.depth) == p.depth;
  Arena tile_count(nullptr), sum_count(nullptr);
  TransposeTile<T, S>(p, groups.largest(), tile_count);
  OrderedSums<T>(direct ? 0 : sections.count, p.rows * sum_stride, sum_count);
  const Scratch buffers(threads * tile_count.used()), memory(sum_count.used());
  Arena arena(memory.data());
  const OrderedSums<T> sums(direct ? 0 : sections.count, p.rows * sum_stride, arena);
  parallel_for(sections.count * groups.count, threads, [&](i64 task, int worker) {
    const i64 group = task % groups.count, section = task / groups.count, first = groups.begin(group);
    Arena buffer(static_cast<char*>(buffers.data()) + worker * tile_count.used());
    const TransposeTile<T, S> work(p, groups.largest(), buffer);
    const Rows<T> share = direct ? Rows<T>{out, p.depth} : Rows<T>{sums.share(section), sum_stride};
    for (i64 i = 0; i < sections.size(section); ++i) {
      const i64 tile = sections.begin(section) + i;
      work.add(tile / tiles, tile % tiles * depth_block, first, groups.size(group),
               {share[first], share.stride}, i > 0);
    }
  });
  parallel_for(direct ? 0 : p.rows, threads, [&](i64 row, int) {
    if (all_tiles == 0) return fill(out + row * p.depth, p.depth, T(0));
    sums.add(sections.count, row * sum_stride, p.depth, out + row * p.depth);
  });
}

}  // namespace

void multiply(const Multiply& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    multiply_all<typename Storage<S>::Compute, S>(p);
  });
}

void multiply_by_transpose(const MultiplyByTranspose& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    multiply_all_by_transpose<typename Storage<S>::Compute, S>(p);
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
