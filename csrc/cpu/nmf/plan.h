// How a volume is worked on: in chunks of heads, each in strips of whole windows or, where a window is too
// large for the cache, matrix by matrix.
#pragma once

#include "cpu/common/cache.h"
#include "cpu/common/memory.h"
#include "cpu/common/parallel.h"
#include "cpu/windows/strips.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

constexpr i64 window_limit = second_level_bytes;         // of a window that is worked on whole
constexpr i64 strip_bytes = second_level_bytes * 5 / 8;  // several windows side by side, and room beside them
constexpr i64 chunk_bytes = last_level_bytes;            // of x, between the two steps
constexpr i64 serial_elements = 32768;                   // below that, threads cost more than they bring

// How one chunk of heads is cut into strips of whole windows.
struct StripPlan {
  i64 per_strip, strips_per_row, count;

  template <class T>
  static StripPlan make(const Windows& w, i64 heads, i64 shifts) {
    StripPlan plan;
    const i64 bytes = w.head_dim * row_stride<T>(w.columns()) * i64(sizeof(T));
    plan.per_strip = strip_bytes / bytes < 1           ? 1
                     : strip_bytes / bytes < w.grid[2] ? strip_bytes / bytes
                                                       : w.grid[2];
    plan.strips_per_row = (w.grid[2] + plan.per_strip - 1) / plan.per_strip;
    plan.count = heads * w.grid[0] * w.grid[1] * plan.strips_per_row * shifts;
    return plan;
  }

  // The shift runs fastest, so that the copies of a place are read while it is in cache.
  Strip strip(const Windows& w, i64 task, i64 bh_begin, i64 shifts, i64 first_shift) const {
    Strip s{};
    s.shift = first_shift + split(task, shifts);
    s.window = split(task, strips_per_row) * per_strip;
    s.grid[1] = split(task, w.grid[1]);
    s.grid[0] = split(task, w.grid[0]);
    s.bh = bh_begin + task;
    s.num_windows = w.grid[2] - s.window < per_strip ? w.grid[2] - s.window : per_strip;
    s.num_lines = w.patch[0] * w.patch[1];
    s.num_voxels = w.patch[2];
    return s;
  }
};

inline Strip whole_window(const Windows& w, i64 shift, i64 bh, i64 window) {
  Strip s{};
  s.shift = shift;
  s.bh = bh;
  s.window = split(window, w.grid[2]);
  s.grid[1] = split(window, w.grid[1]);
  s.grid[0] = window;
  s.num_windows = 1;
  s.num_lines = w.patch[0] * w.patch[1];
  s.num_voxels = w.patch[2];
  return s;
}

inline bool windows_fit(const Windows& w, i64 element) {
  return w.head_dim * w.columns() * element <= window_limit;
}

inline i64 heads_per_chunk(const Windows& w, i64 element) {
  const i64 total = w.batch * w.heads;
  const i64 bytes = w.head_dim * w.voxels() * element;
  const i64 heads = bytes > 0 ? chunk_bytes / bytes : total;
  return heads < 1 ? 1 : heads < total ? heads : total;
}

inline int threads_for(const SwinNMF& p) {
  const Windows& w = p.windows;
  return w.num_shifts * w.num_elements() < serial_elements ? 1 : p.threads;
}

// Consecutive (batch, head) pairs, which are worked on together.
struct Chunk {
  i64 begin, count;
};

// Calls f(chunk) for chunks of at most `most` heads, one after the other.
template <class F>
void each_chunk(const Windows& w, i64 most, F&& f) {
  const i64 heads = w.batch * w.heads;
  for (i64 begin = 0; begin < heads; begin += most) {
    f(Chunk{begin, heads - begin < most ? heads - begin : most});
  }
}

// Every worker's memory for strips of whole windows: a solver's, the strip of x, and one more for what
// becomes of it (`other` elements).
template <class T>
class StripMemory {
 public:
  StripMemory(const Windows& w, i64 per_strip, i64 solver_bytes, i64 other, int workers)
      : stride_(row_stride<T>(w.columns())),
        window_stride_(w.head_dim * stride_),
        solver_bytes_(solver_bytes),
        x_bytes_(lines_of(per_strip * window_stride_)),
        bytes_(solver_bytes_ + x_bytes_ + lines_of(other)),
        scratch_(workers * bytes_) {}

  i64 window_stride() const { return window_stride_; }
  void* solver(int worker) const { return at(worker, 0); }
  Rows<T> x(int worker) const { return {reinterpret_cast<T*>(at(worker, solver_bytes_)), stride_}; }
  T* other(int worker) const { return reinterpret_cast<T*>(at(worker, solver_bytes_ + x_bytes_)); }

 private:
  static i64 lines_of(i64 count) { return (count * i64(sizeof(T)) + 63) / 64 * 64; }
  char* at(int worker, i64 byte) const {
    return static_cast<char*>(scratch_.data()) + worker * bytes_ + byte;
  }

  const i64 stride_, window_stride_, solver_bytes_, x_bytes_, bytes_;
  const Scratch scratch_;
};

template <class T>
void clear_window_padding(const Windows& w, i64 num_windows, Rows<T> buffer, i64 window_stride) {
  for (i64 k = 0; k < num_windows; ++k) {
    clear_padding<T>(w.head_dim, {buffer.data + k * window_stride, buffer.stride}, w.columns(),
                     round_up<T>(w.columns()));
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
