// The factorisation of windows, on the CPU and on CUDA devices: one problem, which every entry takes.
#include "problems/nmf.h"

#include <memory>
#include <utility>

#include "bindings/windows.h"
#include "cpu/common/dispatch.h"
#ifdef FK_WITH_CUDA
#include "cuda/nmf/swin_nmf.h"
#endif

namespace factorizer {
namespace bindings {
namespace {

constexpr i64 most_sections = 128;  // of the columns of a long matrix, at most: see cpu/nmf/tiles.h

NMFOptions options(i64 rank, i64 num_iters, const std::string& solver, i64 grad_steps, bool relu,
                   double eps) {
  if (rank < 1) refuse("rank", "at least 1", rank);
  if (num_iters < 0) refuse("num_iters", "at least 0", num_iters);
  if (grad_steps < 0 || grad_steps > num_iters) refuse("grad_steps", "0 to num_iters", grad_steps);
  if (solver != "mu" && solver != "hals")
    throw std::invalid_argument("solver must be mu or hals, got " + solver);
  return {rank, num_iters, grad_steps, solver == "hals", relu, eps};
}

// A problem of problems/nmf.h, checked; the outputs and gradients of a call are not yet in it.
class NMFProblem {
 public:
  NMFProblem(int dtype_code, std::shared_ptr<WindowsArgs> windows, const VolumeArgs& x, const MemoryArgs& u0,
             const MemoryArgs& v0, bool shared, const NMFOptions& o)
      : windows_(std::move(windows)) {
    const Windows& w = windows_->windows;
    const i64 extents = sum(w.head_dim + w.columns(), o.rank);
    elements_per_thread_ = product({o.rank, extents, sum(o.num_iters, 4)});
    // The factors of all matrices; sums of R x R products over parts of the rows, or over the sections.
    if (elements_per_thread_ > limit || product({o.rank, extents, w.num_matrices()}) > limit ||
        product({o.rank, extents, sum(o.rank, most_sections)}) > limit)
      throw std::invalid_argument("rank or num_iters is too large for matrices of " +
                                  std::to_string(w.head_dim) + " x " + std::to_string(w.columns()));
    p_.dtype = dtype(dtype_code);
    p_.windows = w;
    p_.options = o;
    p_.threads = 1;
    p_.x = volume("x", x, w, element(p_.dtype));
    p_.u0 = {factor("u0", u0, u_size(), shared), shared ? 0 : u_size()};
    p_.v0 = {factor("v0", v0, v_size(), shared), shared ? 0 : v_size()};
  }

  const SwinNMF& description() const { return p_; }
  SwinNMF on_threads(int threads) const {
    check_threads(threads);
    if (product({elements_per_thread_, threads}) > limit)
      throw std::invalid_argument("rank or num_iters is too large for so many threads");
    SwinNMF p = p_;
    p.threads = threads;
    return p;
  }

  // Where y goes, or where u and v go, one of each for every matrix.
  void set_outputs(SwinNMF& p, const OptionalMemory& y, const OptionalMemory& u,
                   const OptionalMemory& v) const {
    check_one("y", y.has_value(), "u and v", together("u", u, "v", v));
    if (y) p.y = contiguous_map("y", *y, p.dtype);
    if (u) set_pair(p.u, "u", *u, p.v, "v", *v, false);
  }
  // The gradient that is given: y's, or u's and v's.
  void set_loss(SwinNMF& p, const std::optional<VolumeArgs>& dy, const OptionalMemory& du,
                const OptionalMemory& dv) const {
    check_one("dy", dy.has_value(), "du and dv", together("du", du, "dv", dv));
    if (dy) p.dy = volume("dy", *dy, p.windows, element(p.dtype));
    if (du) set_pair(p.du, "du", *du, p.dv, "dv", *dv, false);
  }
  // Where the gradients of u0 and v0 go, if they are wanted; shared: one sum over all the matrices.
  void set_factor_grads(SwinNMF& p, const OptionalMemory& du0, const OptionalMemory& dv0, bool shared) const {
    if (together("du0", du0, "dv0", dv0)) set_pair(p.du0, "du0", *du0, p.dv0, "dv0", *dv0, shared);
  }
  // y or dx
  void* contiguous_map(const char* name, const MemoryArgs& args, DType type) const {
    return memory(args).holding(name, p_.windows.num_elements(), element(type));
  }
  bool shared() const { return p_.u0.stride == 0; }

