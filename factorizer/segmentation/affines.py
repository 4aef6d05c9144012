"""Affines: where the voxels of a volume lie in mm, and its voxels on another volume's grid."""

from __future__ import annotations

from collections.abc import Sequence

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform, gaussian_filter, maximum_filter, minimum_filter

MILLIMETRES = {1: 1e3, 2: 1.0, 3: 1e-3}  # of NIfTI's units; a file that says none means mm
GRID_TOLERANCE = 1e-2  # mm, and a fifth of a voxel at most, between the places that two files give to a voxel


def affine_of(file: nib.Nifti1Pair) -> np.ndarray:
    """Voxels to mm, whatever the file's unit."""
    unit = MILLIMETRES.get(int(file.header["xyzt_units"]) & 7, 1.0)
    return np.diag([unit, unit, unit, 1.0]) @ file.affine


def in_order_of(voxels: np.ndarray, affine: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) or (X, Y, Z, n) and their affine, with the axes in the order and direction of those
    of the affine `wanted`. No value changes."""
    # Not by way of the scanner's axes: rounding would decide where both lie at 45 degrees to those.
    mm = np.diag([*nib.affines.voxel_sizes(wanted), 1.0])
    turn = nib.io_orientation(mm @ np.linalg.inv(wanted) @ affine)
    turned = affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape[:3])
    return nib.apply_orientation(voxels, turn), turned


def same_grid(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put the corners of a volume at the same places."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape[:3]], [1], indexing="ij")).reshape(4, -1)
    tolerance = min(GRID_TOLERANCE, 0.2 * float(nib.affines.voxel_sizes(other).min()))
    return bool(np.abs((affine - other) @ corners).max() < max(tolerance, 1e-6))


def resampled(voxels: np.ndarray, affine: np.ndarray, shape: Sequence[int], wanted: np.ndarray) -> np.ndarray:
    """Voxels interpolated at the places of another grid, by cubic splines; 0 outside of the volume.

    Where the other grid is coarser what it cannot show is smoothed away first. Each value stays within those
    of the eight voxels around its place, as splines ring at edges, and zeros (no signal) stay zeros.
    """
    to_source = np.linalg.inv(affine) @ wanted
    steps = np.abs(to_source[:3, :3]).max(axis=1)  # source voxels from one voxel to the next
    source = voxels.astype(np.float64)
    present = (source != 0) & (np.abs(source) < 1e30)
    source[~present] = 0
    if (steps > 1).any():
        source = gaussian_filter(source, np.maximum(steps - 1, 0) / 2)
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    moved = affine_transform(source, matrix, offset, tuple(shape), order=3, mode="constant", cval=0)
    inside = affine_transform(present.astype(np.float32), matrix, offset, tuple(shape), order=1, cval=0)
    for extreme, clip in ((minimum_filter, np.maximum), (maximum_filter, np.minimum)):
        of_cell = extreme(source, size=2, origin=-1, mode="nearest")  # of voxels i and i + 1 along each axis
        bound = affine_transform(of_cell, matrix, offset - 0.5, tuple(shape), order=0, mode="nearest")
        moved = clip(moved, bound)
    return np.where(inside > 0.5, moved, 0).astype(np.float32)
