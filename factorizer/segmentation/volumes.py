"""Volumes: NIfTI files in and out, and what can be wrong with them.

Every error is a `DataError` that names the file, what it holds and what it must hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console

from .cases import Case, Task
from .errors import DataError
from .files import atomic
from .screen import progress

GRID_FIELDS = (  # of a NIfTI header, beside the voxel sizes
    *("xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z", "qform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
GRID_TOLERANCE = 1e-2  # mm between the places that two files give to a voxel


@dataclass(frozen=True)
class Geometry:
    """Of a volume's nonzero part: shape in voxels, spacing in mm; axes right, anterior, superior.

    `window`: the 0.5 and 99.5 percentiles of the labelled voxels' intensities, over all channels.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    window: tuple[float, float] | None = None


def check_case(task: Task, case: Case) -> Geometry:
    """Read the files of a labelled case, check that they fit the task and each other.

    Raises DataError as `check_image` does, and where the label cannot be read, lies on another grid
    than its image, or has a value that stands for no class.
    """
    if case.label is None:
        raise DataError(f"{case.name}: has no label")
    affine, image = check_image(case, task.modalities)
    label = check_label(case, list(task.labels))
    nonzero = (image != 0).any(axis=3)
    # The axes in the order that preprocessing will bring them into.
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    shape = [int(np.ptp(np.nonzero(nonzero)[axis])) + 1 for axis in order]
    spacing = nib.affines.voxel_sizes(affine)[order].tolist()
    window = None
    if (label != 0).any():
        low, high = np.quantile(image[label != 0], (0.005, 0.995)).tolist()
        window = (low, high)
    return Geometry((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]), window)


def check_image(case: Case, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read the image of a case: its affine (4, 4), and its voxels (X, Y, Z, channel).

    Raises DataError where a file cannot be read, is not of the right dimensions, lacks channels or
    holds NaN, infinity or nothing but zeros, or where the files lie on different grids.
    """
    files = [read_nifti(path) for path in case.images]
    affine, first = files[0][0].affine, files[0][1]
    if len(files) == 1 and first.ndim == 4:
        image = first
    else:
        for path, (file, voxels) in zip(case.images, files, strict=True):
            if voxels.ndim != 3:
                allowed = "X, Y, Z or X, Y, Z, channel" if len(files) == 1 else "X, Y, Z"
                raise DataError(f"{path}: has shape {voxels.shape}; it must be {allowed}")
            if voxels.shape != first.shape:
                raise DataError(
                    f"{path}: shape {voxels.shape} does not match {first.shape}, that of {case.image}"
                )
            if not _same_grid(file.affine, affine, first.shape):
                raise DataError(f"{path}: lies on another grid than {case.image} (their affines differ)")
        image = np.stack([voxels for _, voxels in files], axis=3)
    if image.shape[3] != len(modalities):
        raise DataError(
            f"{case.image}: {image.shape[3]} channels; there must be one for each of the "
            f"{len(modalities)} modalities ({', '.join(modalities)})"
        )
    if np.linalg.matrix_rank(affine) < 4:
        raise DataError(f"{case.image}: its affine is singular")
    for channel, name in enumerate(modalities):
        if not np.isfinite(image[..., channel]).all():
            path = case.images[channel if len(files) > 1 else 0]
            raise DataError(f"{path}: holds NaN or infinite values ({name})")
    if not image.any():
        raise DataError(f"{case.image}: holds nothing but zeros")
    return affine, image


def check_label(case: Case, values: Sequence[int]) -> np.ndarray:
    """Read the label of a case: its values (X, Y, Z).

    Raises DataError where the file cannot be read, lies on another grid than the image, or has
    other values than `values`.
    """
    assert case.label is not None
    file, label = read_nifti(case.label)
    image: Any = nib.load(case.image)
    if label.shape != image.shape[:3]:
        raise DataError(
            f"{case.label}: shape {label.shape} does not match its image's {image.shape[:3]} ({case.image})"
        )
    if not _same_grid(file.affine, image.affine, label.shape):
        raise DataError(f"{case.label}: its affine differs from its image's ({case.image})")
    unknown = sorted(set(np.unique(label).tolist()) - set(values))
    if unknown:
        raise DataError(
            f"{case.label}: label value {unknown[0]:g} has no class; there are classes for {list(values)}"
        )
    return label


def read_nifti(path: Path) -> tuple[Any, np.ndarray]:
    """A NIfTI file, and its voxels, real numbers. Raises DataError where it cannot be read."""
    try:
        file = nib.load(path)
        voxels = np.asarray(file.dataobj)  # type: ignore[attr-defined]
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except Exception as error:  # a broken file makes nibabel, zlib or numpy raise one of a dozen
        raise DataError(f"{path}: not readable as NIfTI ({str(error) or type(error).__name__})") from error
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: its voxels are {voxels.dtype}; they must be real numbers")
    return file, voxels


def write_nifti(voxels: np.ndarray, like: Path, path: Path) -> None:
    """Write voxels (X, Y, Z) or (X, Y, Z, n) on the grid of `like`, in its header's own words: viewers
    differ in whether they believe qform or sform."""
    source: Any = nib.load(like)
    volume = nib.Nifti1Image(voxels, source.affine)
    if isinstance(source.header, nib.Nifti1Header):
        volume.header["pixdim"][:4] = source.header["pixdim"][:4]
        for field in GRID_FIELDS:
            volume.header[field] = source.header[field]
    with atomic(path) as temporary:
        nib.save(volume, temporary)


def _same_grid(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put the corners of a volume at the same places."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape[:3]], [1], indexing="ij")).reshape(4, -1)
    return bool(np.abs((affine - other) @ corners).max() < GRID_TOLERANCE)


def check_cases(console: Console, task: Task) -> dict[str, Geometry]:
    """The geometry of each case of a task. Raises DataError for the first that cannot be used."""
    geometries = {}
    with progress(console) as bar:
        for case in bar.track(task.cases, description="Checking volumes"):
            geometries[case.name] = check_case(task, case)
    return geometries
