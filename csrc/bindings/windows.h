// The cut of a map into windows, checked.
#pragma once

#include <memory>
#include <vector>

#include "bindings/memory.h"

namespace factorizer {
namespace bindings {

// Owns the shifts that the description points to.
struct WindowsArgs {
  Windows windows;
  std::vector<i64> shifts;

  WindowsArgs(i64 batch, i64 heads, i64 head_dim, std::array<i64, 3> size, std::array<i64, 3> patch,
              std::vector<i64> flat_shifts);
  WindowsArgs(const WindowsArgs&) = delete;
};

inline Volume volume(const char* name, const VolumeArgs& args, const Windows& w, i64 element) {
  return volume(name, args, Extent{w.batch, w.heads * w.head_dim, w.size[0], w.size[1], w.size[2]}, element);
}

}  // namespace bindings
}  // namespace factorizer
