"""Layer normalisation over the channels of a channels-first tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .checks import check_count, check_features


class LayerNorm(nn.Module):
    """Normalises the channels of each voxel of x (B, dim, S1..Sp) on their own.

    Args:
        dim: number of channels.
        kwargs: further arguments of `torch.nn.LayerNorm` (eps, elementwise_affine, bias).

    Raises:
        ValueError: x has another number of channels, or no spatial axis.
    """

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        self.norm = nn.LayerNorm(dim, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        check_features("LayerNorm", x, self.dim)
        return self.norm(x.movedim(1, -1)).movedim(-1, 1).contiguous()
