// The Python face of the native core: addresses, sizes and strides in, checked against the
// memory that the caller has, and nothing else. No torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#ifdef FK_WITH_CUDA
#include "cuda/kernels.h"
#endif

namespace py = pybind11;
namespace fk = factorizer;

namespace {

using Address = std::uintptr_t;
using fk::i64;

// --- What a call may touch -------------------------------------------------------------------
// Every address comes with the bytes that are there, and no kernel starts unless they hold the elements that
// it will touch: a wrong caller gets an exception.

// Sums and products of nonnegative numbers; one too large to be represented is the largest there is.
i64 sum(i64 a, i64 b) {
  i64 result;
  return __builtin_add_overflow(a, b, &result) ? std::numeric_limits<i64>::max() : result;
}
i64 product(std::initializer_list<i64> factors) {
  i64 result = 1;
  for (i64 factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) return std::numeric_limits<i64>::max();
  }
  return result;
}

// Bounds what the kernels count themselves: sums of a few such numbers, times the bytes of one, fit in an
// i64.
constexpr i64 limit = i64{1} << 54;
constexpr int max_threads = 1 << 16;

// The address of contiguous or strided elements, and the bytes from there to the end of the memory. A null
// address stands for an argument that is not given.
struct Memory {
  Address address = 0;
  i64 bytes = 0;

  bool given() const { return address != 0; }
  void* holding(const char* name, i64 elements, i64 element) const {
    const i64 needed = product({elements, element});
    if (needed > bytes || (needed > 0 && !given())) {
      throw std::invalid_argument(std::string(name) + " needs " + std::to_string(needed) + " bytes, got " +
                                  (given() ? std::to_string(bytes) : "a null address"));
    }
    return reinterpret_cast<void*>(address);
  }
};
using MemoryArgs = std::pair<Address, i64>;
Memory memory(const MemoryArgs& args) { return {args.first, args.second}; }

struct VolumeArgs {
  Memory memory;
  std::array<i64, 5> stride;
};

using FactorArgs = std::tuple<Address, i64, i64>;  // address, bytes, stride

fk::DType dtype(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype must be 0, 1, 2 or 3");
  return static_cast<fk::DType>(code);
}

i64 element(fk::DType dtype) { return dtype == fk::DType::float64 ? 8 : dtype == fk::DType::float32 ? 4 : 2; }

i64 compute_element(fk::DType dtype) { return dtype == fk::DType::float64 ? 8 : 4; }

// Owns the shifts that the description points to.
struct WindowsArgs {
  fk::Windows windows;
  std::vector<i64> shifts;

  WindowsArgs(i64 batch, i64 heads, i64 head_dim, std::array<i64, 3> size, std::array<i64, 3> patch,
              std::vector<i64> flat_shifts)
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
  WindowsArgs(const WindowsArgs&) = delete;
};

i64 map_elements(const fk::Windows& w) { return w.batch * w.heads * w.head_dim * w.voxels(); }

fk::Volume volume(const char* name, const VolumeArgs& args, const fk::Windows& w, i64 element) {
  fk::Volume v;
  const i64 extent[5] = {w.batch, w.heads * w.head_dim, w.size[0], w.size[1], w.size[2]};
  i64 last = 0;  // the farthest element
  for (int axis = 0; axis < 5; ++axis) {
    if (extent[axis] <= 1) continue;  // its stride, which may be anything, stays 0
    v.stride[axis] = args.stride[axis];
    if (v.stride[axis] < 0) throw std::invalid_argument(std::string(name) + " must have no negative stride");
    last = sum(last, product({extent[axis] - 1, v.stride[axis]}));
  }
  v.data = args.memory.holding(name, map_elements(w) == 0 ? 0 : sum(last, 1), element);
  return v;
}

// A factor of `size` elements a matrix; stride 0: shared by all the matrices, else as packed as it can be.
fk::Factor factor(const char* name, const Memory& memory, i64 stride, i64 size, i64 matrices, i64 element) {
  if (stride != 0 && stride != size)
    throw std::invalid_argument(std::string(name) + "'s stride must be 0 or the size of one factor");
  return {memory.holding(name, stride == 0 ? size : product({matrices, size}), element), stride};
}

// The factors of the two sides, or their gradients: both are given, or none.
struct FactorSizes {
  i64 u, v, matrices, element;

  std::pair<fk::Factor, fk::Factor> pair(const char* u_name, const Memory& u_memory, i64 u_stride,
                                         const char* v_name, const Memory& v_memory, i64 v_stride) const {
    if (u_memory.given() != v_memory.given() && matrices > 0)
      throw std::invalid_argument(std::string(u_name) + " and " + v_name + " go together");
    if (!u_memory.given()) return {};
    return {factor(u_name, u_memory, u_stride, u, matrices, element),
            factor(v_name, v_memory, v_stride, v, matrices, element)};
  }
};

// What forward and backward share, checked.
struct Call {
  fk::SwinNMF p;
  FactorSizes factors;

