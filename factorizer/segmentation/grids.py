"""The way from a network's grid to a volume's own, for a part of the volume at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ON_THE_GRID = 1e-3  # voxels; of a place so near to a voxel the rest is rounding


@dataclass(frozen=True)
class OwnGrid:
    """A case's own grid, seen from the network's: its axes are those of the network in another order,
    direction and step.

    Attributes:
        shape: of the own grid.
        lines: for each of its axes the network's axis, and the places there of its voxels.
    """

    shape: tuple[int, ...]
    lines: tuple[tuple[int, np.ndarray], ...]

    @classmethod
    def between(
        cls,
        affine: Any,
        shape: Sequence[int],
        network: np.ndarray,
        begin: Sequence[int],
        whole: Sequence[int],
    ) -> OwnGrid:
        """From the affines (4, 4) of the two grids.

        Args:
            affine, shape: of the own grid.
            network: the affine of the network's grid.
            begin, whole: where along each of its axes the volume begins of which it is a part, and how long
                that is: beyond its outermost voxels the values are theirs.
        """
        matrix = np.linalg.inv(network) @ np.asarray(affine)
        lines = []
        for own, axis in enumerate(np.abs(matrix[:3, :3]).argmax(axis=0).tolist()):
            places = matrix[axis, own] * np.arange(shape[own]) + matrix[axis, 3]
            nearest = places.round()
            places = np.where(np.abs(places - nearest) < ON_THE_GRID, nearest, places)
            lines.append((axis, places.clip(begin[axis], begin[axis] + whole[axis] - 1)))
        return cls(tuple(shape), tuple(lines))

    def along(self, axis: int) -> int:
        """The own axis that runs along this axis of the network's grid."""
        return [network for network, _ in self.lines].index(axis)

    def reversed(self, own: int) -> bool:
        """Whether the own axis runs against the network's."""
        places = self.lines[own][1]
        return bool(places[0] > places[-1])

    def planes(self, own: int, begin: int, end: int, size: int) -> tuple[int, int]:
        """The planes of a network's grid of that size which voxels begin to end of an own axis depend on; one
        at least."""
        places = self.lines[own][1][begin:end]
        low, high = int(np.floor(places.min())), int(np.floor(places.max())) + 2
        low = min(max(low, 0), size - 1)
        return low, max(min(high, size), low + 1)

    def bring(
        self, values: Tensor, own: int = 0, begin: int = 0, end: int | None = None, first: int = 0
    ) -> Tensor:
        """Values (n, X, Y, Z) on the network's grid to (n, X', Y', Z') on the own one, where
        only the voxels begin to end of axis `own` are wanted.

        Interpolated linearly, 0 outside of the values. These begin with plane `first` along that axis.
        """
        for k, (axis, places) in enumerate(self.lines):
            here = places[begin:end] - first if k == own else places
            values = _interpolated(values, axis + 1, here)
        return values.permute(0, *(axis + 1 for axis, _ in self.lines))


def _interpolated(values: Tensor, dim: int, places: np.ndarray) -> Tensor:
    """Values at places between those along a dimension; 0 outside."""
    below = np.floor(places)

    def at(index: np.ndarray) -> Tensor:
        outside = (index < 0) | (index >= values.shape[dim])
        taken = values.index_select(dim, torch.from_numpy(np.where(outside, 0, index).astype(np.int64)))
        return taken.index_fill_(dim, torch.from_numpy(outside.nonzero()[0]), 0)

    share = torch.from_numpy((places - below).astype(np.float32))
    if not share.any():
        return at(below)
    return at(below).lerp_(at(below + 1), share.reshape(-1, *(1,) * (values.ndim - 1 - dim)).to(values.dtype))
