// Chains of maps that treat every voxel alike.
#include "problems/pointwise.h"

#include "bindings/memory.h"
#include "cpu/common/dispatch.h"

namespace factorizer {
namespace bindings {
namespace {

// A map (B, C, voxels) that is read: dtype, address, bytes, and the strides of the first two axes; one that
// is written, contiguous: dtype, address, bytes.
using InputMap = std::tuple<int, Address, i64, i64, i64>;
using OutputMap = std::tuple<int, Address, i64>;

// The matrices and vectors of a chain in the order of the problem's fields, of the arithmetic's type and
// contiguous; None for what is not given.
using Tensors = std::vector<OptionalMemory>;

i64 at_least(i64 least, const char* name, i64 value) {
  if (value < least) refuse(name, least > 0 ? "positive" : "nonnegative", value);
  return value;
}

// What all chains share, checked.
template <class Problem>
struct Call {
  Problem p{};

  Call(int compute, i64 batch, i64 voxels, double eps, int threads) {
    check_threads(threads);
    p.compute = dtype(compute);
    if (p.compute != DType::float32 && p.compute != DType::float64)
      refuse("compute", "float32 or float64", compute);
    p.batch = at_least(0, "batch", batch);
    p.voxels = at_least(0, "voxels", voxels);
    p.eps = eps;
    p.threads = threads;
    bound({batch, voxels});
  }

  // Numbers that the kernels multiply: a map's extent, a worker's or a task's scratch.
  void bound(std::initializer_list<i64> factors) const {
    i64 elements = 1;
    for (i64 n : factors) elements = product({elements, n > 0 ? n : 1});
    if (product({elements, 256}) > limit) throw std::invalid_argument("the call is too large");
  }

  DType map_dtype(const char* name, int code) const {
    const DType type = dtype(code);
    if ((type == DType::float64) != (p.compute == DType::float64))
      throw std::invalid_argument(std::string(name) + " must be float64 if and only if the arithmetic is");
    return type;
  }

  FeatureMap map(const char* name, const InputMap& args, i64 channels, i64 voxels) const {
    const auto& [code, address, bytes, batch, channel] = args;
    const DType type = map_dtype(name, code);
    bound({p.batch, channels, voxels});
    if (batch < 0 || channel < 0)
      throw std::invalid_argument(std::string(name) + " must have no negative stride");
    const bool empty = p.batch == 0 || voxels == 0;
    const i64 last = sum(sum(product({p.batch - 1, batch}), product({channels - 1, channel})), voxels - 1);
    void* data = Memory{address, bytes}.holding(name, empty ? 0 : sum(last, 1), element(type));
    return {data, type, batch, channel};
  }
  FeatureMap map(const char* name, const OutputMap& args, i64 channels, i64 voxels) const {
    const auto& [code, address, bytes] = args;
    return map(name, InputMap{code, address, bytes, channels * voxels, voxels}, channels, voxels);
  }

  // `elements` numbers of the arithmetic's type, or null.
  void* numbers(const char* name, const OptionalMemory& args, i64 elements) const {
    return args ? memory(*args).holding(name, elements, compute_element(p.compute)) : nullptr;
  }
};

struct Field {
  const char* name;
  i64 elements;
  bool optional;
};

// The addresses of a chain's tensors; with a prefix, those of their gradients, which are given all or not at
// all.
template <class Problem>
std::vector<void*> addresses(const Call<Problem>& call, const std::vector<Field>& fields, const Tensors& args,
                             bool gradients) {
  if (args.empty() && gradients) return std::vector<void*>(fields.size());
  if (args.size() != fields.size())
    refuse("tensors", "one for each field of the problem", static_cast<i64>(args.size()));
  std::vector<void*> found;
  for (std::size_t i = 0; i < fields.size(); ++i) {
    const Field& field = fields[i];
    const std::string name = (gradients ? "d" : "") + std::string(field.name);
    call.bound({64, field.elements});
    if (!args[i] && !(field.optional && !gradients)) throw std::invalid_argument(name + " must be given");
    found.push_back(call.numbers(name.c_str(), args[i], field.elements));
  }
  return found;
}

template <class Problem>
void run(void (*CpuKernels::*kernel)(const Problem&), const Problem& p) {
  py::gil_scoped_release release;
  (cpu_kernels().*kernel)(p);
}

// --- norm_linear -----------------------------------------------------------------------------

struct NormLinearCall : Call<NormLinear> {
  bool norm, linear;

