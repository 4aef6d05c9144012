"""Layer normalisation over the channels of a channels-first tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer

from .checks import check_features
from .parts import untouched


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
        self.dim = integer("dim", dim, 1)
        self.norm = nn.LayerNorm(dim, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim, S1..Sp) to the same shape and dtype."""
        check_features("LayerNorm", x, self.dim)
        if not untouched(self.norm, nn.LayerNorm):  # wrapped, with a parametrised weight
            return self.norm(x.movedim(1, -1)).movedim(-1, 1)
        y = fk.layer_norm(x.flatten(2), *self.affine(x), eps=self.norm.eps)
        return y.unflatten(2, x.shape[2:])

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel; ones and zeros in x's dtype where there are none."""
        weight, bias = self.norm.weight, self.norm.bias
        weight = x.new_ones(self.dim) if weight is None else weight
        return weight, torch.zeros_like(weight) if bias is None else bias
