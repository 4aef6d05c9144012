"""The way from the features of a grid to the logits of a finer one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from factorizer_kernels.shared.checks import integer, integers, one_of

from .depthwise import DepthwiseConv
from .linear import Linear


class SubvoxelHead(nn.Module):
    """Logits on a grid `scale` times as fine as the features', each voxel of which becomes a block of them.

    x + w * x, a linear map to the logits of a block, and y + w' * y on the fine grid, w and w' depthwise
    filters of 3 along each axis: without them a block knows nothing of its neighbours. Ours, not the paper's.

    Args:
        in_channels, out_channels: channels of the features and of the logits.
        kernel_size: 1, as `UNet` calls its heads; the extent of the linear map.
        scale: how much finer the logits' grid is; an int or one int per axis.
        spatial_dims: number of spatial axes, 1 to 3.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        scale: int | Sequence[int] = 2,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        one_of("spatial_dims", spatial_dims, (1, 2, 3))
        one_of("kernel_size", kernel_size, (1,))
        axes = scale if isinstance(scale, Sequence) else [scale] * spatial_dims
        self.scale = integers("scale", axes, 1, (spatial_dims,))
        self.out_channels = integer("out_channels", out_channels, 1)
        self.coarse = DepthwiseConv(in_channels, 3, spatial_dims=spatial_dims)
        self.linear = Linear(in_channels, out_channels * prod(self.scale))
        self.fine = DepthwiseConv(out_channels, 3, spatial_dims=spatial_dims)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, scale1 · S1..scalep · Sp)."""
        y = self.linear(x + self.coarse(x))
        axes = len(self.scale)
        # (B, O, s1..sp, S1..Sp) to (B, O, S1, s1, .., Sp, sp)
        order = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
        y = y.reshape(len(x), self.out_channels, *self.scale, *x.shape[2:]).permute(0, 1, *order)
        size = [s * n for s, n in zip(self.scale, x.shape[2:], strict=True)]
        y = y.reshape(len(x), self.out_channels, *size)
        return y + self.fine(y)
