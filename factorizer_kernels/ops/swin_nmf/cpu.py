"""Shifted-window NMF: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.ops.windows.geometry import matricized_shape
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared import registry


def swin_nmf(x: Tensor, u0, v0, head_dim, patch_size, shifts, relu, num_iters, solver, eps) -> Tensor:
    y = x.new_empty(x.shape)
    factors = cpu.Factors(u0, v0, matricized_shape(x.shape, head_dim, patch_size, len(shifts))[:2])
    cut = cpu.windows(x.shape, head_dim, patch_size, shifts)
    cpu.native.swin_nmf_forward(
        cpu.DTYPE_CODES[x.dtype], cut, cpu.volume(x), *factors.arguments(), factors.rank,
        num_iters, solver == "hals", relu, eps, cpu.threads(), y=cpu.memory(y),
    )  # fmt: skip
    return y


def swin_nmf_backward(
    dy: Tensor,
    x: Tensor,
    u0,
    v0,
    head_dim,
    patch_size,
    shifts,
    relu,
    num_iters,
    solver,
    grad_steps,
    eps,
    factor_grads,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    factors = cpu.Factors(u0, v0, matricized_shape(x.shape, head_dim, patch_size, len(shifts))[:2])
    du0, dv0 = factors.new_grads(factor_grads)
    cut = cpu.windows(x.shape, head_dim, patch_size, shifts)
    cpu.native.swin_nmf_backward(
        cpu.DTYPE_CODES[x.dtype], cut, cpu.volume(x), *factors.arguments(), factors.rank,
        num_iters, grad_steps, solver == "hals", relu, eps, cpu.threads(), dy=cpu.volume(dy),
        dx=cpu.memory(dx), du0=cpu.memory(du0), dv0=cpu.memory(dv0),
    )  # fmt: skip
    return dx, *factors.grads(du0, dv0, factor_grads)


if cpu.native is not None:
    registry.kernel("swin_nmf", "cpu")(swin_nmf)
    registry.kernel("swin_nmf_backward", "cpu")(swin_nmf_backward)
