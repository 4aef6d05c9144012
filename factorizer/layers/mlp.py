"""Two-layer perceptron at every voxel."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from factorizer_kernels.shared.checks import integer, number

from .checks import check_probability
from .linear import Linear
from .parts import untouched


class MLP(nn.Module):
    """Linear, exact GELU, dropout, linear, dropout over the channels of x (B, C, S1..Sp).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; in_channels where None.
        hidden_channels: width of the hidden layer; round(ratio * in_channels) where None.
        ratio: hidden width over input width; used where hidden_channels is None.
        dropout: probability of the dropout after each linear layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        hidden_channels: int | None = None,
        ratio: float = 3.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        integer("in_channels", in_channels, 1)
        check_probability("dropout", dropout)
        if hidden_channels is None:
            if not 0 < number("ratio", ratio) < math.inf:
                raise ValueError(f"ratio must be positive, got {ratio}")
            hidden_channels = max(round(ratio * in_channels), 1)
        integer("hidden_channels", hidden_channels, 1)
        out_channels = in_channels if out_channels is None else out_channels
        self.block = nn.Sequential(
            Linear(in_channels, hidden_channels),
            nn.GELU(),
            nn.Dropout(dropout),
            Linear(hidden_channels, out_channels),
            nn.Dropout(dropout),
        )

    @property
    def linears(self) -> tuple[Linear, Linear] | None:
        """The two linear layers, where the rest is as it was made; None where something was changed."""
        kinds = (Linear, nn.GELU, nn.Dropout, Linear, nn.Dropout)
        parts: Any = list(self.block)
        if (
            not (untouched(self, MLP) and untouched(self.block, nn.Sequential))
            or len(parts) != len(kinds)
            or not all(map(untouched, parts, kinds))
            or parts[1].approximate != "none"
        ):
            return None
        return parts[0], parts[3]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, S1..Sp)."""
        return self.block(x)
