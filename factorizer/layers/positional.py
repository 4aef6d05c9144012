"""Learned positional embedding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from factorizer_kernels.shared.checks import integer, integers

from .checks import check_features
from .resize import resample


class PositionalEmbedding(nn.Module):
    """Adds a learned value to every channel of every voxel of x (B, channels, S1..Sp).

    The embedding has the size it was made for; an x of another size gets it interpolated
    linearly, axis by axis.

    Args:
        channels: number of channels.
        spatial_size: the size S1..Sp that the embedding is learned at.

    Raises:
        ValueError: x has another number of channels or of spatial axes.
    """

    def __init__(self, channels: int, spatial_size: Sequence[int]) -> None:
        super().__init__()
        self.channels = integer("channels", channels, 1)
        size = integers("spatial_size", spatial_size, 1, (1, 2, 3))
        self.pos = nn.Parameter(torch.empty(1, channels, *size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the embedding anew: for memory that holds nothing yet, as after `to_empty`."""
        nn.init.trunc_normal_(self.pos, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, S1..Sp) to the same shape."""
        check_features("PositionalEmbedding", x, self.channels, self.pos.ndim - 2)
        return x + resample(self.pos, x.shape[2:])