 private:
  i64 u_size() const { return p_.options.rank * p_.windows.head_dim; }
  i64 v_size() const { return p_.options.rank * p_.windows.columns(); }

  // A factor of `size` elements, one for every matrix or for all of them.
  void* factor(const char* name, const MemoryArgs& args, i64 size, bool shared) const {
    const i64 elements = shared ? size : product({p_.windows.num_matrices(), size});
    return memory(args).holding(name, elements, compute_element(p_.dtype));
  }
  void set_pair(Factor& u, const char* u_name, const MemoryArgs& u_args, Factor& v, const char* v_name,
                const MemoryArgs& v_args, bool shared) const {
    u = {factor(u_name, u_args, u_size(), shared), shared ? 0 : u_size()};
    v = {factor(v_name, v_args, v_size(), shared), shared ? 0 : v_size()};
  }
  static bool together(const char* u_name, const OptionalMemory& u, const char* v_name,
                       const OptionalMemory& v) {
    if (u.has_value() != v.has_value())
      throw std::invalid_argument(std::string(u_name) + " and " + v_name + " go together");
    return u.has_value();
  }
  static void check_one(const char* one, bool has_one, const char* other, bool has_other) {
    if (has_one == has_other)
      throw std::invalid_argument(std::string("either ") + one + ", or " + other + ", must be given");
  }

