"""Pointwise linear layer: the same matrix at every voxel."""

from __future__ import annotations

from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer

from .checks import check_dtype, check_features
from .parts import untouched


class Linear(nn.Module):
    """y = W x + b over the channels of x (B, in_channels, S1..Sp), any number of spatial axes.

    The weight is kept as a kernel of size one, (out_channels, in_channels, 1), which is the shape
    that published checkpoints have.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        bias: whether to add a bias.

    Raises:
        ValueError: x has another number of channels, or no spatial axis.
        TypeError: x is of another dtype than the weights, and autocast is off.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.linear = nn.Conv1d(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, S1..Sp)."""
        check_features("Linear", x, self.in_channels)
        if not untouched(self.linear, nn.Conv1d):  # wrapped, pruned, with a parametrised weight
            return self.linear(x.flatten(2)).unflatten(2, x.shape[2:])
        check_dtype(x, self.linear.weight)
        return fk.linear(x.flatten(2), *self.weights).unflatten(2, x.shape[2:])

    @property
    def weights(self) -> tuple[Tensor, Tensor | None]:
        """W (out_channels, in_channels), and b (out_channels) or None."""
        return self.linear.weight[..., 0], self.linear.bias
