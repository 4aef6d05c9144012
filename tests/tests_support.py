"""Helpers that several test modules share."""

import math
from typing import NamedTuple

import torch

import factorizer_kernels as fk
from factorizer_kernels.shared import native


class Outcome(NamedTuple):
    values: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]


def grads_of(backend, function, inputs, losses, options) -> Outcome:
    """Values of ``function`` under ``backend`` and the gradients of Σ value·loss; absent ones are zeros."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with fk.use_backend(backend):
        out = function(*leaves, **options)
    values = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(values, leaves, losses, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)
    ]
    return Outcome(tuple(v.detach() for v in values), tuple(gradients))


def away_from_dead_components(expected, function, inputs, losses, options, tolerance=1e-9) -> bool:
    """Whether the reference's result stands still when x moves by 1e-12; else rounding decides it."""
    x, *factors = inputs
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    moved = grads_of("reference", function, (x * (1 + 1e-12 * noise), *factors), losses, options)
    scale = expected.gradients[0].norm()
    pairs = [
        *zip(moved.values, expected.values, strict=True),
        *zip(moved.gradients, expected.gradients, strict=True),
    ]
    return all((a - b).norm() <= tolerance * max(b.norm(), scale) for a, b in pairs)


def defined_operators() -> set[str]:
    """The names of the operators in torch's registry, without the namespace."""
    prefix = "factorizer_kernels::"
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


# --- Special values ------------------------------------------------------------------------------

CUT = {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}
MAP = (1, 4, 8, 8)


def special_maps() -> dict[str, torch.Tensor]:
    """Feature maps in float32 of windows that kernels have stumbled over, cut by ``CUT``."""
    maps = {name: torch.rand(MAP, generator=torch.Generator().manual_seed(3)) for name in SPECIAL}
    maps["zeros"][:] = 0
    maps["a zero window"][..., :6, :6] = 0  # in either copy
    maps["negative, zero after relu"] *= -1
    maps["zero columns"][..., ::2] = 0
    maps["zero rows"][:, 1:3] = 0
    single = maps["single entries"]
    single[:] = 0
    single[0, 1, 2, 3], single[0, 3, 7, 7] = 2.0, 1e-3
    maps["subnormal"] *= 1e-40
    maps["tiny"] *= 1e-12
    maps["1e30"] *= 1e30
    maps["1e30 beside 1e-30"][..., ::3] *= 1e30
    maps["1e30 beside 1e-30"][..., 1::3] *= 1e-30
    maps["1e15"] *= 1e15
    return maps


SPECIAL = (
    "zeros", "a zero window", "negative, zero after relu", "zero columns", "zero rows", "single entries",
    "subnormal", "tiny", "1e15", "1e30", "1e30 beside 1e-30",
)  # fmt: skip


def check_special(backend, name, solver, rank, device="cpu"):
    """Finite and the same wherever the reference, in the same dtype, is finite."""
    x = special_maps()[name]
    generator = torch.Generator().manual_seed(rank)
    u0, v0 = torch.rand(4, rank, generator=generator), torch.rand(16, rank, generator=generator)
    dy = torch.randn(MAP, generator=generator)
    x, u0, v0, dy = (t.to(device) for t in (x, u0, v0, dy))
    options = {**CUT, "solver": solver, "num_iters": 3}
    expected = grads_of("reference", lambda *t, **o: fk.swin_nmf(*t, **o), (x, u0, v0), (dy,), options)
    result = grads_of(backend, lambda *t, **o: fk.swin_nmf(*t, **o), (x, u0, v0), (dy,), options)
    (y,), (wanted,) = result.values, expected.values
    assert y[wanted.isfinite()].isfinite().all()
    assert (y[wanted.isfinite()] >= 0).all()
    assert result.gradients[0][expected.gradients[0].isfinite()].isfinite().all()
    if wanted.isfinite().all() and rank == 1:  # of more components some die here, where rounding decides
        # Three iterations of some ten roundings each, in sums of 16 columns.
        torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5 * wanted.max().item())