  std::shared_ptr<WindowsArgs> windows_;  // owns the shifts
  SwinNMF p_;
  i64 elements_per_thread_;
};

#ifdef FK_WITH_CUDA

cuda::Target target(int device, Address stream) { return {device, reinterpret_cast<void*>(stream)}; }

float* scratch(const cuda::Plan& plan, const Memory& work) {
  // The kernels move four numbers of it at a time.
  if (work.address % 16 != 0) throw std::invalid_argument("work must lie on a multiple of 16 bytes");
  return static_cast<float*>(work.holding("work", plan.work, sizeof(float)));
}

void def_cuda(py::module_& m) {
  py::dict limits;
  limits["rank"] = cuda::max_rank;
  limits["rows"] = cuda::max_rows;
  limits["columns"] = cuda::max_columns;
  limits["num_shifts"] = cuda::max_shifts;
  limits["windows"] = cuda::max_windows;
  limits["extent"] = cuda::max_extent;
  m.attr("CUDA_LIMITS") = limits;  // what the CUDA kernels serve, as named in csrc/cuda/windows/limits.h

  m.def(
      "cuda_plan_forward",
      [](const NMFProblem& problem, bool factors) {
        return cuda::plan_forward(problem.description(), factors).work;
      },
      py::arg("problem"), py::arg("factors"),
      "The float32 elements of scratch memory that cuda_swin_nmf_forward takes; factors: it writes u and v.");
  m.def(
      "cuda_plan_backward",
      [](const NMFProblem& problem, i64 processors) {
        const cuda::Plan plan = cuda::plan_backward(problem.description(), processors);
        return std::make_pair(plan.work, plan.sums_dx);
      },
      py::arg("problem"), py::arg("processors"),
      "The same for cuda_swin_nmf_backward on so many multiprocessors, and whether its dx must be float32.");
  m.def(
      "cuda_swin_nmf_forward",
      [](const NMFProblem& problem, int device, Address stream, const MemoryArgs& work,
         const OptionalMemory& y, const OptionalMemory& u, const OptionalMemory& v) {
        SwinNMF p = problem.description();
        problem.set_outputs(p, y, u, v);
        float* const floats = scratch(cuda::plan_forward(p, u.has_value()), memory(work));
        py::gil_scoped_release release;
        cuda::swin_nmf_forward(p, floats, target(device, stream));
      },
      py::arg("problem"), py::arg("device"), py::arg("stream"), py::arg("work"), py::kw_only(),
      py::arg("y") = py::none(), py::arg("u") = py::none(), py::arg("v") = py::none(),
      "Writes y, or u and v.");
  m.def(
      "cuda_swin_nmf_backward",
      [](const NMFProblem& problem, int device, Address stream, const MemoryArgs& work, i64 processors,
         const std::optional<VolumeArgs>& dy, const OptionalMemory& du, const OptionalMemory& dv,
         const MemoryArgs& dx, int dx_dtype_code, const OptionalMemory& du0, const OptionalMemory& dv0) {
        SwinNMF p = problem.description();
        problem.set_loss(p, dy, du, dv);
        const DType dx_dtype = dtype(dx_dtype_code);
        p.dx = problem.contiguous_map("dx", dx, dx_dtype);
        problem.set_factor_grads(p, du0, dv0, false);
        const cuda::Plan plan = cuda::plan_backward(p, processors);
        if (plan.sums_dx && dx_dtype != DType::float32) throw std::invalid_argument("dx must be float32");
        float* const floats = scratch(plan, memory(work));
        py::gil_scoped_release release;
        cuda::swin_nmf_backward(p, plan, floats, dx_dtype, target(device, stream));
      },
      py::arg("problem"), py::arg("device"), py::arg("stream"), py::arg("work"), py::arg("processors"),
      py::kw_only(), py::arg("dy") = py::none(), py::arg("du") = py::none(), py::arg("dv") = py::none(),
      py::arg("dx"), py::arg("dx_dtype"), py::arg("du0") = py::none(), py::arg("dv0") = py::none(),
      "Writes dx, from dy or from du and dv, and each matrix' share of du0 and dv0 where these are given.");
}

#endif

}  // namespace

void def_nmf(py::module_& m) {
  py::class_<NMFOptions>(m, "NMFOptions")
      .def(py::init(&options), py::kw_only(), py::arg("rank"), py::arg("num_iters"), py::arg("solver"),
           py::arg("grad_steps"), py::arg("relu"), py::arg("eps"));
  py::class_<NMFProblem>(
      m, "NMFProblem",
      "Every window of x factorised. u0 and v0: (R, head_dim) and (R, columns), shared by all the matrices, "
      "or "
      "one for each, transposed and contiguous. Addresses are kept, the memory is the caller's.")
      .def(py::init<int, std::shared_ptr<WindowsArgs>, const VolumeArgs&, const MemoryArgs&,
                    const MemoryArgs&, bool, const NMFOptions&>(),
           py::arg("dtype"), py::arg("windows").none(false), py::arg("x"), py::arg("u0"), py::arg("v0"),
           py::arg("shared"), py::arg("options"));

  m.def(
      "swin_nmf_forward",
      [](const NMFProblem& problem, int threads, const OptionalMemory& y, const OptionalMemory& u,
         const OptionalMemory& v) {
        SwinNMF p = problem.on_threads(threads);
        problem.set_outputs(p, y, u, v);
        py::gil_scoped_release release;
        cpu_kernels().swin_nmf_forward(p);
      },
      py::arg("problem"), py::arg("threads"), py::kw_only(), py::arg("y") = py::none(),
      py::arg("u") = py::none(), py::arg("v") = py::none(), "Writes y, or u and v.");

  m.def(
      "swin_nmf_backward",
      [](const NMFProblem& problem, int threads, const std::optional<VolumeArgs>& dy,
         const OptionalMemory& du, const OptionalMemory& dv, const MemoryArgs& dx, const OptionalMemory& du0,
         const OptionalMemory& dv0) {
        SwinNMF p = problem.on_threads(threads);
        problem.set_loss(p, dy, du, dv);
        p.dx = problem.contiguous_map("dx", dx, p.dtype);
        problem.set_factor_grads(p, du0, dv0, problem.shared());
        py::gil_scoped_release release;
        cpu_kernels().swin_nmf_backward(p);
      },
      py::arg("problem"), py::arg("threads"), py::kw_only(), py::arg("dy") = py::none(),
      py::arg("du") = py::none(), py::arg("dv") = py::none(), py::arg("dx"), py::arg("du0") = py::none(),
      py::arg("dv0") = py::none(),
      "Writes dx, and du0 and dv0 where they are given, from dy or from du and dv.");
#ifdef FK_WITH_CUDA
  def_cuda(m);
#endif
}

}  // namespace bindings
}  // namespace factorizer
