"""Depthwise convolution: each channel has a small filter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer, integers, one_of
from factorizer_kernels.shared.dtypes import autocast_dtype, compute_dtype

from .checks import check_features
from .conv import CONV
from .parts import untouched


class DepthwiseConv(nn.Module):
    """Filters each channel of x (B, channels, S1..Sp) by its own filter, with zeros around x.

    Its parameters are those of torch's convolution of as many groups as channels: in shape, (channels, 1,
    k1..kp), in how they are initialised, and in the state_dict.

    Args:
        channels: channels of the input and the output.
        kernel_size: the filter's extent along each axis, or along all of them; odd.
        bias: whether to add a bias.
        spatial_dims: number of spatial axes, 1 to 3.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self, channels: int, kernel_size: int | Sequence[int] = 3, bias: bool = True, spatial_dims: int = 3
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)
        one_of("spatial_dims", spatial_dims, (1, 2, 3))
        if isinstance(kernel_size, Sequence):
            kernel_size = integers("kernel_size", kernel_size, 1, (spatial_dims,))
        else:
            kernel_size = (integer("kernel_size", kernel_size, 1),) * spatial_dims
        if any(k % 2 == 0 for k in kernel_size):
            raise ValueError(f"kernel_size must be odd along each axis, got {kernel_size}")
        padding = tuple(k // 2 for k in kernel_size)
        self.spatial_dims = spatial_dims
        self.conv: Any = CONV[spatial_dims](
            channels, channels, kernel_size, padding=padding, groups=channels, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, S1..Sp) to the same shape."""
        check_features("DepthwiseConv", x, self.channels, self.spatial_dims)
        if not untouched(self.conv, *CONV.values()):  # wrapped, pruned, with a parametrised weight
            return self.conv(x)
        return fk.depthwise_conv(x, self.conv.weight.squeeze(1), self.conv.bias)

    @property
    def untouched(self) -> bool:
        """Whether nothing hangs on it, so that the filter may be used without a call."""
        return untouched(self, DepthwiseConv) and untouched(self.conv, *CONV.values())

    def residual(self, x: Tensor) -> Tensor:
        """x + self(x). On a CPU it is one filter, with 1 added to its middle; elsewhere, and under autocast,
        the filter may round x."""
        if x.device.type != "cpu" or autocast_dtype(x) != x.dtype or not self.untouched:
            return x + self(x)
        check_features("DepthwiseConv", x, self.channels, self.spatial_dims)
        weight = self.conv.weight.squeeze(1).to(compute_dtype(x.dtype))
        one = torch.zeros_like(weight[0])
        one[tuple(k // 2 for k in one.shape)] = 1
        return fk.depthwise_conv(x, weight + one, self.conv.bias)
