"""Feature maps as kernels take them, with three spatial axes: missing ones come first, of size 1."""

from collections.abc import Sequence

import torch
from torch import Tensor

SPATIAL_AXES = 3


def three_axes(values: Sequence[int], missing: int) -> tuple[int, ...]:
    """One value for each of the three axes; ``missing`` for those that a map lacks."""
    return (missing,) * (SPATIAL_AXES - len(values)) + tuple(values)


def spatial_3d(x: Tensor) -> Tensor:
    """(B, C, S1..Sp) as (B, C, S1, S2, S3), without a copy."""
    for _ in range(SPATIAL_AXES + 2 - x.dim()):
        x = x.unsqueeze(2)
    return x


def empty_map(x: Tensor) -> Tensor:
    """x.new_empty(x.shape), a contiguous tensor, in half the host's time."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
