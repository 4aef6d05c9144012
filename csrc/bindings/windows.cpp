// Windows, and their matricisation.
#include "bindings/windows.h"

#include "cpu/common/dispatch.h"

namespace factorizer {
namespace bindings {

WindowsArgs::WindowsArgs(i64 batch, i64 heads, i64 head_dim, std::array<i64, 3> size,
                         std::array<i64, 3> patch, std::vector<i64> flat_shifts)
    : shifts(std::move(flat_shifts)) {
  if (shifts.empty() || shifts.size() % 3 != 0)
    throw std::invalid_argument("shifts must hold three per copy");
  if (batch < 0 || heads < 0 || head_dim < 1)
    throw std::invalid_argument("batch, heads or head_dim out of range");
  windows.batch = batch;
  windows.heads = heads;
  windows.head_dim = head_dim;
  for (int axis = 0; axis < 3; ++axis) {
    if (patch[axis] < 1 || size[axis] < 0 || size[axis] % patch[axis] != 0) {
      throw std::invalid_argument("patch must divide size");
    }
    windows.size[axis] = size[axis];
    windows.patch[axis] = patch[axis];
    windows.grid[axis] = size[axis] / patch[axis];
  }
  for (std::size_t i = 0; i < shifts.size(); ++i) {
    if (shifts[i] < 0 || (shifts[i] > 0 && shifts[i] >= size[i % 3])) {
      throw std::invalid_argument("shifts must lie in [0, size)");
    }
  }
  windows.num_shifts = static_cast<i64>(shifts.size() / 3);
  windows.shifts = shifts.data();
  const auto or_one = [](i64 extent) { return extent > 0 ? extent : 1; };
  const i64 elements = product({windows.num_shifts, or_one(batch), or_one(heads), head_dim, or_one(size[0]),
                                or_one(size[1]), or_one(size[2])});
  if (elements > limit || product({head_dim, patch[0], patch[1], patch[2]}) > limit)
    throw std::invalid_argument("the map is too large");
}

void def_windows(py::module_& m) {
  py::class_<WindowsArgs, std::shared_ptr<WindowsArgs>>(m, "Windows")
      .def(py::init<i64, i64, i64, std::array<i64, 3>, std::array<i64, 3>, std::vector<i64>>(),
           py::arg("batch"), py::arg("heads"), py::arg("head_dim"), py::arg("size"), py::arg("patch"),
           py::arg("shifts"));

  const auto def_matricize = [&m](const char* name, void (*CpuKernels::*kernel)(const Matricize&)) {
    m.def(
        name,
        [kernel](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const MemoryArgs& z,
                 double scale, int threads) {
          check_threads(threads);
          const Windows& w = windows.windows;
          const DType type = dtype(dtype_code);
          void* matrices = memory(z).holding("z", w.num_shifts * w.num_elements(), element(type));
          const Matricize p{type, w, threads, volume("x", x, w, element(type)), matrices, scale};
          py::gil_scoped_release release;
          (cpu_kernels().*kernel)(p);
        },
        py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("z"), py::arg("scale"),
        py::arg("threads"));
  };
  def_matricize("sw_matricize", &CpuKernels::sw_matricize);
  def_matricize("sw_dematricize", &CpuKernels::sw_dematricize);
}

}  // namespace bindings
}  // namespace factorizer
