// sw_matricize and sw_dematricize on the CPU: a permutation for each shift, and its inverse.
#include <cstdint>
#include <type_traits>

#include "cpu/common/parallel.h"
#include "cpu/common/storage.h"
#include "cpu/windows/strips.h"

namespace factorizer {
namespace FK_ISA {
namespace {

// One row of windows along the last axis is what a task copies.
Strip row_of_windows(const Windows& w, i64 task, i64 shift) {
  Strip s{};
  s.shift = shift;
  s.grid[1] = split(task, w.grid[1]);
  s.grid[0] = split(task, w.grid[0]);
  s.bh = task;
  s.num_windows = w.grid[2];
  s.num_lines = w.patch[0] * w.patch[1];
  s.num_voxels = w.patch[2];
  return s;
}

// z[window][channel] = x, whose elements are as long as R's.
template <class R>
void copy_windows(const Matricize& p, const Strip& strip, R* z) {
  const Windows& w = p.windows;
  each_pair(w, strip, head_of<const R>(p.x, w, strip.bh), Rows<R>{z, w.columns()}, w.head_dim * w.columns(),
            [](const R* from, R* to, auto length, auto step) {
              transform(length, from, step, to, [](R element) { return element; });
            });
}

template <class T, class S>
void matricize(const Matricize& p) {
  using R = std::conditional_t<sizeof(S) == 2, std::uint16_t, S>;
  const Windows& w = p.windows;
  const i64 rows_per_shift = w.batch * w.heads * w.grid[0] * w.grid[1];
  parallel_for(w.num_shifts * rows_per_shift, p.threads, [&](i64 task, int) {
    const Strip strip = row_of_windows(w, task % rows_per_shift, task / rows_per_shift);
    const i64 first = matrix_index(w, strip, 0, w.batch * w.heads) * w.head_dim * w.columns();
    S* const z = static_cast<S*>(p.z) + first;
    copy_windows<R>(p, strip, static_cast<R*>(p.z) + first);
    if (p.scale == 1.0) return;
    for (i64 i = 0; i < strip.num_windows * w.head_dim * w.columns(); ++i) {
      z[i] = Storage<S>::from(T(p.scale) * to_compute(z[i]));
    }
  });
}

// Every voxel of x is the sum of its copies, in the order of the shifts, in the arithmetic's type.
template <class T, class S>
void dematricize(const Matricize& p) {
  const Windows& w = p.windows;
  const S* z = static_cast<const S*>(p.z);
  const T scale = T(p.scale);
  const i64 lines = w.size[0] * w.size[1];
  parallel_for(w.batch * w.heads * lines, p.threads, [&](i64 task, int) {
    const i64 bh = task / lines, i1 = task % lines / w.size[1], i2 = task % w.size[1];
    const Head<S> x = head_of<S>(p.x, w, bh);
    constexpr i64 block = 256;
    for (i64 c = 0; c < w.head_dim; ++c) {
      for (i64 begin = 0; begin < w.size[2]; begin += block) {
        T sums[block] = {};
        const i64 count = w.size[2] - begin < block ? w.size[2] - begin : block;
        for (i64 shift = 0; shift < w.num_shifts; ++shift) {
          const i64* by = w.shifts + 3 * shift;
          const i64 q1 = (i1 + by[0]) % w.size[0], q2 = (i2 + by[1]) % w.size[1];
          const i64 row =
              ((shift * w.batch * w.heads + bh) * w.grid[0] + q1 / w.patch[0]) * w.grid[1] + q2 / w.patch[1];
          const i64 line = (q1 % w.patch[0] * w.patch[1] + q2 % w.patch[1]) * w.patch[2];
          i64 q3 = (begin + by[2]) % w.size[2];
          for (i64 n = 0; n < count;) {
            const i64 voxel = q3 % w.patch[2], matrix = row * w.grid[2] + q3 / w.patch[2];
            i64 run = w.patch[2] - voxel;
            if (run > count - n) run = count - n;
            const S* from = z + (matrix * w.head_dim + c) * w.columns() + line + voxel;
            for (i64 i = 0; i < run; ++i) sums[n + i] += to_compute(from[i]);
            n += run;
            q3 += run;
            if (q3 == w.size[2]) q3 = 0;
          }
        }
        S* to = x.at(c, i1, i2, begin);
        for (i64 i = 0; i < count; ++i) to[i * x.stride[2]] = Storage<S>::from(scale * sums[i]);
      }
    }
  });
}

}  // namespace

void sw_matricize(const Matricize& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    matricize<typename Storage<S>::Compute, S>(p);
  });
}

void sw_dematricize(const Matricize& p) {
  with_storage(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    dematricize<typename Storage<S>::Compute, S>(p);
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
