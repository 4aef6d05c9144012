// Reading and writing (shifted) windows of a volume.
//
// A strip is what is copied at once: consecutive windows along the last axis, whose voxels lie side by side
// in memory, and of each window some lines (a line: the voxels of one window along the last axis). Windows
// too large for the cache are cut into strips of some of their lines, or of a part of one line.
#pragma once

#include <limits>
#include <type_traits>

#include "common/scalar_types.h"
#include "cpu/common/cache.h"
#include "cpu/common/rows.h"
#include "problems/windows.h"

namespace factorizer {
namespace FK_ISA {

struct Strip {
  i64 shift, bh;            // which copy; batch * heads + head
  i64 grid[2];              // the windows' position along the first two axes
  i64 window, num_windows;  // along the last axis
  i64 line, num_lines;      // of each window
  i64 voxel, num_voxels;    // of each line
};

// The place of a strip's windows in the order of matrices: shift, (batch, head), grid.
inline i64 matrix_index(const Windows& w, const Strip& s, i64 bh_begin, i64 num_bh) {
  const i64 window = (s.grid[0] * w.grid[1] + s.grid[1]) * w.grid[2] + s.window;
  return (s.shift * num_bh + s.bh - bh_begin) * w.num_windows() + window;
}

inline i64 wrap(i64 index, i64 size) { return index < 0 ? index + size : index; }

// Calls f(channel, offsets, column) for every `Group` lines of a strip, which has a multiple of them: where
// they lie in their channel, for the strides of the first two axes, and the first one's columns in the strip.
template <i64 Group, class F>
inline void each_lines(const Windows& w, const Strip& s, const i64 (&stride)[3], F&& f) {
  const i64* shift = w.shifts + 3 * s.shift;
  i64 plane = s.line;
  const i64 line_of_plane = split(plane, w.patch[1]);
  const i64 first_plane = wrap(s.grid[0] * w.patch[0] + plane - shift[0], w.size[0]);
  const i64 first_line = wrap(s.grid[1] * w.patch[1] - shift[1], w.size[1]);
  const i64 patch = w.patch[1], size[2] = {w.size[0], w.size[1]};
  const i64 step[2] = {stride[0], stride[1]};
  for (i64 channel = 0; channel < w.head_dim; ++channel) {
    i64 i1 = first_plane, p2 = line_of_plane;
    i64 i2 = first_line + p2 < size[1] ? first_line + p2 : first_line + p2 - size[1];
    for (i64 line = 0; line < s.num_lines; line += Group) {
      i64 offsets[Group];
      for (i64 k = 0; k < Group; ++k) {
        offsets[k] = i1 * step[0] + i2 * step[1];
        if (++p2 == patch) {
          p2 = 0;
          i2 = first_line;
          i1 = i1 + 1 == size[0] ? 0 : i1 + 1;
        } else {
          i2 = i2 + 1 == size[1] ? 0 : i2 + 1;
        }
      }
      f(channel, offsets, line * s.num_voxels);
    }
  }
}

// The pieces of a strip's lines along the last axis: a window's voxels, whole, but for one window that the
// volume's end may cut in two.
class Pieces {
 public:
  Pieces(const Windows& w, const Strip& s)
      : size_(w.size[2]), patch_(w.patch[2]), length_(s.num_voxels), windows_(s.num_windows) {
    first_ = wrap(s.window * patch_ + s.voxel - w.shifts[3 * s.shift + 2], size_);
    i64 before_end = size_ - first_ + patch_ - 1;
    split(before_end, patch_);  // windows that begin there
    begin_of_rest_ = before_end < windows_ ? before_end : windows_;
    const i64 last = first_ + (begin_of_rest_ - 1) * patch_;
    cut_ = last + length_ > size_ ? size_ - last : 0;
  }

  // Where the first one lies along the axis.
  i64 first() const { return first_; }

