"""Padding, cropping and resampling of the spatial axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def round_up(size: Sequence[int], multiple: Sequence[int]) -> tuple[int, ...]:
    """The smallest multiples of `multiple` that are not below `size`, axis by axis."""
    return tuple(-(-s // m) * m for s, m in zip(size, multiple, strict=True))


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Adds zeros at the end of each spatial axis of x (B, C, S1..Sp); x itself where it fits."""
    missing = [want - have for want, have in zip(size, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [n for m in reversed(missing) for n in (0, m)])


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Keeps the first `size` entries of each spatial axis of x (B, C, S1..Sp)."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    for axis, extent in enumerate(size, start=2):
        x = x.narrow(axis, 0, extent)
    return x


class Padded(nn.Module):
    """A network that takes multiples of `divisor`, for any size: the volume is padded with zeros around."""

    def __init__(self, network: nn.Module, divisor: int) -> None:
        super().__init__()
        self.network, self.divisor = network, divisor

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, S1..Sp) to what the network makes of it, on the same voxels."""
        missing = [-size % self.divisor for size in x.shape[2:]]
        if not any(missing):
            return self.network(x)
        y = self.network(F.pad(x, [n for m in reversed(missing) for n in (m // 2, m - m // 2)]))
        own = (slice(m // 2, m // 2 + n) for m, n in zip(missing, x.shape[2:], strict=True))
        place = (..., *own)
        return y[place]


def resample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation of x (B, C, S1..Sp) to the spatial size `size`; x itself where equal."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)