  Call(int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
       const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
       int threads) {
    const fk::Windows& w = windows.windows;
    if (rank < 1 || num_iters < 0 || grad_steps < 0 || grad_steps > num_iters || threads < 1 ||
        threads > max_threads) {
      throw std::invalid_argument("rank, num_iters, grad_steps or threads out of range");
    }
    const i64 extents = sum(w.head_dim + w.columns(), rank);
    if (product({rank, extents, sum(num_iters, 4), threads}) > limit ||
        product({rank, extents, w.num_matrices()}) > limit || product({rank, extents, w.columns()}) > limit)
      throw std::invalid_argument("rank or num_iters is too large");
    p.dtype = dtype(dtype_code);
    p.windows = w;
    p.options = {rank, num_iters, grad_steps, hals, relu, eps};
    p.threads = threads;
    p.x = volume("x", x, w, element(p.dtype));
    factors = {rank * w.head_dim, rank * w.columns(), w.num_matrices(), compute_element(p.dtype)};
    const auto [u_address, u_bytes, u_stride] = u0;
    const auto [v_address, v_bytes, v_stride] = v0;
    if ((u_stride == 0) != (v_stride == 0))
      throw std::invalid_argument("u0 and v0 must both be shared, or both be one per matrix");
    p.u0 = factor("u0", {u_address, u_bytes}, u_stride, factors.u, factors.matrices, factors.element);
    p.v0 = factor("v0", {v_address, v_bytes}, v_stride, factors.v, factors.matrices, factors.element);
  }

  // y or dx.
  void* map(const char* name, const Memory& memory) const {
    return memory.holding(name, map_elements(p.windows), element(p.dtype));
  }
};

#ifdef FK_WITH_CUDA

// --- CUDA ------------------------------------------------------------------------------------

namespace cuda = fk::cuda;

Call cuda_call(int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
               const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu,
               double eps) {
  return Call(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps, 1);
}

cuda::Target target(int device, Address stream) { return {device, reinterpret_cast<void*>(stream)}; }

float* scratch(const cuda::Plan& plan, const Memory& work) {
  // The kernels move four numbers of it at a time.
  if (work.address % 16 != 0) throw std::invalid_argument("work must lie on a multiple of 16 bytes");
  return static_cast<float*>(work.holding("work", plan.work, sizeof(float)));
}

void def_cuda(py::module_& m) {
  m.def(
      "cuda_plan_forward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
         bool factors) {
        const Call call =
            cuda_call(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps);
        return cuda::plan_forward(call.p, factors).work;
      },
      "The float32 elements of scratch memory that cuda_swin_nmf_forward takes; factors: it writes u and v.");
  m.def(
      "cuda_plan_backward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
         i64 processors) {
        const Call call =
            cuda_call(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps);
        const cuda::Plan plan = cuda::plan_backward(call.p, processors);
        return std::make_pair(plan.work, plan.sums_dx);
      },
      "The same of cuda_swin_nmf_backward on so many multiprocessors, and whether its dx must be float32.");
  m.def(
      "cuda_swin_nmf_forward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
         int device, Address stream, const MemoryArgs& work, const MemoryArgs& y, const MemoryArgs& u,
         const MemoryArgs& v) {
        Call call = cuda_call(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps);
        fk::SwinNMF& p = call.p;
        std::tie(p.u, p.v) =
            call.factors.pair("u", memory(u), call.factors.u, "v", memory(v), call.factors.v);
        if (p.u.data == nullptr) p.y = call.map("y", memory(y));
        const cuda::Plan plan = cuda::plan_forward(p, p.u.data != nullptr);
        float* const floats = scratch(plan, memory(work));
        py::gil_scoped_release release;
        cuda::swin_nmf_forward(p, floats, target(device, stream));
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("grad_steps"), py::arg("hals"), py::arg("relu"), py::arg("eps"),
      py::arg("device"), py::arg("stream"), py::arg("work"), py::arg("y") = MemoryArgs(),
      py::arg("u") = MemoryArgs(), py::arg("v") = MemoryArgs(),
      "Writes y, or, where u and v are given, these.");
  m.def(
      "cuda_swin_nmf_backward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
         int device, Address stream, const MemoryArgs& work, i64 processors, const VolumeArgs& dy,
         const MemoryArgs& du, const MemoryArgs& dv, const MemoryArgs& dx, int dx_dtype_code,
         const MemoryArgs& du0, const MemoryArgs& dv0) {
        Call call = cuda_call(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps);
        fk::SwinNMF& p = call.p;
        std::tie(p.du, p.dv) =
            call.factors.pair("du", memory(du), call.factors.u, "dv", memory(dv), call.factors.v);
        if (p.du.data == nullptr) p.dy = volume("dy", dy, p.windows, element(p.dtype));
        const fk::DType dx_dtype = dtype(dx_dtype_code);
        p.dx = memory(dx).holding("dx", map_elements(p.windows), element(dx_dtype));
        // One share for each matrix.
        std::tie(p.du0, p.dv0) =
            call.factors.pair("du0", memory(du0), call.factors.u, "dv0", memory(dv0), call.factors.v);
        const cuda::Plan plan = cuda::plan_backward(p, processors);
        if (plan.sums_dx && dx_dtype != fk::DType::float32) throw std::invalid_argument("dx must be float32");
        float* const floats = scratch(plan, memory(work));
        py::gil_scoped_release release;
        cuda::swin_nmf_backward(p, plan, floats, dx_dtype, target(device, stream));
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("grad_steps"), py::arg("hals"), py::arg("relu"), py::arg("eps"),
      py::arg("device"), py::arg("stream"), py::arg("work"), py::arg("processors"), py::arg("dy"),
      py::arg("du") = MemoryArgs(), py::arg("dv") = MemoryArgs(), py::arg("dx") = MemoryArgs(),
      py::arg("dx_dtype") = 0, py::arg("du0") = MemoryArgs(), py::arg("dv0") = MemoryArgs(),
      "Writes dx, from dy or from du and dv, and each matrix' share of du0 and dv0 where these are given.");
  m.def(
      "cuda_architectures", [] { return std::string(FK_CUDA_ARCHITECTURES); },
      "The compute capabilities that there is machine code for, as in '80,90', and '+' for newer ones.");
  m.def("cuda_versions", &cuda::versions,
        "(driver, runtime) as in 13000; the driver's is 0 where there is none.");
}