  // Calls f(i3, window, voxel, length): `length` voxels of a window, from its `voxel` on, which lie at i3 in
  // the volume. The length of whole pieces is passed as `whole`, that it may be a constant.
  template <class Length, class F>
  void each(Length whole, F&& f) const {
    const i64 uncut = cut_ > 0 ? begin_of_rest_ - 1 : begin_of_rest_;
    for (int side = 0; side < 2; ++side) {  // before the volume's end, and from its other end on
      const i64 end = side == 0 ? uncut : windows_, offset = first_ - side * size_;
      for (i64 k = side == 0 ? 0 : begin_of_rest_; k < end; ++k) f(offset + k * patch_, k, i64{0}, whole);
    }
    if (cut_ == 0) return;
    const auto halves = [&](auto before, auto after) {
      f(first_ + uncut * patch_, uncut, i64{0}, before);
      f(i64{0}, uncut, cut_, after);
    };
    if constexpr (!std::is_same_v<Length, i64>) {
      constexpr Constant<Length{} / 2> half{};
      if (cut_ == half && length_ == 2 * half) return halves(half, half);  // as a shift by half a window cuts
    }
    halves(cut_, length_ - cut_);
  }

 private:
  i64 size_, patch_, length_, windows_, first_;
  i64 begin_of_rest_;  // the first window that begins again at the volume's other end
  i64 cut_;            // voxels before the end of the window that is cut; 0: none is
};

// Where channel 0 and voxel 0 of one (batch, head) lie in a volume, and its strides.
template <class S>
struct Head {
  S* data;
  i64 channel, stride[3];

