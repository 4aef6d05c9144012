"""Shifted-window NMF: the calls of the CUDA kernels."""

from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.cuda import Call, limit
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared.registry import kernel


@kernel("swin_nmf", "cuda", limit)
def swin_nmf(x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts, relu, *options) -> Tensor:
    windows = Windows(x.shape, head_dim, patch_size, shifts)
    y = x.new_empty(x.shape)
    Call(x, windows, u0, v0, windows.batch_shape, relu, Options(*options)).forward(y=y)
    return y


@kernel("swin_nmf_backward", "cuda", limit)
def swin_nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads, head_dim, patch_size, shifts, relu, *options
) -> tuple[Tensor, Tensor, Tensor]:
    windows = Windows(x.shape, head_dim, patch_size, shifts)
    return Call(x, windows, u0, v0, windows.batch_shape, relu, Options(*options)).backward(factor_grads, dy)
