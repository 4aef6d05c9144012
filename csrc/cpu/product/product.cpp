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
namespace {

constexpr i64 prefetched_rows = 8;
constexpr i64 serial_operations = i64(1) << 18;  // below that, threads cost more than they bring

// A tile of some rows: where it lies, if it can be worked on there, else copied to `buffer`, zero in the
// padding.
template <class T, class S>
Rows<const T> read_tile(const Columns& from, i64 batch, i64 rows, i64 begin, i64 valid, bool in_place,
                        Rows<T> buffer) {
  const S* first = static_cast<const S*>(from.data) + batch * from.batch + begin;
  const i64 length = round_up<T>(valid);
  if constexpr (std::is_same_v<S, T>) {
    if (in_place && length == valid) return {first, from.row};
  }
  for (i64 r = 0; r < rows; ++r) {
    const S* row = first + r * from.row;
    if (r + prefetched_rows < rows)
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
  const i64 fit = second_level_bytes / 2 / (rows * i64(sizeof(T))) / least * least;
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
  // Group by group: the rows of a panel belong to one of them.
  parallel_for(packs ? groups.count : 0, threads, [&](i64 group, int) {
    const i64 first = groups.begin(group);
    Weights<T>::pack(w + first * p.w_row, groups.size(group), p.depth, p.w_row, p.w_column,
                     static_cast<T*>(packed.data()) + first * p.depth);
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
    const Columns y{static_cast<S*>(p.y.data) + first * p.y.row, p.y.batch, p.y.row};
    if constexpr (std::is_same_v<S, T>) {
      if (length == valid)
        return multiply<T>(weights, x, {static_cast<T*>(y.data) + batch * y.batch + begin, y.row}, length);
    }
    const Rows<T> out{buffer.data + p.depth * stride, stride};
    multiply<T>(weights, x, out, length);
    write_tile<T, S>(out, rows, begin, valid, y, batch);
  });
}

template <class T, class S>
void multiply_all_by_transpose(const MultiplyByTranspose& p) {
  constexpr i64 least_tiles = 4, most_sections = 64, most_bytes = i64(64) << 20;
  constexpr i64 least_tasks = 16, group_rows = 32;
  if (p.rows == 0 || p.depth == 0) return;
  const int threads = p.batch * p.columns * p.rows * p.depth < serial_operations ? 1 : p.threads;
  const i64 tiles = (p.columns + depth_block - 1) / depth_block, all_tiles = p.batch * tiles;
  const i64 out_stride = round_up<T>(p.depth);
  const i64 bytes = p.rows * out_stride * i64(sizeof(T));
  i64 most = most_bytes / bytes < most_sections ? most_bytes / bytes : most_sections;
  if (most * least_tiles > all_tiles) most = all_tiles / least_tiles;
  const Parts sections = Parts::of(all_tiles, most > 1 ? (all_tiles + most - 1) / most : all_tiles);
  // Rows are shared out where there are few sections, by the sizes alone: how a sum is formed depends on how
  // many rows there are beside it.
  const i64 wanted = (least_tasks + sections.count - 1) / sections.count, most_groups = p.rows / group_rows;
  const i64 cuts = wanted < most_groups ? wanted : most_groups;
  const Parts groups = Parts::of(p.rows, cuts > 1 ? (p.rows + cuts - 1) / cuts : p.rows);

  const i64 stride = row_stride<T>(depth_block);
  const bool in_place = p.depth <= 2 * Simd<T>::width;  // A is read once, and B a few times
  const i64 buffer_size = (groups.largest() + p.depth) * stride;
  const Scratch buffers(threads * buffer_size * sizeof(T));
  Arena count(nullptr);
  OrderedSums<T>(sections.count, p.rows * out_stride, count);
  const Scratch memory(count.used());
  Arena arena(memory.data());
  const OrderedSums<T> sums(sections.count, p.rows * out_stride, arena);
  parallel_for(sections.count * groups.count, threads, [&](i64 task, int worker) {
    const i64 group = task % groups.count, section = task / groups.count;
    const i64 first = groups.begin(group), rows = groups.size(group);
    const Rows<T> share{sums.share(section) + first * out_stride, out_stride};
    const Rows<T> a_buffer{static_cast<T*>(buffers.data()) + worker * buffer_size, stride};
    const Rows<T> b_buffer{a_buffer[groups.largest()], stride};
    const Columns a{static_cast<S*>(p.a.data) + first * p.a.row, p.a.batch, p.a.row};
    for (i64 i = 0; i < sections.size(section); ++i) {
      const i64 tile = sections.begin(section) + i, batch = tile / tiles, begin = tile % tiles * depth_block;
      const i64 valid = p.columns - begin < depth_block ? p.columns - begin : depth_block;
      const Rows<const T> a_tile = read_tile<T, S>(a, batch, rows, begin, valid, in_place, a_buffer);
      const Rows<const T> b_tile = read_tile<T, S>(p.b, batch, p.depth, begin, valid, in_place, b_buffer);
      multiply_by_transpose<T>(rows, a_tile, p.depth, b_tile, round_up<T>(valid), share, i > 0);
    }
  });
  T* out = static_cast<T*>(p.out);
  parallel_for(p.rows, threads, [&](i64 row, int) {
    if (all_tiles == 0) return fill(out + row * p.depth, p.depth, T(0));
    sums.add(sections.count, row * out_stride, p.depth, out + row * p.depth);
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