  S* at(i64 c, i64 i1, i64 i2, i64 i3) const {
    return data + c * channel + i1 * stride[0] + i2 * stride[1] + i3 * stride[2];
  }
};

template <class S>
inline Head<S> head_of(const Volume& v, const Windows& w, i64 bh) {
  i64 b = bh;
  const i64 h = split(b, w.heads);
  return {static_cast<S*>(v.data) + b * v.stride[0] + h * w.head_dim * v.stride[1],
          v.stride[1],
          {v.stride[2], v.stride[3], v.stride[4]}};
}

// One (batch, head) of a contiguous volume that starts at `data`.
template <class S>
inline Head<S> contiguous_head(S* data, const Windows& w) {
  return {data, w.voxels(), {w.size[1] * w.size[2], w.size[2], 1}};
}

// From a strip to the one that is copied after it, in the volume (plan.h, tiles.h): along the last axis, then
// to the next row of windows, and the next plane of rows; of one window, the lines that follow.
inline i64 to_next_strip(const Windows& w, const Strip& s, const i64 (&stride)[3]) {
  if (s.num_lines < w.patch[0] * w.patch[1]) {
    i64 planes = s.num_lines;
    const i64 lines = split(planes, w.patch[1]);
    return planes * stride[0] + lines * stride[1];
  }
  if (s.window + s.num_windows < w.grid[2]) return s.num_windows * w.patch[2];
  const i64 begin_of_row = -s.window * w.patch[2], rows = w.grid[1] - 1;
  return begin_of_row +
         (s.grid[1] < rows ? w.patch[1] * stride[1] : w.patch[0] * stride[0] - rows * w.patch[1] * stride[1]);
}

// Calls f(voxels, columns, length, step) for every piece of a strip: where it lies along the last axis of
// `volume`, its voxels `step` apart, and in buffer[window][channel]. Where they lie side by side the step is
// a constant, and common lengths are.
template <class S, class T, class F>
inline void each_pair(const Windows& w, const Strip& s, Head<S> volume, Rows<T> buffer, i64 window_stride,
                      F&& f) {
  const Pieces pieces(w, s);
  // What comes next is too far away for the hardware to foresee. While a strip is worked on, the one after it
  // is on its way to the second-level cache; while a plane of it is copied, or a line, the next to the first.
  const i64 span = (s.num_windows - 1) * w.patch[2] + s.num_voxels;
  const i64 bytes = volume.stride[2] == 1 ? span * i64(sizeof(S)) : 0;
  const i64 next = s.num_lines > w.patch[1] ? volume.stride[0] : volume.stride[1];
  const i64 next_strip = to_next_strip(w, s, volume.stride);
  const auto each = [&](auto together, auto whole, auto step) {
    constexpr i64 group = decltype(together){};
    each_lines<group>(w, s, volume.stride, [&](i64 channel, const i64(&offsets)[group], i64 column) {
      S* const data = volume.data + channel * volume.channel;
      T* const columns = buffer[channel] + column;
      for (i64 k = 0; k < group; ++k) {
        prefetch<2>(data + offsets[k], (pieces.first() + next_strip) * i64(sizeof(S)), bytes);
        prefetch(data + offsets[k], (pieces.first() + next) * i64(sizeof(S)), bytes);
      }
      pieces.each(whole, [&](i64 i3, i64 window, i64 voxel, auto length) {
        S* const voxels = data + i3 * step;
        T* const to = columns + window * window_stride + voxel;
        for (i64 k = 0; k < group; ++k) f(voxels + offsets[k], to + k * whole, length, step);
      });
    });
  };
  // The shortest pieces of several lines together: what is done for each costs more than copying it. Longer
  // ones line by line, as memory is written fastest.
  constexpr i64 short_piece = 4;
  constexpr Constant<1> one{};
  constexpr Constant<4> some{};
  if (volume.stride[2] == 1) {
    with_length(s.num_voxels, [&](auto whole) {
      if constexpr (std::is_same_v<decltype(whole), Constant<short_piece>>) {
        if (s.num_lines % some == 0) return each(some, whole, one);
      }
      each(one, whole, one);
    });
  } else {
    each(one, s.num_voxels, volume.stride[2]);
  }
}

// buffer[window][channel] = scale * act(volume), for each window of the strip `window_stride` apart.
template <class S, class T>
void read_strip(const Windows& w, const Strip& s, Head<const S> volume, bool relu, T scale, Rows<T> buffer,
                i64 window_stride) {
  const auto read = [&](auto op) {
    each_pair(w, s, volume, buffer, window_stride,
              [&](const S* from, T* to, auto length, auto step) { transform(length, from, step, to, op); });
  };
  // NaN passes.
  if constexpr (!std::is_same_v<S, float>) {
    const T least = relu ? T(0) : -std::numeric_limits<T>::infinity();
    read([scale, least](S x) {
      const T scaled = T(to_compute(x)) * scale;
      return scaled < least ? least : scaled;
    });
  } else if (relu) {  // code of its own for the usual type
    read([](S x) { return x < T(0) ? T(0) : x; });
  } else if (scale == T(1)) {
    read([](S x) { return x; });
  } else {
    read([scale](S x) { return x * scale; });
  }
}

// sums[channel] (+)= buffer[window][channel]; strips of one shift touch disjoint voxels.
template <class T>
void add_strip(const Windows& w, const Strip& s, Rows<const T> buffer, i64 window_stride, bool accumulate,
               Head<T> sums) {
  each_pair(w, s, sums, buffer, window_stride, [accumulate](T* to, const T* from, auto length, auto) {
    each_block<T>(length, [&](auto block, i64 i) {
      const auto x = block.load(from + i);
      block.store(to + i, accumulate ? block.load(to + i) + x : x);
    });
  });
}

// volume = buffer[window][channel], rounded to the storage type.
template <class T, class S>
void write_strip(const Windows& w, const Strip& s, Rows<const T> buffer, i64 window_stride, Head<S> volume) {
  if constexpr (std::is_same_v<S, T>) {
    add_strip<T>(w, s, buffer, window_stride, false, volume);
  } else {
    each_pair(w, s, volume, buffer, window_stride, [&](S* to, const T* from, auto length, auto) {
      transform(length, from, Constant<1>{}, to, [](T value) { return Storage<S>::from(value); });
    });
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