def check_spoiled_voxel(backend, value, solver, rank, act="relu"):
    """A NaN or infinity spoils the windows that hold it, at most, in the value and in x's gradient."""
    generator = torch.Generator().manual_seed(5)
    x, dy = (torch.rand(MAP, generator=generator) for _ in range(2))
    u0, v0 = torch.rand(4, rank, generator=generator), torch.rand(16, rank, generator=generator)
    options = {**CUT, "solver": solver, "num_iters": 2, "act": act}
    clean = grads_of(backend, fk.swin_nmf, (x, u0, v0), (dy,), options)
    x[0, 1, 3, 6] = value
    spoiled = grads_of(backend, fk.swin_nmf, (x, u0, v0), (dy,), options)
    reached = torch.zeros(MAP, dtype=torch.bool)
    reached[..., :4, 4:8] = True  # the window of the unshifted copy
    # Rolled by 2 the voxel is at (5, 0): window (1, 0) of the copy, voxels 2..5 and -2..1 of the map.
    reached[..., 2:6, [6, 7, 0, 1]] = True
    for ours, before in ((spoiled.values[0], clean.values[0]), (spoiled.gradients[0], clean.gradients[0])):
        assert torch.equal(ours[~reached], before[~reached])
    if math.isnan(value):
        assert spoiled.values[0][0, 1, 3, 6].isnan()
        assert spoiled.gradients[0][0, 1, 3, 6].isnan()  # the ReLU's mask does not hide it


class NativeCall:
    """A right call of the compiled module: a 1 x 8 x 4 x 6 map, windows of 4 x 2 x 3, two shifts, rank 2."""

    def __init__(self, per_matrix=False):
        matrices = 2 * 2 * 4
        lead = (matrices,) if per_matrix else ()
        self.tensors = {
            "x": torch.rand(1, 8, 1, 4, 6), "dy": torch.rand(1, 8, 1, 4, 6),
            "u0": torch.rand(*lead, 2, 4), "v0": torch.rand(*lead, 2, 6),
            "du": torch.rand(matrices, 2, 4), "dv": torch.rand(matrices, 2, 6),
            "y": torch.full((192,), 7.0), "dx": torch.full((192,), 7.0), "z": torch.full((384,), 7.0),
            "u": torch.full((matrices, 2, 4), 7.0), "v": torch.full((matrices, 2, 6), 7.0),
            "du0": torch.full((*lead, 2, 4), 7.0), "dv0": torch.full((*lead, 2, 6), 7.0),
        }  # fmt: skip
        self.before = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.windows = {
            "batch": 1, "heads": 2, "head_dim": 4, "size": [1, 4, 6], "patch": [1, 2, 3],
            "shifts": [0, 0, 0, 0, 1, 2],
        }  # fmt: skip
        self.memory = {name: native.memory(tensor) for name, tensor in self.tensors.items()}
        self.map_stride = {name: list(self.tensors[name].stride()) for name in ("x", "dy")}
        self.options = {
            "rank": 2, "num_iters": 2, "solver": "hals", "grad_steps": 1, "relu": True, "eps": 1e-16,
        }  # fmt: skip
        self.dtype, self.shared, self.threads = 0, not per_matrix, 2

    def written(self):
        """The tensors that are no longer what they were."""
        return {name for name, tensor in self.tensors.items() if not torch.equal(tensor, self.before[name])}

    def volume(self, name):
        memory = self.memory[name]
        return None if memory is None else (*memory, self.map_stride[name])

    def problem(self):
        module = native.native
        return module.NMFProblem(
            self.dtype, module.Windows(**self.windows), self.volume("x"), self.memory["u0"],
            self.memory["v0"], self.shared, module.NMFOptions(**self.options),
        )  # fmt: skip

    def run(self, operator):
        """The factors' operators are those of ``swin_nmf`` with u and v in place of y."""
        module, memory = native.native, self.memory
        if operator.startswith("sw_"):
            windows = module.Windows(**self.windows)
            getattr(module, operator)(self.dtype, windows, self.volume("x"), memory["z"], 1.0, self.threads)
            return
        problem = self.problem()
        gradients = {name: memory[name] for name in ("dx", "du0", "dv0")}
        if operator == "forward":
            module.swin_nmf_forward(problem, self.threads, y=memory["y"])
        elif operator == "factors":
            module.swin_nmf_forward(problem, self.threads, u=memory["u"], v=memory["v"])
        elif operator == "backward":
            module.swin_nmf_backward(problem, self.threads, **gradients, dy=self.volume("dy"))
        else:
            module.swin_nmf_backward(problem, self.threads, **gradients, du=memory["du"], dv=memory["dv"])


# What NativeCall runs: what it reads, and what it writes
NATIVE_OPERATORS = {
    "forward": (["x", "u0", "v0"], ["y"]),
    "factors": (["x", "u0", "v0"], ["u", "v"]),
    "backward": (["x", "u0", "v0", "dy"], ["dx", "du0", "dv0"]),
    "factors backward": (["x", "u0", "v0", "du", "dv"], ["dx", "du0", "dv0"]),
    "sw_matricize": (["x"], ["z"]),
    "sw_dematricize": (["z"], ["x"]),
}


class Scaled(torch.nn.Module):
    """Three times another layer, with that one's weight and bias, as adapters for fine-tuning are."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, torch.nn.Parameter(torch.tensor(3.0))

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.scale * self.base(x)
