"""The way from a network's grid to a volume's own, for a part of the volume at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

ON_THE_GRID = 1e-3  # voxels; of a place so near to a voxel the rest is rounding


class OwnGrid:
    """A volume's own grid, seen from the network's.

    Nearly always its axes are those of the network's in another order, direction and step, so that values are
    interpolated along one after another. Not where the axes of the own grid are oblique, as of a tilted CT.

    Args:
        affine, shape: of the own grid; (4, 4) to mm.
        network: the affine of the network's grid.
        begin, whole: where along each axis of the network's grid the volume begins of which it is a part, and
            how long that is: beyond its outermost voxels the values are theirs.
    """

    def __init__(
        self,
        affine: np.ndarray,
        shape: Sequence[int],
        network: np.ndarray,
        begin: Sequence[int],
        whole: Sequence[int],
    ) -> None:
        self.shape = tuple(shape)
        self._matrix = np.linalg.inv(network) @ affine
        self._ends = np.array(begin), np.array(begin) + np.array(whole) - 1
        self._axes = np.abs(self._matrix[:3, :3]).argmax(axis=0).tolist()
        rest = self._matrix[:3, :3] * np.array(shape)
        rest[self._axes, range(3)] = 0
        self._parallel = sorted(self._axes) == [0, 1, 2] and bool((np.abs(rest) < ON_THE_GRID).all())
        if not self._parallel:
            # By their angles alone: in voxels thick slices would look parallel to whatever is fine.
            mm = np.abs(self._matrix[:3, :3]) * np.linalg.norm(network[:3, :3], axis=0)[:, None]
            self._axes = linear_sum_assignment(-(mm / np.linalg.norm(affine[:3, :3], axis=0)).T)[1].tolist()

    def along(self, axis: int) -> int:
        """The own axis that runs along this axis of the network's grid, or nearly."""
        return self._axes.index(axis)

    def reversed(self, own: int) -> bool:
        """Whether the own axis runs against the network's."""
        return bool(self._matrix[self._axes[own], own] < 0)

    def planes(self, own: int, begin: int, end: int, axis: int, size: int) -> tuple[int, int]:
        """The planes along an axis of the network's grid, of that size, which voxels begin to end of an own
        axis depend on; one at least."""
        ends = [(begin, min(end, n) - 1) if k == own else (0, n - 1) for k, n in enumerate(self.shape)]
        corners = np.stack(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
        places = self._places(corners)[axis]
        low, high = int(np.floor(places.min())), int(np.floor(places.max())) + 2
        low = min(max(low, 0), size - 1)
        return low, max(min(high, size), low + 1)

    def bring(
        self,
        values: Tensor,
        own: int = 0,
        begin: int = 0,
        end: int | None = None,
        axis: int = 0,
        first: int = 0,
    ) -> Tensor:
        """Values (n, X, Y, Z) on the network's grid to (n, X', Y', Z') on the own one, where only the voxels
        begin to end of axis `own` are wanted.

        Interpolated linearly, 0 outside of the values. These begin with plane `first` along `axis` of the
        network's grid.
        """
        ranges = self._ranges(own, begin, end)
        start = np.zeros(3)
        start[axis] = first
        if not self._parallel:
            return _sampled(values, self._places(np.stack(np.meshgrid(*ranges, indexing="ij"))).T - start)
        for k, theirs in enumerate(self._axes):
            values = _interpolated(values, theirs + 1, self._places_along(k, ranges[k]) - start[theirs])
        return values.permute(0, *(theirs + 1 for theirs in self._axes))

    def inside(self, size: Sequence[int], own: int = 0, begin: int = 0, end: int | None = None) -> Tensor:
        """Which voxels (X', Y', Z') of the own grid, begin to end of axis `own`, values (n, *size) on the
        network's say anything of: where `bring` has more than its 0."""
        ranges = self._ranges(own, begin, end)
        if not self._parallel:
            places = self._places(np.stack(np.meshgrid(*ranges, indexing="ij")))
            masks = [(place > -1) & (place < length) for place, length in zip(places, size, strict=True)]
            return torch.from_numpy(np.logical_and.reduce(masks))
        inside = torch.ones(*(len(voxels) for voxels in ranges), dtype=torch.bool)
        for k, axis in enumerate(self._axes):
            places = self._places_along(k, ranges[k])
            inside.movedim(k, 2).logical_and_(torch.from_numpy((places > -1) & (places < size[axis])))
        return inside

    def _ranges(self, own: int, begin: int, end: int | None) -> list[np.ndarray]:
        """The voxels along each own axis, of which begin to end of axis `own` are wanted."""
        return [np.arange(n)[begin:end] if k == own else np.arange(n) for k, n in enumerate(self.shape)]

    def _places_along(self, own: int, voxels: np.ndarray) -> np.ndarray:
        """Where voxels of an own axis lie along the network's axis that it is parallel to."""
        index = np.zeros((3, len(voxels)))
        index[own] = voxels
        return self._places(index)[self._axes[own]]

    def _places(self, index: np.ndarray) -> np.ndarray:
        """Voxels (3, ...) of the own grid to places on the network's."""
        places = np.tensordot(self._matrix[:3, :3], index, 1)
        places += self._matrix[:3, 3].reshape(3, *(1,) * (index.ndim - 1))
        if self._parallel:
            nearest = places.round()
            places = np.where(np.abs(places - nearest) < ON_THE_GRID, nearest, places)
        return np.clip(places.T, *self._ends).T


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


def _sampled(values: Tensor, places: np.ndarray) -> Tensor:
    """Values (n, X, Y, Z) at places (Z', Y', X', 3) between them: (n, X', Y', Z'); 0 outside."""
    # grid_sample takes -1 to 1 for the begin of the first voxel to the end of the last, the last axis first.
    grid = (2 * places + 1) / np.array(values.shape[1:]) - 1
    grid = torch.from_numpy(grid[..., ::-1].copy()).transpose(0, 2)
    return F.grid_sample(values[None].double(), grid[None], align_corners=False)[0].to(values.dtype)
