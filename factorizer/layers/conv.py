"""Convolutional parts, by number of spatial axes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .checks import check_count, check_spatial_dims
from .norm import LayerNorm

CONV: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


class ConvStage(nn.Module):
    """`depth` times convolution (3 along each axis, no bias), layer norm, leaky ReLU.

    Args:
        in_channels, out_channels: channels of the input and the output.
        spatial_size: not used; the stages of a U-net are all called with it.
        depth: number of convolutions.
        spatial_dims: number of spatial axes, 1 to 3.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_size: Sequence[int] | None = None,
        depth: int = 1,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        check_count("depth", depth)
        check_spatial_dims(spatial_dims)
        layers: list[nn.Module] = []
        for i in range(depth):
            width = out_channels if i else in_channels
            layers += [
                CONV[spatial_dims](width, out_channels, 3, padding=1, bias=False),
                LayerNorm(out_channels),
                nn.LeakyReLU(0.01),
            ]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, S1..Sp)."""
        return self.block(x)
