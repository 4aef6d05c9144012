// Reading and writing (shifted) windows of a volume.
//
// A strip is what is copied at once: consecutive windows along the last axis, whose voxels lie side by side
// in memory, and of each window some lines (a line: the voxels of one window along the last axis). Windows
// too large for the cache are cut into strips of some of their lines, or of a part of one line.
#pragma once

#include "rows.h"
#include "scalar_types.h"

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
  const i64 window = (s.grid[0] * w.grid(1) + s.grid[1]) * w.grid(2) + s.window;
  return (s.shift * num_bh + s.bh - bh_begin) * w.num_windows() + window;
}

inline i64 wrap(i64 index, i64 size) { return index < 0 ? index + size : index; }

// Calls f with the length of a line, as a compile-time constant where it is common, so that the loop over
// it becomes a few vectors.
template <class F>
inline void with_line(i64 length, F&& f) {
  switch (length) {
    case 4: return f(Constant<4>{});
    case 8: return f(Constant<8>{});
    case 16: return f(Constant<16>{});
    default: return f(length);
  }
}

// Calls piece(channel, i1, i2, i3, window, column, length) for every run that is contiguous both in the
// volume (from voxel (i1, i2, i3)) and in the strip (columns of a window of it). Length: see with_line.
template <class Length, class Piece>
inline void each_piece(const Windows& w, const Strip& s, Length line_length, Piece&& piece) {
  const i64* shift = w.shifts + 3 * s.shift;
  const i64 first = wrap(s.window * w.patch[2] + s.voxel - shift[2], w.size[2]);
  for (i64 channel = 0; channel < w.head_dim; ++channel) {
    i64 p1 = s.line / w.patch[1], p2 = s.line % w.patch[1];
    for (i64 line = 0; line < s.num_lines; ++line) {
      const i64 i1 = wrap(s.grid[0] * w.patch[0] + p1 - shift[0], w.size[0]);
      const i64 i2 = wrap(s.grid[1] * w.patch[1] + p2 - shift[1], w.size[1]);
      const i64 column = line * line_length;
      i64 i3 = first;
      for (i64 window = 0; window < s.num_windows; ++window) {
        const i64 before_end = w.size[2] - i3;
        if (line_length <= before_end) {
          piece(channel, i1, i2, i3, window, column, line_length);
        } else {
          piece(channel, i1, i2, i3, window, column, before_end);
          piece(channel, i1, i2, i64{0}, window, column + before_end, line_length - before_end);
        }
        i3 += w.patch[2];
        if (i3 >= w.size[2]) i3 -= w.size[2];
      }
      if (++p2 == w.patch[1]) {
        p2 = 0;
        ++p1;
      }
    }
  }
}

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
  const i64 b = bh / w.heads, h = bh % w.heads;
  return {static_cast<S*>(v.data) + b * v.stride[0] + h * w.head_dim * v.stride[1],
          v.stride[1],
          {v.stride[2], v.stride[3], v.stride[4]}};
}

// One (batch, head) of a contiguous volume that starts at `data`.
template <class S>
inline Head<S> contiguous_head(S* data, const Windows& w) {
  return {data, w.voxels(), {w.size[1] * w.size[2], w.size[2], 1}};
}

// buffer[window][channel] = scale * act(volume), for each window of the strip `window_stride` apart.
template <class S, class T>
void read_strip(const Windows& w, const Strip& s, Head<const S> volume, bool relu, T scale, Rows<T> buffer,
                i64 window_stride) {
  auto read = [&](auto load, auto step, auto line_length) {
    each_piece(w, s, line_length, [&](i64 c, i64 i1, i64 i2, i64 i3, i64 window, i64 column, auto length) {
      const S* from = volume.at(c, i1, i2, i3);
      // The next plane's line, mostly: those are too far apart for the hardware to foresee.
      __builtin_prefetch(from + volume.stride[0]);
      T* to = buffer[c] + window * window_stride + column;
      for (i64 i = 0; i < length; ++i) to[i] = load(from[i * step]);
    });
  };
  auto read_with = [&](auto load) {
    if (volume.stride[2] == 1) {
      with_line(s.num_voxels, [&](auto length) { read(load, Constant<1>{}, length); });
    } else {
      read(load, volume.stride[2], s.num_voxels);
    }
  };
  if (relu) {
    read_with([](S x) { return T(to_compute(x)) < T(0) ? T(0) : T(to_compute(x)); });  // NaN passes
  } else if (scale == T(1)) {
    read_with([](S x) { return T(to_compute(x)); });
  } else {
    read_with([scale](S x) { return T(to_compute(x)) * scale; });
  }
}

// sums[channel] (+)= buffer[window][channel]; strips of one shift touch disjoint voxels.
template <class T>
void add_strip(const Windows& w, const Strip& s, Rows<const T> buffer, i64 window_stride, bool accumulate,
               Head<T> sums) {
  with_line(s.num_voxels, [&](auto line_length) {
    each_piece(w, s, line_length, [&](i64 c, i64 i1, i64 i2, i64 i3, i64 window, i64 column, auto length) {
      const T* from = buffer[c] + window * window_stride + column;
      T* to = sums.at(c, i1, i2, i3);
      if (accumulate) {
        for (i64 i = 0; i < length; ++i) to[i] += from[i];
      } else {
        for (i64 i = 0; i < length; ++i) to[i] = from[i];
      }
    });
  });
}

// Calls f with a null pointer of the storage type.
template <class F>
inline void with_storage(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::float64: return f(static_cast<double*>(nullptr));
    case DType::bfloat16: return f(static_cast<bfloat16*>(nullptr));
    case DType::float16: return f(static_cast<float16*>(nullptr));
  }
}

}  // namespace FK_ISA
}  // namespace factorizer
