"""Depthwise convolution: each channel has a small filter of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_count, check_features

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class DepthwiseConv(nn.Module):
    """y[c] = weight[c] * x[c] + bias[c] for every channel c of x (B, channels, S1..Sp), zeros around.

    The weight is (channels, k, ..., k), once for each spatial axis; it and the bias start as those of
    torch's convolutions do.

    Args:
        channels: number of channels.
        kernel_size: k, odd, so that the output has the input's size.
        spatial_dims: p, 1 to 3.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(self, channels: int, kernel_size: int = 3, spatial_dims: int = 3) -> None:
        super().__init__()
        self.channels = check_count("channels", channels)
        if check_count("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if spatial_dims not in _CONVOLUTIONS:
            raise ValueError(f"spatial_dims must be 1, 2 or 3, got {spatial_dims!r}")
        bound = 1 / math.sqrt(kernel_size**spatial_dims)
        size = (channels, *(kernel_size,) * spatial_dims)
        self.weight = nn.Parameter(torch.empty(size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        dims = self.weight.ndim - 1
        check_features("DepthwiseConv", x, self.channels, dims)
        weight, padding = self.weight[:, None], self.weight.shape[-1] // 2
        return _CONVOLUTIONS[dims](x, weight, self.bias, padding=padding, groups=self.channels)
