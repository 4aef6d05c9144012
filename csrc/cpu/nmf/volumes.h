// A problem's volumes by strips, in the arithmetic's type T, whatever they are stored in.
#pragma once

#include "cpu/common/storage.h"
#include "cpu/windows/strips.h"
#include "problems/nmf.h"

namespace factorizer {
namespace FK_ISA {

// buffer[window][channel] = scale * act(volume)
template <class T>
void read_volume(const SwinNMF& p, const Volume& volume, const Strip& s, bool relu, T scale, Rows<T> buffer,
                 i64 window_stride) {
  with_storage_for<T>(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    read_strip<S, T>(p.windows, s, head_of<const S>(volume, p.windows, s.bh), relu, scale, buffer,
                     window_stride);
  });
}

// y = buffer[window][channel], rounded
template <class T>
void write_y_strip(const SwinNMF& p, const Strip& s, Rows<const T> buffer, i64 window_stride) {
  const Windows& w = p.windows;
  with_storage_for<T>(p.dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    write_strip<T, S>(w, s, buffer, window_stride,
                      contiguous_head(static_cast<S*>(p.y) + s.bh * w.head_dim * w.voxels(), w));
  });
}

// Numbers of the volume from `begin` on = from, rounded.
template <class T>
void round_to(DType dtype, const T* from, i64 count, void* volume, i64 begin) {
  with_storage_for<T>(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    transform(count, from, Constant<1>{}, static_cast<S*>(volume) + begin,
              [](T value) { return Storage<S>::from(value); });
  });
}

}  // namespace FK_ISA
}  // namespace factorizer