  // What is left out has no elements.
  std::vector<Field> fields() const {
    return {{"norm_weight", norm ? p.channels : 0, true},
            {"norm_bias", norm ? p.channels : 0, true},
            {"weight", linear ? product({p.out_channels, p.channels}) : 0, true},
            {"bias", linear ? p.out_channels : 0, true}};
  }

  NormLinearCall(int compute, i64 batch, i64 voxels, i64 channels, i64 out_channels, double eps,
                 const Tensors& weights, int threads)
      : Call(compute, batch, voxels, eps, threads) {
    p.channels = at_least(1, "channels", channels);
    p.out_channels = at_least(1, "out_channels", out_channels);
    bound({p.channels, p.threads});
    bound({p.out_channels, p.threads});
    norm = weights.size() > 0 && weights[0].has_value();
    linear = weights.size() > 2 && weights[2].has_value();
    const auto at = addresses(*this, fields(), weights, false);
    p.norm_weight = at[0], p.norm_bias = at[1], p.weight = at[2], p.bias = at[3];
    if (norm != weights[1].has_value()) throw std::invalid_argument("norm_weight and norm_bias go together");
    if (!norm && !linear) throw std::invalid_argument("norm_weight or weight must be given");
    if (!linear && out_channels != channels)
      refuse("out_channels", "channels where there is no weight", out_channels);
  }