#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() =
      "Native kernels of factorizer_kernels; see csrc/include/problem.h for the meaning of the arguments.";

  py::class_<VolumeArgs>(m, "Volume")
      .def(py::init([](Address data, i64 bytes, std::array<i64, 5> stride) {
             return VolumeArgs{{data, bytes}, stride};
           }),
           py::arg("data"), py::arg("bytes"), py::arg("stride"));
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
         const MemoryArgs& y, const MemoryArgs& u, const MemoryArgs& v) {
        Call call(dtype_code, windows, x, u0, v0, rank, num_iters, num_iters, hals, relu, eps, threads);
        fk::SwinNMF& p = call.p;
        std::tie(p.u, p.v) =
            call.factors.pair("u", memory(u), call.factors.u, "v", memory(v), call.factors.v);
        if (p.u.data == nullptr) p.y = call.map("y", memory(y));
        py::gil_scoped_release release;
        fk::cpu_kernels().swin_nmf_forward(p);
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("hals"), py::arg("relu"), py::arg("eps"), py::arg("threads"),
      py::arg("y") = MemoryArgs(), py::arg("u") = MemoryArgs(), py::arg("v") = MemoryArgs(),
      "Writes y, or, where u and v are given, these.");

  m.def(
      "swin_nmf_backward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
         int threads, const VolumeArgs& dy, const MemoryArgs& du, const MemoryArgs& dv, const MemoryArgs& dx,
         const MemoryArgs& du0, const MemoryArgs& dv0) {
        Call call(dtype_code, windows, x, u0, v0, rank, num_iters, grad_steps, hals, relu, eps, threads);
        fk::SwinNMF& p = call.p;
        std::tie(p.du, p.dv) =
            call.factors.pair("du", memory(du), call.factors.u, "dv", memory(dv), call.factors.v);
        if (p.du.data == nullptr) p.dy = volume("dy", dy, p.windows, element(p.dtype));
        p.dx = call.map("dx", memory(dx));
        std::tie(p.du0, p.dv0) =
            call.factors.pair("du0", memory(du0), p.u0.stride, "dv0", memory(dv0), p.v0.stride);
        py::gil_scoped_release release;
        fk::cpu_kernels().swin_nmf_backward(p);
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("grad_steps"), py::arg("hals"), py::arg("relu"), py::arg("eps"),
      py::arg("threads"), py::arg("dy"), py::arg("du") = MemoryArgs(), py::arg("dv") = MemoryArgs(),
      py::arg("dx") = MemoryArgs(), py::arg("du0") = MemoryArgs(), py::arg("dv0") = MemoryArgs(),
      "Writes dx, and du0 and dv0 where they are given, from dy, or, where du and dv are given, these.");

  const auto def_matricize = [&m](const char* name, void (*fk::CpuKernels::*kernel)(const fk::Matricize&)) {
    m.def(
        name,
        [kernel](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const MemoryArgs& z,
                 double scale, int threads) {
          if (threads < 1 || threads > max_threads) throw std::invalid_argument("threads out of range");
          const fk::Windows& w = windows.windows;
          const fk::DType type = dtype(dtype_code);
          void* matrices = memory(z).holding("z", w.num_shifts * map_elements(w), element(type));
          const fk::Matricize p{type, w, threads, volume("x", x, w, element(type)), matrices, scale};
          py::gil_scoped_release release;
          (fk::cpu_kernels().*kernel)(p);
        },
        py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("z"), py::arg("scale"),
        py::arg("threads"));
  };
  def_matricize("sw_matricize", &fk::CpuKernels::sw_matricize);
  def_matricize("sw_dematricize", &fk::CpuKernels::sw_dematricize);
#ifdef FK_WITH_CUDA
  def_cuda(m);
#endif
}
