"""Grids whose voxels are longer than they are wide, and what strides, windows and crop make of them.

As nnU-Net plans (Isensee et al., Nature Methods 18, 2021): an axis is halved only as long as its voxels are
about as fine as the finest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

ALIKE = 2.0  # voxels are about as fine where they are less than so many times as long
STRONG = 3.0  # a task is strongly anisotropic where one axis is so many times as coarse as the others
FINE_QUANTILE = 0.1  # of the spacings along that axis: the grid that the finer volumes have


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """The spacing (3,) in mm for volumes of these spacings (n, 3) and shapes (n, 3) in voxels.

    The median; along the coarse axis of a strongly anisotropic task, of few thick slices, a tenth of the
    volumes are finer: taking the median would blur them.
    """
    spacing = np.median(spacings, axis=0)
    coarse = int(spacing.argmax())
    others = [axis for axis in range(3) if axis != coarse]
    size = np.median(shapes, axis=0)
    if spacing[coarse] > STRONG * spacing[others].max() and STRONG * size[coarse] < size[others].min():
        spacing[coarse] = max(np.quantile(spacings[:, coarse], FINE_QUANTILE), spacing[others].max())
    return spacing


def strides_for(spacing: Sequence[float], strides: Sequence[int]) -> tuple[int | tuple[int, ...], ...]:
    """Strides that halve an axis only where its voxels are about as fine as the finest: an int where all axes
    are alike, else one for each axis."""
    size = np.array(spacing, float)
    found: list[int | tuple[int, ...]] = []
    for stride in strides:
        fine = size < ALIKE * size.min()
        steps = tuple(int(stride) if alike else 1 for alike in fine)
        size = size * steps
        found.append(steps[0] if len(set(steps)) == 1 else steps)
    return tuple(found)


def window_for(spacing: Sequence[float], size: int) -> int | tuple[int, ...]:
    """The window, in voxels; an int where all axes are alike.

    `size` along the finest axis; half of it where voxels are 2 to 4 times as long, and so on.
    """
    ratios = (np.array(spacing) / min(spacing)).tolist()
    window = tuple(max(1, size // 2 ** int(math.log2(ratio))) for ratio in ratios)
    return window[0] if len(set(window)) == 1 else window


def total_stride(strides: Sequence[int | tuple[int, ...]]) -> np.ndarray:
    """By how many voxels of the input one of the coarsest level is long, along each axis (3,)."""
    product = np.ones(3, int)
    for stride in strides:
        product = product * np.array(stride)
    return product


def in_words(
    spacing: Sequence[float], strides: Sequence[int | tuple[int, ...]], window: int | tuple[int, ...] | None
) -> str:
    """What was decided, and why; empty where all axes are alike. `window`: None where it is the map."""
    if all(isinstance(stride, int) for stride in strides) and not isinstance(window, tuple):
        return ""
    ratio = max(spacing) / min(spacing)
    axis = ("left-right", "front-back", "bottom-top")[int(np.argmax(spacing))]
    total = " x ".join(map(str, total_stride(strides).tolist()))
    told = (
        f"voxels are {ratio:.1f} times as long along {axis} as along the finest axis: the axes are made "
        f"coarser {total} times in all"
    )
    if window is None:
        return told
    cut = " x ".join(map(str, window if isinstance(window, tuple) else (window,) * 3))
    return f"{told}, and windows have {cut} voxels"
