// The Python face of the native core: addresses, sizes and strides in, nothing else. No torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace py = pybind11;
namespace fk = factorizer;

namespace {

using Address = std::uintptr_t;
using fk::i64;

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

struct VolumeArgs {
  Address data;
  std::array<i64, 5> stride;
};

// Owns the shifts that the description points to.
struct WindowsArgs {
  fk::Windows windows;
  std::vector<i64> shifts;

  WindowsArgs(i64 batch, i64 heads, i64 head_dim, std::array<i64, 3> size, std::array<i64, 3> patch,
              std::vector<i64> flat_shifts)
      : shifts(std::move(flat_shifts)) {
    if (shifts.empty() || shifts.size() % 3 != 0)
      throw std::invalid_argument("shifts must hold three per copy");
    windows.batch = batch;
    windows.heads = heads;
    windows.head_dim = head_dim;
    for (int axis = 0; axis < 3; ++axis) {
      if (patch[axis] < 1 || size[axis] < 0 || size[axis] % patch[axis] != 0) {
        throw std::invalid_argument("patch must divide size");
      }
      windows.size[axis] = size[axis];
      windows.patch[axis] = patch[axis];
    }
    for (std::size_t i = 0; i < shifts.size(); ++i) {
      if (shifts[i] < 0 || (shifts[i] > 0 && shifts[i] >= size[i % 3])) {
        throw std::invalid_argument("shifts must lie in [0, size)");
      }
    }
    if (batch < 0 || heads < 0 || head_dim < 1)
      throw std::invalid_argument("batch, heads or head_dim out of range");
    windows.num_shifts = static_cast<i64>(shifts.size() / 3);
    windows.shifts = shifts.data();
  }
  WindowsArgs(const WindowsArgs&) = delete;
};

fk::Volume volume(const VolumeArgs& args) {
  fk::Volume v;
  v.data = pointer(args.data);
  for (int axis = 0; axis < 5; ++axis) v.stride[axis] = args.stride[axis];
  return v;
}

fk::DType dtype(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype must be 0, 1, 2 or 3");
  return static_cast<fk::DType>(code);
}

using FactorArgs = std::pair<Address, i64>;

fk::Factor factor(const FactorArgs& args) { return {pointer(args.first), args.second}; }

fk::SwinNMF problem(int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
                    const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu,
                    double eps, int threads) {
  if (rank < 1 || num_iters < 0 || grad_steps < 0 || grad_steps > num_iters || threads < 1) {
    throw std::invalid_argument("rank, num_iters, grad_steps or threads out of range");
  }
  fk::SwinNMF p;
  p.dtype = dtype(dtype_code);
  p.windows = windows.windows;
  p.options = {rank, num_iters, grad_steps, hals, relu, eps};
  p.threads = threads;
  p.x = volume(x);
  p.u0 = factor(u0);
  p.v0 = factor(v0);
  return p;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "Native kernels of factorizer_kernels; see csrc/include/problem.h for the meaning of the arguments.";

  py::class_<VolumeArgs>(m, "Volume")
      .def(py::init([](Address data, std::array<i64, 5> stride) { return VolumeArgs{data, stride}; }),
           py::arg("data"), py::arg("stride"));
  py::class_<WindowsArgs>(m, "Windows")
      .def(py::init<i64, i64, i64, std::array<i64, 3>, std::array<i64, 3>, std::vector<i64>>(),
           py::arg("batch"), py::arg("heads"), py::arg("head_dim"), py::arg("size"), py::arg("patch"),
           py::arg("shifts"));

  m.def("isa", [] { return fk::cpu_kernels().isa; }, "The instruction set of the CPU kernels in use.");
  m.def(
      "set_team_launcher",
      [](Address launcher) { fk::set_team_launcher(reinterpret_cast<fk::TeamLauncher>(launcher)); },
      py::arg("launcher"),
      "Run parallel regions with the function at this address (libgomp's GOMP_parallel); 0: none.");

  m.def(
      "swin_nmf_forward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, bool hals, bool relu, double eps, int threads,
         Address y, Address u, Address v) {
        fk::SwinNMF p =
            problem(dtype_code, windows, x, u0, v0, rank, num_iters, num_iters, hals, relu, eps, threads);
        p.y = pointer(y);
        p.u = {pointer(u), rank * windows.windows.head_dim};
        p.v = {pointer(v), rank * windows.windows.columns()};
        py::gil_scoped_release release;
        fk::cpu_kernels().swin_nmf_forward(p);
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("hals"), py::arg("relu"), py::arg("eps"), py::arg("threads"),
      py::arg("y") = 0, py::arg("u") = 0, py::arg("v") = 0);

  m.def(
      "swin_nmf_backward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
         int threads, const VolumeArgs& dy, Address du, Address dv, Address dx, Address du0, Address dv0) {
        fk::SwinNMF p =
            problem(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps, threads);
        p.dy = volume(dy);
        p.du = {pointer(du), rank * windows.windows.head_dim};
        p.dv = {pointer(dv), rank * windows.windows.columns()};
        p.dx = pointer(dx);
        p.du0 = {pointer(du0), u0.second};
        p.dv0 = {pointer(dv0), v0.second};
        py::gil_scoped_release release;
        fk::cpu_kernels().swin_nmf_backward(p);
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("grad_steps"), py::arg("hals"), py::arg("relu"), py::arg("eps"),
      py::arg("threads"), py::arg("dy"), py::arg("du") = 0, py::arg("dv") = 0, py::arg("dx") = 0,
      py::arg("du0") = 0, py::arg("dv0") = 0);

  const auto def_matricize = [&m](const char* name, void (*fk::CpuKernels::*kernel)(const fk::Matricize&)) {
    m.def(
        name,
        [kernel](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, Address z, double scale,
                 int threads) {
          if (threads < 1) throw std::invalid_argument("threads out of range");
          const fk::Matricize p{dtype(dtype_code), windows.windows, threads, volume(x), pointer(z), scale};
          py::gil_scoped_release release;
          (fk::cpu_kernels().*kernel)(p);
        },
        py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("z"), py::arg("scale"),
        py::arg("threads"));
  };
  def_matricize("sw_matricize", &fk::CpuKernels::sw_matricize);
  def_matricize("sw_dematricize", &fk::CpuKernels::sw_dematricize);
}
