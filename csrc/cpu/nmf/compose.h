// y from the factors: at every voxel the mean over the shifts of u v, composed line by line, each voxel once.
#pragma once

#include "cpu/common/cache.h"
#include "cpu/common/parallel.h"
#include "cpu/nmf/plan.h"
#include "cpu/nmf/volumes.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

constexpr i64 line_block = 16384;                    // elements of y that one task writes
constexpr i64 spread_bytes = first_level_bytes / 2;  // of u along a line
constexpr i64 most_terms = 8;                        // of y that are added up in registers

// Where the factors of a chunk of heads go: u of every matrix to `u`, in the matrices' order from the chunk's
// first on; v likewise, or, for composing y, voxel by voxel to maps (head, shift, rank, voxels). Null:
// nowhere, each matrix' product goes to y at once.
template <class T>
struct FactorsOut {
  T* u = nullptr;
  T* v = nullptr;
  bool maps = false;

  T* u_of(i64 matrix, i64 size) const { return u == nullptr ? nullptr : u + matrix * size; }
  T* v_of(i64 matrix, i64 size) const { return v == nullptr ? nullptr : v + matrix * size; }

  Head<T> map(const Windows& w, i64 rank, i64 shift, i64 bh) const {
    return contiguous_head(v + (bh * w.num_shifts + shift) * rank * w.voxels(), w);
  }
};

// Calls f(matrix, n, run) for the voxels [begin, begin + length) of line (i1, i2), run by run that lies in
// one window of a copy: `run` voxels from begin + n on. Matrices are counted within the chunk.
template <class F>
FK_INLINE void each_run(const Windows& w, i64 shift, i64 bh, i64 num_bh, i64 i1, i64 i2, i64 begin,
                        i64 length, F&& f) {
  const i64* by = w.shifts + 3 * shift;
  i64 cell[3] = {i1, i2, begin};
  i64 left = 0;
  for (int axis = 0; axis < 3; ++axis) {
    cell[axis] = wrap(cell[axis] + by[axis] - w.size[axis], w.size[axis]);
    left = w.patch[axis] - split(cell[axis], w.patch[axis]);
  }
  const i64 first = (((shift * num_bh + bh) * w.grid[0] + cell[0]) * w.grid[1] + cell[1]) * w.grid[2];
  i64 window = cell[2];
  for (i64 n = 0; n < length;) {
    const i64 run = left < length - n ? left : length - n;
    f(first + window, n, run);
    n += run;
    left = w.patch[2];
    if (++window == w.grid[2]) window = 0;
  }
}

// Whether a piece of a line lies in one window of every copy.
inline bool within_windows(const Windows& w, i64 begin, i64 length) {
  for (i64 shift = 0; shift < w.num_shifts; ++shift) {
    i64 window = begin + w.shifts[3 * shift + 2];  // of a map that has whole ones, so it need not be wrapped
    if (split(window, w.patch[2]) + length > w.patch[2]) return false;
  }
  return true;
}

// to[k] = scale * u[k] at each of `length` voxels, k < rows.
template <class Length, class T>
FK_INLINE void spread_along(Length length, T scale, const T* u, Rows<T> to, i64 rows) {
  for (i64 k = 0; k < rows; ++k) {
    const T value = scale * u[k];
    each_block<T>(length, [&](auto voxels, i64 i) { voxels.store(to[k] + i, voxels.fill(value)); });
  }
}

// out[c] (+)= sum_k u(k, c) v[k] along a line, for k < terms <= most_terms.
template <class Terms, class T, class U>
void compose_line(Terms terms, i64 rows, i64 length, U u, Rows<const T> v, Rows<T> out, bool accumulate) {
  each_block<T>(length, [&](auto voxels, i64 i) {
    decltype(voxels.load(out.data)) vs[most_terms];
    for (i64 k = 0; k < terms; ++k) vs[k] = voxels.load(v[k] + i);
    for (i64 c = 0; c < rows; ++c) {
      auto sum = u(voxels, 0, c, i) * vs[0];
      for (i64 k = 1; k < terms; ++k) sum += u(voxels, k, c, i) * vs[k];
      voxels.store(out[c] + i, accumulate ? voxels.load(out[c] + i) + sum : sum);
    }
  });
}

