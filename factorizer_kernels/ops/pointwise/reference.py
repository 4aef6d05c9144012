"""The pointwise operators in plain PyTorch: the definition, on any device, differentiable to any order."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from factorizer_kernels.ops.pointwise.spec import coarse_size, fine_size
from factorizer_kernels.shared.dtypes import autocast_disabled, compute_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """W x + b of x (B, C, V), in that dtype."""
    return weight.to(dtype) @ x.to(dtype) + bias.to(dtype)[:, None]


def standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, C, V) with zero mean and unit variance over its channels, and the factor that did the latter."""
    x = x.to(compute_dtype(x.dtype))
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale


def blocks_of(x: Tensor, kernel: Sequence[int]) -> Tensor:
    """The blocks of a fine map: (B, C, k1 S1..kp Sp) to (B, C k1..kp, S1..Sp as one axis)."""
    axes = len(kernel)
    pairs = (n for s, k in zip(x.shape[2:], kernel, strict=True) for n in (s // k, k))
    places, voxels = (3 + 2 * i for i in range(axes)), (2 + 2 * i for i in range(axes))
    return x.reshape(*x.shape[:2], *pairs).permute(0, 1, *places, *voxels).flatten(2 + axes).flatten(1, -2)


def grid_of(blocks: Tensor, kernel: Sequence[int], size: Sequence[int]) -> Tensor:
    """The inverse of :func:`blocks_of`: to (B, C, *size), a view where it can be one."""
    axes = len(kernel)
    coarse = [s // k for s, k in zip(size, kernel, strict=True)]
    x = blocks.unflatten(2, coarse).unflatten(1, (-1, *kernel))
    pairs = (a for i in range(axes) for a in (2 + axes + i, 2 + i))
    return x.permute(0, 1, *pairs).reshape(*x.shape[:2], *size)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """W n(x) + b; without n where there is no norm_weight, without W and b where there is no weight."""
    with autocast_disabled(x):
        y = x.flatten(2)
        if norm_weight is not None:
            y = standardise(y, eps)[0] * norm_weight[:, None] + norm_bias[:, None]
        if weight is not None:
            y = linear(y, weight, bias, dtype)
        return y.to(dtype).unflatten(2, x.shape[2:])


def linear_norm_mlp(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """z + W2 gelu(W1 n(z) + b1) + b2, where z = x + W y + b."""
    with autocast_disabled(x):
        compute = weight.dtype
        z = x.flatten(2).to(compute) + linear(y.flatten(2), weight, bias, dtype)
        normed = standardise(z, eps)[0] * norm_weight[:, None] + norm_bias[:, None]
        hidden = linear(normed, weight1, bias1, dtype)
        z = z + linear(F.gelu(hidden.to(compute)), weight2, bias2, dtype)
        return z.to(x.dtype).unflatten(2, x.shape[2:])


def join(
    skip: Tensor, x: Tensor, weight_skip: Tensor, weight_x: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """W_s skip + (the transposed convolution of x by weight_x, of stride and kernel k) + bias."""
    with autocast_disabled(x):
        kernel, size = weight_x.shape[2:], fine_size(x, weight_x)
        blocks = weight_x.to(dtype).flatten(1).mT @ x.to(dtype).flatten(2)
        y = linear(skip.flatten(2), weight_skip, bias, dtype).unflatten(2, size)
        return y + grid_of(blocks, kernel, size)


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The convolution of x by weight, whose stride is its kernel, + bias."""
    with autocast_disabled(x):
        blocks = blocks_of(x, weight.shape[2:])
        return linear(blocks, weight.flatten(1), bias, dtype).unflatten(2, coarse_size(x, weight))
