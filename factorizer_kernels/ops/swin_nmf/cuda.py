"""Shifted-window NMF: the calls of the CUDA kernels."""

from torch import Tensor

from factorizer_kernels.ops.windows.geometry import matricized_shape
from factorizer_kernels.shared import cuda, registry
from factorizer_kernels.shared import native as cpu


def _call(x, u0, v0, head_dim, patch_size, shifts, relu, num_iters, solver, grad_steps, eps) -> cuda.Call:
    batch = matricized_shape(x.shape, head_dim, patch_size, len(shifts))[:2]
    windows = cpu.windows(x.shape, head_dim, patch_size, shifts)
    return cuda.Call(x, windows, u0, v0, batch, num_iters, grad_steps, solver == "hals", relu, eps)


def swin_nmf(
    x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts, relu, num_iters, solver, eps
) -> Tensor:
    y = x.new_empty(x.shape)
    call = _call(x, u0, v0, head_dim, patch_size, shifts, relu, num_iters, solver, num_iters, eps)
    call.forward(y=y)
    return y


def swin_nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts,
    relu, num_iters, solver, grad_steps, eps, factor_grads,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(x, u0, v0, head_dim, patch_size, shifts, relu, num_iters, solver, grad_steps, eps)
    return call.backward(factor_grads, dy)


if cuda.native is not None:
    registry.kernel("swin_nmf", "cuda", cuda.limit)(swin_nmf)
    registry.kernel("swin_nmf_backward", "cuda", cuda.limit)(swin_nmf_backward)
