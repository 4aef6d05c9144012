"""NMF: the calls of the CUDA kernels, which are those of ``swin_nmf`` on one window an item."""

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.native import Factors
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.ops.windows.geometry import Windows, whole_matrices
from factorizer_kernels.ops.windows.native import native_windows
from factorizer_kernels.shared import cuda
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.registry import kernel

# One window in one block, four columns and all the rows in each thread; csrc/cuda/kernels.h has the same.
MAX_ROWS = 8
MAX_COLUMNS = 1024
MAX_RANK = 8
MAX_SHIFTS = 16


def limit(x: Tensor, sizes: MatrixSizes) -> str | None:
    """Why the kernels cannot factorise these matrices of x, or None where they can."""
    for name, value, most in (
        ("rank", sizes.rank, MAX_RANK),
        ("head_dim (rows)", sizes.rows, MAX_ROWS),
        ("columns", sizes.columns, MAX_COLUMNS),
        ("shifts", sizes.num_shifts, MAX_SHIFTS),
    ):
        if value > most:
            return f"it takes {name} up to {most}, got {value}"
    if x.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    # While a graph is traced, comparing a size that is left open would bound it; there the module refuses.
    if not torch.compiler.is_compiling():
        windows = sizes.num_shifts * x.numel() // max(sizes.rows * sizes.columns, 1)
        if windows >= 2**31 or any(extent >= 2**30 for extent in x.shape):
            return "it takes fewer than 2**31 windows, and 2**30 voxels along an axis"
    return cuda.why_no_code(x.device.index) if x.is_cuda else None


class Call:
    """One operator's kernels on a map of windows.

    ``batch`` are the leading dimensions of the matrices, which u0 and v0 broadcast to.
    """

    def __init__(
        self, x: Tensor, windows: Windows, u0: Tensor, v0: Tensor, batch, relu: bool, options: Options
    ):
        self.x, self.options = x, options
        self.batch = tuple(batch)
        self.shapes = (u0.shape, v0.shape)
        factors = Factors(u0, v0, batch)
        self.factors = factors  # the addresses below are theirs
        self.problem = (
            cpu.DTYPE_CODES[x.dtype], native_windows(windows), cpu.volume(x), *factors.arguments(),
            factors.rank, options.num_iters, options.grad_steps, options.hals, relu, options.eps,
        )  # fmt: skip

    def factor_rows(self) -> tuple[Tensor, Tensor]:
        """u (..., R, M) and v (..., R, N) for every matrix, empty."""
        like = self.factors.u0
        return tuple(like.new_empty((*self.batch, *shape[:-3:-1])) for shape in self.shapes)  # type: ignore

    def forward(self, **out: Tensor) -> None:
        """Write y, or u and v laid out like ``factor_rows``."""
        work = self._floats(cuda.native.cuda_plan_forward(*self.problem, "u" in out))
        outputs = {name: cpu.memory(tensor) for name, tensor in out.items()}
        cuda.native.cuda_swin_nmf_forward(*self.problem, *cuda.target(self.x), cpu.memory(work), **outputs)

    def backward(
        self, factor_grads: bool, dy: Tensor | None = None, **grads: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, du0, dv0) from dy, or from du and dv, laid out like ``factor_rows``."""
        if self.options.constant:
            dx = self.x.new_zeros(self.x.shape)
            return dx, *self._no_grads(factor_grads)
        work, sums_dx = cuda.native.cuda_plan_backward(*self.problem, cuda.processors(self.x))
        work = self._floats(work)
        dx = self.x.new_empty(self.x.shape, dtype=torch.float32 if sums_dx else self.x.dtype)
        reached = factor_grads and self.options.grad_steps == self.options.num_iters
        shares = dict(zip(("du0", "dv0"), self.factor_rows(), strict=True)) if reached else {}
        tensors = {**grads, **shares, "dx": dx}
        cuda.native.cuda_swin_nmf_backward(
            *self.problem, *cuda.target(self.x), cpu.memory(work), cuda.processors(self.x),
            cuda.native.Volume(0, 0, [0] * 5) if dy is None else cpu.volume(dy),
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


def _call(x: Tensor, u0: Tensor, v0: Tensor, options) -> Call:
    windows = whole_matrices(x.shape)
    return Call(x.reshape(windows.size), windows, u0, v0, x.shape[:-2], False, Options(*options))


@kernel("nmf", "cuda", limit)
def nmf(x: Tensor, u0: Tensor, v0: Tensor, *options) -> Tensor:
    y = x.new_empty(x.shape)
    _call(x, u0, v0, options).forward(y=y)
    return y


@kernel("nmf_backward", "cuda", limit)
def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(x, u0, v0, options)
    dx, du0, dv0 = call.backward(factor_grads, dy.reshape(call.x.shape))
    return dx.view(x.shape), du0, dv0


@kernel("nmf_factors", "cuda", limit)
def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, *options) -> tuple[Tensor, Tensor]:
    call = _call(x, u0, v0, options)
    u, v = call.factor_rows()
    call.forward(u=u, v=v)
    return u.mT.to(x.dtype).contiguous(), v.mT.to(x.dtype).contiguous()


@kernel("nmf_factors_backward", "cuda", limit)
def nmf_factors_backward(
    du: Tensor, dv: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(x, u0, v0, options)
    du, dv = (grad.mT.to(u0.dtype).contiguous() for grad in (du, dv))
    dx, du0, dv0 = call.backward(factor_grads, du=du, dv=dv)
    return dx.view(x.shape), du0, dv0