// y of a chunk of heads from its factors: at every voxel the mean over the shifts of u v, a sum of shifts x
// rank terms. u is spread along a piece of a line, so that composing it knows no windows, and kept while the
// rows of windows stay the same; inside of long windows it is one number.
template <class T>
void compose_chunk(const SwinNMF& p, const Chunk& chunk, int threads, const FactorsOut<T>& factors) {
  const Windows& w = p.windows;
  const i64 rows = w.head_dim, rank = p.options.rank, terms = w.num_shifts * rank;
  const T scale = T(1) / T(w.num_shifts);
  const bool direct = element(p.dtype) == sizeof(T);
  constexpr i64 shortest = 64;
  i64 segment = spread_bytes / (terms * rows * i64(sizeof(T))) / shortest * shortest;
  segment = segment < shortest ? shortest : segment;
  segment = segment < w.size[2] ? segment : w.size[2];
  const i64 segments = (w.size[2] + segment - 1) / segment;
  i64 lines = line_block / rows / segment;
  lines = lines < 1 ? 1 : lines < w.size[1] ? lines : w.size[1];
  const i64 blocks = (w.size[1] + lines - 1) / lines;
  const i64 stride = round_up<T>(segment);
  const i64 spread_size = terms * rows * stride, buffer_size = spread_size + rows * stride;
  const Scratch scratch(threads * buffer_size * sizeof(T));
  parallel_for(chunk.count * segments * w.size[0] * blocks, threads, [&](i64 task, int worker) {
    const i64 block = split(task, blocks) * lines, i1 = split(task, w.size[0]);
    const i64 begin = split(task, segments) * segment, bh = task;
    const i64 length = w.size[2] - begin < segment ? w.size[2] - begin : segment;
    T* const spread = static_cast<T*>(scratch.data()) + worker * buffer_size;  // (term, row, voxel)
    const Rows<T> line{spread + spread_size, stride};
    bool in_one_window = false;
    for (i64 i2 = block; i2 < block + lines && i2 < w.size[1]; ++i2) {
      in_one_window = i2 > block ? in_one_window : within_windows(w, begin, length);
      for (i64 shift = 0; shift < w.num_shifts; ++shift) {
        i64 window = i2 + w.shifts[3 * shift + 1];
        const bool same_windows = split(window, w.patch[1]) != 0 && i2 > block;
        if (same_windows) continue;
        each_run(w, shift, bh, chunk.count, i1, i2, begin, length, [&](i64 matrix, i64 n, i64 run) {
          with_length(in_one_window ? 1 : run, [&](auto count) {
            spread_along(count, scale, factors.u + matrix * rank * rows,
                         {spread + shift * rank * rows * stride + n, stride}, rank * rows);
          });
        });
      }
      const i64 place = (i1 * w.size[1] + i2) * w.size[2] + begin;
      auto compose = [&](Rows<T> out) {
        for (i64 first = 0; first < terms; first += most_terms) {
          const i64 count = terms - first < most_terms ? terms - first : most_terms;
          const Rows<const T> v{factors.v + (bh * terms + first) * w.voxels() + place, w.voxels()};
          const T* us = spread + first * rows * stride;
          with_small(count, [&](auto count) {
            if (in_one_window) {
              auto u = [=](auto voxels, i64 k, i64 c, i64) {
                return voxels.fill(us[(k * rows + c) * stride]);
              };
              compose_line(count, rows, length, u, v, out, first > 0);
            } else {
              auto u = [=](auto voxels, i64 k, i64 c, i64 i) {
                return voxels.load(us + (k * rows + c) * stride + i);
              };
              compose_line(count, rows, length, u, v, out, first > 0);
            }
          });
        }
      };
      const i64 y = (chunk.begin + bh) * rows * w.voxels() + place;
      compose(direct ? Rows<T>{static_cast<T*>(p.y) + y, w.voxels()} : line);
      for (i64 c = 0; !direct && c < rows; ++c) {
        round_to<T>(p.dtype, line[c], length, p.y, y + c * w.voxels());
      }
    }
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