  // Of what is left out no gradient is written, whatever is given.
  void gradients(const Tensors& args) {
    if (args.empty()) return;
    const std::vector<Field> wanted = fields();
    if (args.size() != wanted.size()) refuse("gradients", "four", static_cast<i64>(args.size()));
    void* at[4] = {};
    for (int i = 0; i < 4; ++i) {
      if (wanted[i].elements == 0) continue;
      const std::string name = "d" + std::string(wanted[i].name);
      if (!args[i]) throw std::invalid_argument(name + " must be given");
      at[i] = numbers(name.c_str(), args[i], wanted[i].elements);
    }
    p.dnorm_weight = at[0], p.dnorm_bias = at[1], p.dweight = at[2], p.dbias = at[3];
  }
};

void def_norm_linear(py::module_& m) {
  m.def(
      "norm_linear_forward",
      [](int compute, i64 batch, i64 voxels, i64 channels, i64 out_channels, double eps,
         const Tensors& weights, const InputMap& x, const OutputMap& y, int threads) {
        NormLinearCall call(compute, batch, voxels, channels, out_channels, eps, weights, threads);
        call.p.x = call.map("x", x, channels, voxels);
        call.p.y = call.map("y", y, out_channels, voxels);
        run(&CpuKernels::norm_linear_forward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("voxels"), py::arg("channels"), py::arg("out_channels"),
      py::arg("eps"), py::arg("weights"), py::arg("x"), py::arg("y"), py::arg("threads"), "Writes y.");
  m.def(
      "norm_linear_backward",
      [](int compute, i64 batch, i64 voxels, i64 channels, i64 out_channels, double eps,
         const Tensors& weights, const InputMap& dy, const InputMap& x, const std::optional<InputMap>& addend,
         const OutputMap& dx, const Tensors& gradients, int threads) {
        NormLinearCall call(compute, batch, voxels, channels, out_channels, eps, weights, threads);
        call.p.dy = call.map("dy", dy, out_channels, voxels);
        call.p.x = call.map("x", x, channels, voxels);
        if (addend) call.p.addend = call.map("addend", *addend, channels, voxels);
        call.p.dx = call.map("dx", dx, channels, voxels);
        call.gradients(gradients);
        run(&CpuKernels::norm_linear_backward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("voxels"), py::arg("channels"), py::arg("out_channels"),
      py::arg("eps"), py::arg("weights"), py::arg("dy"), py::arg("x"), py::arg("addend"), py::arg("dx"),
      py::arg("gradients"), py::arg("threads"),
      "Writes dx, with the addend where there is one, and the gradients of the weights where they are not an "
      "empty list.");
}

// --- linear_norm_mlp -------------------------------------------------------------------------

struct LinearNormMLPCall : Call<LinearNormMLP> {
  std::vector<Field> fields() const {
    return {{"weight", product({p.channels, p.in_channels}), false},
            {"bias", p.channels, true},
            {"norm_weight", p.channels, false},
            {"norm_bias", p.channels, false},
            {"weight1", product({p.hidden, p.channels}), false},
            {"bias1", p.hidden, true},
            {"weight2", product({p.channels, p.hidden}), false},
            {"bias2", p.channels, true}};
  }

  LinearNormMLPCall(int compute, i64 batch, i64 voxels, i64 in_channels, i64 channels, i64 hidden, double eps,
                    const Tensors& weights, int threads)
      : Call(compute, batch, voxels, eps, threads) {
    p.in_channels = at_least(1, "in_channels", in_channels);
    p.channels = at_least(1, "channels", channels);
    p.hidden = at_least(1, "hidden", hidden);
    bound({p.in_channels, p.threads});
    bound({8, p.channels, p.threads});
    const auto at = addresses(*this, fields(), weights, false);
    p.weight = at[0], p.bias = at[1], p.norm_weight = at[2], p.norm_bias = at[3];
    p.weight1 = at[4], p.bias1 = at[5], p.weight2 = at[6], p.bias2 = at[7];
  }

  void gradients(const Tensors& args) {
    const auto at = addresses(*this, fields(), args, true);
    p.dweight = at[0], p.dbias = at[1], p.dnorm_weight = at[2], p.dnorm_bias = at[3];
    p.dweight1 = at[4], p.dbias1 = at[5], p.dweight2 = at[6], p.dbias2 = at[7];
  }
};

void def_linear_norm_mlp(py::module_& m) {
  m.def(
      "linear_norm_mlp_forward",
      [](int compute, i64 batch, i64 voxels, i64 in_channels, i64 channels, i64 hidden, double eps,
         const Tensors& weights, const InputMap& y, const InputMap& x, const OutputMap& out, int threads) {
        LinearNormMLPCall call(compute, batch, voxels, in_channels, channels, hidden, eps, weights, threads);
        call.p.y = call.map("y", y, in_channels, voxels);
        call.p.x = call.map("x", x, channels, voxels);
        call.p.out = call.map("out", out, channels, voxels);
        run(&CpuKernels::linear_norm_mlp_forward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("voxels"), py::arg("in_channels"), py::arg("channels"),
      py::arg("hidden"), py::arg("eps"), py::arg("weights"), py::arg("y"), py::arg("x"), py::arg("out"),
      py::arg("threads"), "Writes out.");
  m.def(
      "linear_norm_mlp_backward",
      [](int compute, i64 batch, i64 voxels, i64 in_channels, i64 channels, i64 hidden, double eps,
         const Tensors& weights, const InputMap& dout, const InputMap& y, const InputMap& x,
         const OutputMap& dy, const OutputMap& dx, const Tensors& gradients, int threads) {
        LinearNormMLPCall call(compute, batch, voxels, in_channels, channels, hidden, eps, weights, threads);
        call.p.dout = call.map("dout", dout, channels, voxels);
        call.p.y = call.map("y", y, in_channels, voxels);
        call.p.x = call.map("x", x, channels, voxels);
        call.p.dy = call.map("dy", dy, in_channels, voxels);
        call.p.dx = call.map("dx", dx, channels, voxels);
        call.gradients(gradients);
        run(&CpuKernels::linear_norm_mlp_backward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("voxels"), py::arg("in_channels"), py::arg("channels"),
      py::arg("hidden"), py::arg("eps"), py::arg("weights"), py::arg("dout"), py::arg("y"), py::arg("x"),
      py::arg("dy"), py::arg("dx"), py::arg("gradients"), py::arg("threads"),
      "Writes dy and dx, and the gradients of the weights where they are not an empty list.");
}

// --- join and patch_conv ---------------------------------------------------------------------

// size: of the coarse grid. scale: fine voxels along each axis of a coarse one.
template <class Problem>
struct BlocksCall : Call<Problem> {
  i64 coarse, fine;  // voxels
  using Call<Problem>::p;

  BlocksCall(int compute, i64 batch, const std::array<i64, 3>& size, const std::array<i64, 3>& scale,
             int threads)
      : Call<Problem>(compute, batch, 0, 0.0, threads), coarse(1), fine(1) {
    for (int axis = 0; axis < 3; ++axis) {
      p.size[axis] = at_least(0, "size", size[axis]);
      p.scale[axis] = at_least(1, "scale", scale[axis]);
      coarse = product({coarse, p.size[axis]});
      fine = product({fine, p.size[axis], p.scale[axis]});
    }
    // Each of an empty grid too, whose voxels are none.
    this->bound({batch, p.size[0], p.size[1], p.size[2], p.scale[0], p.scale[1], p.scale[2]});
    p.voxels = coarse;
  }
};

struct JoinCall : BlocksCall<Join> {
  std::vector<Field> fields() const {
    return {{"weight_skip", product({p.out_channels, p.skip_channels}), false},
            {"weight_x", product({p.channels, p.out_channels, p.block()}), false},
            {"bias", p.out_channels, true}};
  }

  JoinCall(int compute, i64 batch, i64 skip_channels, i64 channels, i64 out_channels,
           const std::array<i64, 3>& size, const std::array<i64, 3>& scale, const Tensors& weights,
           int threads)
      : BlocksCall(compute, batch, size, scale, threads) {
    p.skip_channels = at_least(1, "skip_channels", skip_channels);
    p.channels = at_least(1, "channels", channels);
    p.out_channels = at_least(1, "out_channels", out_channels);
    bound({p.out_channels, p.block(), p.threads});
    bound({2 * p.channels, p.threads});
    bound({p.skip_channels, p.scale[2], p.threads});
    const auto at = addresses(*this, fields(), weights, false);
    p.skip_weight = at[0], p.weight = at[1], p.bias = at[2];
  }

  void gradients(const Tensors& args) {
    const auto at = addresses(*this, fields(), args, true);
    p.dskip_weight = at[0], p.dweight = at[1], p.dbias = at[2];
  }
};

void def_join(py::module_& m) {
  m.def(
      "join_forward",
      [](int compute, i64 batch, i64 skip_channels, i64 channels, i64 out_channels,
         const std::array<i64, 3>& size, const std::array<i64, 3>& scale, const Tensors& weights,
         const InputMap& skip, const InputMap& x, const OutputMap& y, int threads) {
        JoinCall call(compute, batch, skip_channels, channels, out_channels, size, scale, weights, threads);
        call.p.skip = call.map("skip", skip, skip_channels, call.fine);
        call.p.x = call.map("x", x, channels, call.coarse);
        call.p.y = call.map("y", y, out_channels, call.fine);
        run(&CpuKernels::join_forward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("skip_channels"), py::arg("channels"),
      py::arg("out_channels"), py::arg("size"), py::arg("scale"), py::arg("weights"), py::arg("skip"),
      py::arg("x"), py::arg("y"), py::arg("threads"), "Writes y.");
  m.def(
      "join_backward",
      [](int compute, i64 batch, i64 skip_channels, i64 channels, i64 out_channels,
         const std::array<i64, 3>& size, const std::array<i64, 3>& scale, const Tensors& weights,
         const InputMap& dy, const InputMap& skip, const InputMap& x, const OutputMap& dskip,
         const OutputMap& dx, const Tensors& gradients, int threads) {
        JoinCall call(compute, batch, skip_channels, channels, out_channels, size, scale, weights, threads);
        call.p.dy = call.map("dy", dy, out_channels, call.fine);
        call.p.skip = call.map("skip", skip, skip_channels, call.fine);
        call.p.x = call.map("x", x, channels, call.coarse);
        call.p.dskip = call.map("dskip", dskip, skip_channels, call.fine);
        call.p.dx = call.map("dx", dx, channels, call.coarse);
        call.gradients(gradients);
        run(&CpuKernels::join_backward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("skip_channels"), py::arg("channels"),
      py::arg("out_channels"), py::arg("size"), py::arg("scale"), py::arg("weights"), py::arg("dy"),
      py::arg("skip"), py::arg("x"), py::arg("dskip"), py::arg("dx"), py::arg("gradients"),
      py::arg("threads"),
      "Writes dskip and dx, and the gradients of the weights where they are not an empty list.");
}

struct PatchConvCall : BlocksCall<PatchConv> {
  std::vector<Field> fields() const {
    return {{"weight", product({p.out_channels, p.channels, p.block()}), false},
            {"bias", p.out_channels, true}};
  }

  PatchConvCall(int compute, i64 batch, i64 channels, i64 out_channels, const std::array<i64, 3>& size,
                const std::array<i64, 3>& scale, const Tensors& weights, int threads)
      : BlocksCall(compute, batch, size, scale, threads) {
    p.channels = at_least(1, "channels", channels);
    p.out_channels = at_least(1, "out_channels", out_channels);
    bound({p.channels, p.block(), p.threads});
    bound({p.out_channels, p.threads});
    const auto at = addresses(*this, fields(), weights, false);
    p.weight = at[0], p.bias = at[1];
  }

  void gradients(const Tensors& args) {
    const auto at = addresses(*this, fields(), args, true);
    p.dweight = at[0], p.dbias = at[1];
  }
};

void def_patch_conv(py::module_& m) {
  m.def(
      "patch_conv_forward",
      [](int compute, i64 batch, i64 channels, i64 out_channels, const std::array<i64, 3>& size,
         const std::array<i64, 3>& scale, const Tensors& weights, const InputMap& x, const OutputMap& y,
         int threads) {
        PatchConvCall call(compute, batch, channels, out_channels, size, scale, weights, threads);
        call.p.x = call.map("x", x, channels, call.fine);
        call.p.y = call.map("y", y, out_channels, call.coarse);
        run(&CpuKernels::patch_conv_forward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("channels"), py::arg("out_channels"), py::arg("size"),
      py::arg("scale"), py::arg("weights"), py::arg("x"), py::arg("y"), py::arg("threads"), "Writes y.");
  m.def(
      "patch_conv_backward",
      [](int compute, i64 batch, i64 channels, i64 out_channels, const std::array<i64, 3>& size,
         const std::array<i64, 3>& scale, const Tensors& weights, const InputMap& dy, const InputMap& x,
         const OutputMap& dx, const Tensors& gradients, int threads) {
        PatchConvCall call(compute, batch, channels, out_channels, size, scale, weights, threads);
        call.p.dy = call.map("dy", dy, out_channels, call.coarse);
        call.p.x = call.map("x", x, channels, call.fine);
        call.p.dx = call.map("dx", dx, channels, call.fine);
        call.gradients(gradients);
        run(&CpuKernels::patch_conv_backward, call.p);
      },
      py::arg("compute"), py::arg("batch"), py::arg("channels"), py::arg("out_channels"), py::arg("size"),
      py::arg("scale"), py::arg("weights"), py::arg("dy"), py::arg("x"), py::arg("dx"), py::arg("gradients"),
      py::arg("threads"), "Writes dx, and the gradients of the weights where they are not an empty list.");
}

}  // namespace

void def_pointwise(py::module_& m) {
  def_norm_linear(m);
  def_linear_norm_mlp(m);
  def_join(m);
  def_patch_conv(m);
}

}  // namespace bindings
}  // namespace factorizer
