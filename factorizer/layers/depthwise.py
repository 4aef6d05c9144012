"""Depthwise convolution: each channel has a small filter of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer, integers, one_of

from .checks import check_features
from .conv import CONV


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
        return fk.depthwise_conv(x, self.conv.weight.squeeze(1), self.conv.bias)
