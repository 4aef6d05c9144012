// Depthwise convolution.
#include "problems/depthwise.h"

#include <algorithm>

#include "bindings/memory.h"
#include "cpu/common/dispatch.h"

namespace factorizer {
namespace bindings {
namespace {

// What forward and backward share, checked.
struct DepthwiseCall {
  DepthwiseConv p;
  Extent extent;

  DepthwiseCall(int dtype_code, const Extent& size, const std::array<i64, 3>& kernel, int threads)
      : extent(size) {
    check_threads(threads);
    if (*std::min_element(size.begin(), size.end()) < 0)
      throw std::invalid_argument("size must not be negative");
    for (i64 k : kernel) {
      if (k < 1 || k > 7 || k % 2 == 0) throw std::invalid_argument("kernel must hold 1, 3, 5 or 7");
    }
    const auto or_one = [](i64 n) { return std::max<i64>(n, 1); };
    i64 elements = kernel[0] * kernel[1] * kernel[2];
    for (i64 n : size) elements = product({elements, or_one(n)});
    if (elements > limit) throw std::invalid_argument("the map is too large");
    p.dtype = dtype(dtype_code);
    p.batch = size[0];
    p.channels = size[1];
    std::copy(size.begin() + 2, size.end(), p.size);
    std::copy(kernel.begin(), kernel.end(), p.kernel);
    p.threads = threads;
  }

  Volume any(const char* name, const VolumeArgs& args) const {
    return volume(name, args, extent, element(p.dtype));
  }
  // A contiguous map.
  void* map(const char* name, const MemoryArgs& args) const {
    return memory(args).holding(name, p.num_elements(), element(p.dtype));
  }
  // `each` numbers for each channel.
  void* per_channel(const char* name, const MemoryArgs& args, i64 each) const {
    return memory(args).holding(name, p.channels * each, compute_element(p.dtype));
  }
  void* optional(const char* name, const OptionalMemory& args, i64 each) const {
    return args ? per_channel(name, *args, each) : nullptr;
  }
};

}  // namespace

void def_depthwise(py::module_& m) {
  m.def(
      "depthwise_conv_forward",
      [](int dtype_code, const Extent& size, const std::array<i64, 3>& kernel, const VolumeArgs& x,
         const MemoryArgs& weight, const OptionalMemory& bias, const MemoryArgs& y, int threads) {
        DepthwiseCall call(dtype_code, size, kernel, threads);
        DepthwiseConv& p = call.p;
        p.x = call.any("x", x);
        p.weight = call.per_channel("weight", weight, p.taps());
        p.bias = call.optional("bias", bias, 1);
        p.y = call.map("y", y);
        py::gil_scoped_release release;
        cpu_kernels().depthwise_conv_forward(p);
      },
      py::arg("dtype"), py::arg("size"), py::arg("kernel"), py::arg("x"), py::arg("weight"), py::arg("bias"),
      py::arg("y"), py::arg("threads"), "Writes y.");

  m.def(
      "depthwise_conv_backward",
      [](int dtype_code, const Extent& size, const std::array<i64, 3>& kernel, const VolumeArgs& dy,
         const VolumeArgs& x, const MemoryArgs& weight, const OptionalMemory& dx,
         const OptionalMemory& dweight, const OptionalMemory& dbias, int threads) {
        DepthwiseCall call(dtype_code, size, kernel, threads);
        DepthwiseConv& p = call.p;
        p.dy = call.any("dy", dy);
        p.x = call.any("x", x);
        p.weight = call.per_channel("weight", weight, p.taps());
        p.dx = dx ? call.map("dx", *dx) : nullptr;
        p.dweight = call.optional("dweight", dweight, p.taps());
        p.dbias = call.optional("dbias", dbias, 1);
        py::gil_scoped_release release;
        cpu_kernels().depthwise_conv_backward(p);
      },
      py::arg("dtype"), py::arg("size"), py::arg("kernel"), py::arg("dy"), py::arg("x"), py::arg("weight"),
      py::arg("dx"), py::arg("dweight"), py::arg("dbias"), py::arg("threads"),
      "Writes those of dx, dweight and dbias that are not None.");
}

}  // namespace bindings
}  // namespace factorizer
