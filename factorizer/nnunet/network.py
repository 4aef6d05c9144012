"""The recipe's network for one of nnU-Net's configurations; knows nothing of nnU-Net itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from factorizer.models.build import build_network
from factorizer.segmentation.anisotropy import strides_for, window_for
from factorizer.segmentation.plan import reshape_for
from factorizer.segmentation.recipe import NETWORK, PATCH, STRIDES


def network_arguments(
    patch: Sequence[int], spacing: Sequence[float], channels: int, outputs: int
) -> dict[str, Any]:
    """Arguments of `build_network`, with a head on every level.

    Args:
        patch, spacing: voxels, and mm of a voxel, along each of two or three axes.
        channels: of the input.
        outputs: channels of the logits: labels, background included, or regions.
    """
    return {
        **NETWORK,
        "in_channels": channels,
        "out_channels": outputs,
        "spatial_size": tuple(patch),
        "strides": strides_for(spacing, STRIDES),
        "reshape": reshape_for("swin", window_for(spacing, PATCH)),
        # nnU-Net gives the loss of the coarsest head no weight.
        "num_deep_supr": len(STRIDES),
    }


def head_scales(arguments: Mapping[str, Any]) -> list[list[float]]:
    """The size of each head's logits over that of the patch, along each axis, finest first."""
    size = arguments["spatial_size"]
    total = [1] * len(size)
    scales = []
    for stride in arguments["strides"]:
        steps = stride if isinstance(stride, tuple) else (stride,) * len(size)
        total = [t * s for t, s in zip(total, steps, strict=True)]
        scales.append([math.ceil(n / t) / n for n, t in zip(size, total, strict=True)])
    return scales


class Switched(nn.Module):
    """A network with several heads, of which only the finest speaks where `deep_supervision` is False.

    So a network for training and one for prediction have the same weights.
    """

    def __init__(self, arguments: Mapping[str, Any], deep_supervision: bool) -> None:
        super().__init__()
        self.network = build_network(arguments, int(torch.randint(2**31, ())))
        self.deep_supervision = deep_supervision

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """x (B, C, S1..Sp) to logits (B, outputs, S1..Sp), or a list of each head's, finest first."""
        logits = self.network(x)
        return logits if self.deep_supervision else logits[0]
