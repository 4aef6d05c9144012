"""NMF: the calls of the CUDA kernels, which factorise windows, and what they serve."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.native import Problem, register
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.shared import cuda
from factorizer_kernels.shared.checks import remembered
from factorizer_kernels.shared.native import DTYPE_CODES, memory

native = cuda.native


def limit(x: Tensor, sizes: MatrixSizes) -> str | None:
    """Why the kernels cannot factorise these matrices of x, or None where they can."""
    if (reason := _too_large(x.dtype, x.shape, *sizes)) is not None or not x.is_cuda:
        return reason
    reason = cuda.why_no_code(x.device.index)
    if reason is not None:
        cuda.warn_once(reason)
    return reason


@remembered
def _too_large(dtype: torch.dtype, shape: torch.Size, *fields: Any) -> str | None:
    sizes, limits = MatrixSizes(*fields), native.CUDA_LIMITS
    for name, words in (
        ("rank", "rank"), ("rows", "head_dim (rows)"), ("columns", "columns"), ("num_shifts", "shifts")
    ):  # fmt: skip
        value = getattr(sizes, name)
        if value > limits[name]:
            return f"it takes {words} up to {limits[name]}, got {value}"
    if dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, got float64"
    # While a graph is traced, comparing a size that is left open would bound it; there the module refuses.
    if not torch.compiler.is_compiling():
        windows = sizes.num_shifts * shape.numel() // max(sizes.rows * sizes.columns, 1)
        if windows > limits["windows"] or any(extent > limits["extent"] for extent in shape):
            return f"it takes up to {limits['windows']} windows, and {limits['extent']} voxels along an axis"
    return None


class CudaProblem(Problem):
    @property
    def forward(self) -> Callable[..., None]:
        return self._forward

    def _forward(self, **outputs) -> None:
        work = self.floats(native.cuda_plan_forward(self.native, "u" in outputs))
        with cuda.current(self.x):
            native.cuda_swin_nmf_forward(self.native, *cuda.target(self.x), memory(work), **outputs)

    def loss_gradient(self, dy: Tensor) -> Tensor:
        """Contiguous: a copy costs less than to read single elements, twice the instructions or more."""
        return dy.contiguous()

    def backward(self, factor_grads: bool, **loss) -> tuple[Tensor, Tensor, Tensor]:
        if self.options.constant:
            dx, reached = self.x.new_zeros(self.x.shape), False
        else:
            processors = cuda.processors(self.x)
            work, sums_dx = native.cuda_plan_backward(self.native, processors)
            work = self.floats(work)
            dx = self.x.new_empty(self.x.shape, dtype=torch.float32 if sums_dx else self.x.dtype)
            reached = factor_grads and self.options.grad_steps == self.options.num_iters
            if reached:
                du0, dv0 = self.new_factors()  # each matrix' share
                loss |= {"du0": memory(du0), "dv0": memory(dv0)}
            with cuda.current(self.x):
                native.cuda_swin_nmf_backward(
                    self.native, *cuda.target(self.x), memory(work), processors,
                    dx=memory(dx), dx_dtype=DTYPE_CODES[dx.dtype], **loss,
                )  # fmt: skip
            dx = dx.to(self.x.dtype)
        if reached:
            return dx, *self.factor_grads(du0, dv0)  # the second stage of a sum in a fixed order
        if factor_grads:
            u_shape, v_shape = self.shapes
            return dx, self.u0.new_zeros(u_shape), self.v0.new_zeros(v_shape)
        return dx, *self.no_factor_grads()

    def floats(self, count: int) -> Tensor:
        """Scratch memory of so many float32 elements, on x's device."""
        return self.u0.new_empty((count,))


register("cuda", CudaProblem, limit)
