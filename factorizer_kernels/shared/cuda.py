"""The compiled module's CUDA kernels: what they serve, and what they are called with."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.registry import Matrices

# One window in one block, four columns and all the rows in each thread; csrc/cuda/kernels.h has the same.
MAX_ROWS = 8
MAX_COLUMNS = 1024
MAX_RANK = 8
MAX_COPIES = 16

native: Any = cpu.native if hasattr(cpu.native, "cuda_architectures") else None
missing: str | None = None
if native is None:
    missing = cpu.missing and f"the compiled module is missing ({cpu.missing})"
    missing = missing or "the module was compiled without nvcc"
    missing += ": reinstall with nvcc on PATH and FACTORIZER_KERNELS_CUDA=1"


def limit(x: Tensor, matrices: Matrices) -> str | None:
    """The rule: what the kernels do not serve of x and its matrices, or None."""
    for name, value, most in (
        ("rank", matrices.rank, MAX_RANK),
        ("head_dim (rows)", matrices.rows, MAX_ROWS),
        ("columns", matrices.columns, MAX_COLUMNS),
        ("shifted copies", matrices.copies, MAX_COPIES),
    ):
        if value > most:
            return f"it takes {name} up to {most}, got {value}"
    if x.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    # While a graph is traced, comparing a size that is left open would bound it; there the module refuses.
    if not torch.compiler.is_compiling():
        windows = matrices.copies * x.numel() // max(matrices.rows * matrices.columns, 1)
        if windows >= 2**31 or any(extent >= 2**30 for extent in x.shape):
            return "it takes fewer than 2**31 windows, and 2**30 voxels along an axis"
    return without_code(x.device.index) if x.is_cuda else None


def without_code(device: int) -> str | None:
    """Why no kernel runs on the device of this index, or None where they do."""
    return _without_code(device)


# Dynamo cannot trace into the compiled module. This is torch.compiler.assume_constant_result, which would
# import Dynamo, and that takes seconds.
without_code._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _without_code(device: int) -> str | None:
    driver, runtime = native.cuda_versions()
    outdated = (
        f"the driver knows CUDA up to {driver // 1000}.{driver % 1000 // 10}, and the kernels were "
        f"compiled with {runtime // 1000}.{runtime % 1000 // 10}: update the driver, or reinstall with "
        "an older nvcc"
    )
    if driver // 1000 < runtime // 1000:
        return outdated
    major, minor = torch.cuda.get_device_capability(device)
    text = native.cuda_architectures()
    architectures = [int(word) for word in text.rstrip("+").split(",")]
    if any(a // 10 == major and a % 10 <= minor for a in architectures):
        return None
    if text.endswith("+") and 10 * major + minor >= min(architectures):
        # From the PTX of the lowest, which the driver compiles unless it is older than the PTX.
        return None if driver >= runtime else outdated
    return (
        f"the kernels were compiled for the compute capabilities {text}, and "
        f"{torch.cuda.get_device_name(device)} has {major}.{minor}: reinstall with "
        f"FACTORIZER_KERNELS_CUDA_ARCHS={major}{minor}"
    )


def target(x: Tensor) -> tuple[int, int]:
    """(device index, handle of its current stream): where a launch for x belongs."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count


class Call:
    """One operator's kernels on a map of windows.

    ``batch`` are the leading dimensions of the matrices, which u0 and v0 broadcast to.
    """

    def __init__(
        self, x: Tensor, windows, u0: Tensor, v0: Tensor, batch, num_iters, grad_steps, hals, relu, eps
    ):
        self.x = x
        self.batch = tuple(batch)
        self.shapes = (u0.shape, v0.shape)
        factors = cpu.Factors(u0, v0, batch)
        self.factors = factors  # the addresses below are theirs
        self.problem = (
            cpu.DTYPE_CODES[x.dtype], windows, cpu.volume(x), *factors.arguments(), factors.rank,
            num_iters, grad_steps, hals, relu, eps,
        )  # fmt: skip

    def factor_rows(self) -> tuple[Tensor, Tensor]:
        """u (..., R, M) and v (..., R, N) for every matrix, empty."""
        like = self.factors.u0
        return tuple(like.new_empty((*self.batch, *shape[:-3:-1])) for shape in self.shapes)  # type: ignore

    def forward(self, **out: Tensor) -> None:
        """Write y, or u and v as of ``factor_rows``."""
        work = self._floats(native.cuda_plan_forward(*self.problem, "u" in out))
        outputs = {name: cpu.memory(tensor) for name, tensor in out.items()}
        native.cuda_swin_nmf_forward(*self.problem, *target(self.x), cpu.memory(work), **outputs)

    def backward(
        self, factor_grads: bool, dy: Tensor | None = None, **grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, du0, dv0) from dy, or from du and dv, laid out as of ``factor_rows``."""
        _, _, _, _, _, _, num_iters, grad_steps, *_ = self.problem
        if grad_steps == 0 < num_iters:  # every factor is a constant
            dx = self.x.new_zeros(self.x.shape)
            return dx, *self._no_grads(factor_grads)
        work, sums_dx = native.cuda_plan_backward(*self.problem, processors(self.x))
        work = self._floats(work)
        dx = self.x.new_empty(self.x.shape, dtype=torch.float32 if sums_dx else self.x.dtype)
        reached = factor_grads and grad_steps == num_iters
        shares = dict(zip(("du0", "dv0"), self.factor_rows(), strict=True)) if reached else {}
        tensors = {**grads, **shares, "dx": dx}
        native.cuda_swin_nmf_backward(
            *self.problem, *target(self.x), cpu.memory(work), processors(self.x),
            native.Volume(0, 0, [0] * 5) if dy is None else cpu.volume(dy),
            dx_dtype=cpu.DTYPE_CODES[dx.dtype],
            **{name: cpu.memory(tensor) for name, tensor in tensors.items()},
        )  # fmt: skip
        dx = dx.to(self.x.dtype)
        if not reached:
            return dx, *self._no_grads(factor_grads)
        # The second stage of a sum in a fixed order.
        du0, dv0 = (
            share.mT.sum_to_size(shape).contiguous()
            for share, shape in zip(shares.values(), self.shapes, strict=True)
        )
        return dx, du0, dv0

    def _no_grads(self, wanted: bool) -> tuple[Tensor, Tensor]:
        like = self.factors.u0
        u_shape, v_shape = self.shapes if wanted else ((0,), (0,))
        return like.new_zeros(u_shape), like.new_zeros(v_shape)

    def _floats(self, count: int) -> Tensor:
        return self.x.new_empty((count,), dtype=torch.float32)
