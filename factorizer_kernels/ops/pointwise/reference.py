"""The pointwise operators in plain PyTorch: the definition, on any device, differentiable to any order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from factorizer_kernels.ops.pointwise.spec import coarse_size, fine_size
from factorizer_kernels.shared.dtypes import autocast_disabled, compute_dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """W x + b of x (B, C, V), in that dtype."""
    weight = weight.to(dtype).expand(x.shape[0], *weight.shape)
    return torch.baddbmm(bias.to(dtype)[:, None], weight, x.to(dtype))  # in one pass over the result


def standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, C, V) with zero mean and unit variance over its channels, and the factor that did the latter."""
    x = x.to(compute_dtype(x.dtype))
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * scale, scale


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
        if norm_weight is not None and norm_bias is not None:
            y = standardise(y, eps)[0] * norm_weight[:, None] + norm_bias[:, None]
        if weight is not None and bias is not None:
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
        y = linear(skip.flatten(2), weight_skip, bias, dtype).unflatten(2, fine_size(x, weight_x))
        if x.numel() == 0:  # torch's convolution takes no empty map
            return y + x.sum() * weight_x.sum()
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
        return y + convolve(x.to(dtype), weight_x.to(dtype), stride=weight_x.shape[2:])


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The convolution of x by weight, whose stride is its kernel, + bias."""
    with autocast_disabled(x):
        if x.numel() == 0:  # torch's convolution takes no empty map
            y = x.new_zeros((x.shape[0], weight.shape[0], *coarse_size(x, weight)), dtype=dtype)
            return y + (x.sum() * weight.sum() + bias.sum()).to(dtype)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        return convolve(x.to(dtype), weight.to(dtype), bias.to(dtype), stride=weight.shape[2:])
