"""Shifted-window NMF: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.native import Factors
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.native import native_windows
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.registry import kernel


@kernel("swin_nmf", "cpu")
def swin_nmf(x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts, relu, *options) -> Tensor:
    windows, chosen = Windows(x.shape, head_dim, patch_size, shifts), Options(*options)
    y = x.new_empty(x.shape)
    factors = Factors(u0, v0, windows.batch_shape)
    cpu.native.swin_nmf_forward(
        cpu.DTYPE_CODES[x.dtype], native_windows(windows), cpu.volume(x), *factors.arguments(), factors.rank,
        chosen.num_iters, chosen.hals, relu, chosen.eps, cpu.threads(), y=cpu.memory(y),
    )  # fmt: skip
    return y


@kernel("swin_nmf_backward", "cpu")
def swin_nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads, head_dim, patch_size, shifts, relu, *options
) -> tuple[Tensor, Tensor, Tensor]:
    windows, chosen = Windows(x.shape, head_dim, patch_size, shifts), Options(*options)
    dx = x.new_empty(x.shape)
    factors = Factors(u0, v0, windows.batch_shape)
    du0, dv0 = factors.new_grads(factor_grads)
    cpu.native.swin_nmf_backward(
        cpu.DTYPE_CODES[x.dtype], native_windows(windows), cpu.volume(x), *factors.arguments(), factors.rank,
        chosen.num_iters, chosen.grad_steps, chosen.hals, relu, chosen.eps, cpu.threads(), dy=cpu.volume(dy),
        dx=cpu.memory(dx), du0=cpu.memory(du0), dv0=cpu.memory(dv0),
    )  # fmt: skip
    return dx, *factors.grads(du0, dv0, factor_grads)
