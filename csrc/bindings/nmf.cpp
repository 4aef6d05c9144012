// The factorisation of windows, on the CPU and on CUDA devices.
#include <tuple>

#include "bindings/windows.h"
#include "cpu/common/dispatch.h"
#include "problems/nmf.h"
#ifdef FK_WITH_CUDA
#include "cuda/nmf/swin_nmf.h"
#endif

namespace factorizer {
namespace bindings {
namespace {

using FactorArgs = std::tuple<Address, i64, i64>;  // address, bytes, stride

// A factor of `size` elements a matrix; stride 0: shared by all the matrices, else as packed as it can be.
Factor factor(const char* name, const Memory& memory, i64 stride, i64 size, i64 matrices, i64 element) {
  if (stride != 0 && stride != size)
    throw std::invalid_argument(std::string(name) + "'s stride must be 0 or the size of one factor");
  return {memory.holding(name, stride == 0 ? size : product({matrices, size}), element), stride};
}

// The factors of the two sides, or their gradients: both are given, or none.
struct FactorSizes {
  i64 u, v, matrices, element;

  std::pair<Factor, Factor> pair(const char* u_name, const Memory& u_memory, i64 u_stride, const char* v_name,
                                 const Memory& v_memory, i64 v_stride) const {
    if (u_memory.given() != v_memory.given() && matrices > 0)
      throw std::invalid_argument(std::string(u_name) + " and " + v_name + " go together");
    if (!u_memory.given()) return {};
    return {factor(u_name, u_memory, u_stride, u, matrices, element),
            factor(v_name, v_memory, v_stride, v, matrices, element)};
  }
};

// What forward and backward share, checked.
struct Call {
  SwinNMF p;
  FactorSizes factors;

  Call(int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
       const FactorArgs& v0, i64 rank, i64 num_iters, i64 grad_steps, bool hals, bool relu, double eps,
       int threads) {
    const Windows& w = windows.windows;
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
    return memory.holding(name, p.windows.num_elements(), element(p.dtype));
  }
};

#ifdef FK_WITH_CUDA

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
        SwinNMF& p = call.p;
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
        SwinNMF& p = call.p;
        std::tie(p.du, p.dv) =
            call.factors.pair("du", memory(du), call.factors.u, "dv", memory(dv), call.factors.v);
        if (p.du.data == nullptr) p.dy = volume("dy", dy, p.windows, element(p.dtype));
        const DType dx_dtype = dtype(dx_dtype_code);
        p.dx = memory(dx).holding("dx", p.windows.num_elements(), element(dx_dtype));
        // One share for each matrix.
        std::tie(p.du0, p.dv0) =
            call.factors.pair("du0", memory(du0), call.factors.u, "dv0", memory(dv0), call.factors.v);
        const cuda::Plan plan = cuda::plan_backward(p, processors);
        if (plan.sums_dx && dx_dtype != DType::float32) throw std::invalid_argument("dx must be float32");
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
}

#endif

}  // namespace

void def_nmf(py::module_& m) {
  m.def(
      "swin_nmf_forward",
      [](int dtype_code, const WindowsArgs& windows, const VolumeArgs& x, const FactorArgs& u0,
         const FactorArgs& v0, i64 rank, i64 num_iters, bool hals, bool relu, double eps, int threads,
         const MemoryArgs& y, const MemoryArgs& u, const MemoryArgs& v) {
        Call call(dtype_code, windows, x, u0, v0, rank, num_iters, num_iters, hals, relu, eps, threads);
        SwinNMF& p = call.p;
        std::tie(p.u, p.v) =
            call.factors.pair("u", memory(u), call.factors.u, "v", memory(v), call.factors.v);
        if (p.u.data == nullptr) p.y = call.map("y", memory(y));
        py::gil_scoped_release release;
        cpu_kernels().swin_nmf_forward(p);
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
        SwinNMF& p = call.p;
        std::tie(p.du, p.dv) =
            call.factors.pair("du", memory(du), call.factors.u, "dv", memory(dv), call.factors.v);
        if (p.du.data == nullptr) p.dy = volume("dy", dy, p.windows, element(p.dtype));
        p.dx = call.map("dx", memory(dx));
        std::tie(p.du0, p.dv0) =
            call.factors.pair("du0", memory(du0), p.u0.stride, "dv0", memory(dv0), p.v0.stride);
        py::gil_scoped_release release;
        cpu_kernels().swin_nmf_backward(p);
      },
      py::arg("dtype"), py::arg("windows"), py::arg("x"), py::arg("u0"), py::arg("v0"), py::arg("rank"),
      py::arg("num_iters"), py::arg("grad_steps"), py::arg("hals"), py::arg("relu"), py::arg("eps"),
      py::arg("threads"), py::arg("dy"), py::arg("du") = MemoryArgs(), py::arg("dv") = MemoryArgs(),
      py::arg("dx") = MemoryArgs(), py::arg("du0") = MemoryArgs(), py::arg("dv0") = MemoryArgs(),
      "Writes dx, and du0 and dv0 where they are given, from dy, or, where du and dv are given, these.");
#ifdef FK_WITH_CUDA
  def_cuda(m);
#endif
}

}  // namespace bindings
}  // namespace factorizer
