"""Volumes: their files in and out, and what can be wrong with them.

All lengths are in mm, whatever the unit of a file. Every error is a `DataError` that names the file, what
it holds and what it must hold.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from factorizer.segmentation.affines import affine_of, in_order_of, resampled, same_grid
from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic, digest_of
from factorizer.segmentation.formats import LateVoxels, load, parts_of, save
from factorizer.segmentation.intensities import clean, is_ct
from factorizer.segmentation.names import is_volume, places_by_name
from factorizer.segmentation.screen import count

# What a NIfTI header says about the grid, beside the voxel sizes. Its other fields (dtype, scaling, intent,
# description) are about the image's intensities and do not hold for what is written on its grid.
GRID_FIELDS = (
    *("xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z", "qform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
MIN_SPACING, MAX_SPACING = 0.01, 100.0  # mm; no scanner's beyond
MAX_LABEL = 2**31  # beyond it not every whole number has a float of its own, nor a class
MAP_STEPS = 4095  # from 0 to the largest value of maps in a file
LABEL_ROUNDING = 0.05  # a label's distance from a whole number, at most, where the file's steps are coarse


@dataclass(frozen=True)
class Volume:
    """Voxels (X, Y, Z, ...), real numbers, and their affine (4, 4) to mm, axes right, anterior, superior.

    `source` is what errors call them: the file that they are read from when they are asked for, or an
    argument. `header` is that of NIfTI, where there is one.
    """

    source: Path
    affine: np.ndarray
    voxels: np.ndarray | LateVoxels
    header: nib.Nifti1Header | None = None


@dataclass(frozen=True)
class LoadedCase(Case):
    """A case whose image is in memory: `volumes`, in the order of `images`, which names them in errors."""

    volumes: tuple[Volume, ...] = ()


def check_image(case: Case, modalities: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read the image of a case: its affine (4, 4) to mm, and its voxels (X, Y, Z, channel), float32.

    Fill values and outliers are gone (`intensities.clean`). Files that lie on another grid than the case's
    are brought to it where the case says so.

    Raises DataError where a file cannot be read, is not of the right dimensions, lacks channels or
    holds NaN, infinity or nothing but zeros, or where the files lie on different grids.
    """
    _check_order(case, modalities)
    files: Sequence[Volume] = (
        case.volumes if isinstance(case, LoadedCase) else [_late_volume(path) for path in case.images]
    )
    grid = files[case.grid if len(files) > 1 else 0]
    affine = grid.affine
    check_affine(case.image, affine)
    if len(files) == 1:
        whole = _shape_without_ones(grid.voxels.shape, 4)
        if len(whole) not in (3, 4):
            raise DataError(
                f"{case.image}: has shape {grid.voxels.shape}; it must be X, Y, Z or X, Y, Z, channel"
            )
        shape, number = whole[:3], math.prod(whole[3:])
        channels = _channels(grid)
    else:
        shape, number = _shape_without_ones(grid.voxels.shape, 3), len(files)
        for volume in files:
            _check_grid(case, volume, affine, shape)
        channels = (_brought(case, volume, affine, shape) for volume in files)
    if number != len(modalities):
        way_out = ". Give those alone that belong to these; of a series in time, one volume"
        if number < len(modalities):
            way_out = ". Give a mapping of the modalities' names to volumes"
            if not isinstance(case, LoadedCase):
                way_out = (
                    ". Give a case's files separated by commas, with the endings _0000, _0001, ..., or in a "
                    "data list"
                )
        raise DataError(
            f"{case.image}: {count(number, 'channel')}; there must be one for each of the "
            f"{len(modalities)} modalities ({', '.join(modalities)}){way_out}"
        )
    # The channels one after another in memory, as a network has them: nothing copies them later. And each is
    # read as it is needed, so that no two exist as the files have them.
    image = np.moveaxis(np.zeros((number, *shape), np.float32), 0, 3)
    for channel, (name, voxels) in enumerate(zip(modalities, channels, strict=True)):
        path = case.images[channel if len(files) > 1 else 0]
        _check_finite(path, voxels, f" ({name})")
        cleaned = clean(voxels, ct=is_ct(name))
        if cleaned is None:
            raise DataError(
                f"{path}: holds nothing but zeros and values beyond ±1e30, that is no data ({name})"
            )
        image[..., channel] = cleaned
        del voxels, cleaned
    if not image.any():
        raise DataError(f"{case.image}: holds nothing but zeros")
    return affine, image


def check_label(case: Case, values: Sequence[int] | None) -> np.ndarray:
    """Read the label of a case: its values (X, Y, Z).

    Raises DataError as `read_labels` does.
    """
    assert case.label is not None
    return read_labels(case.label, values, grid_of=case.image)


def read_labels(path: Path, values: Sequence[int] | None, *, grid_of: Path | None = None) -> np.ndarray:
    """Read label values (X, Y, Z), whole numbers.

    Values that the file can only hold to within rounding (as float32, or as integers times a slope) are
    the whole numbers that they stand for. A file that has the grid of `grid_of`, its image or a prediction,
    with its axes in another order or direction is brought to that one's.

    Raises DataError where the file cannot be read, lies on another grid than `grid_of`, or has
    other values than `values` (None: any whole number).
    """
    affine, voxels = read_volume(path)
    check_affine(path, affine)
    labels = _without_ones(voxels, 3)
    if labels.ndim != 3:
        raise DataError(
            f"{path}: has shape {voxels.shape}; a label volume must be X, Y, Z, one value for a voxel"
        )
    if grid_of is not None:
        of_image, shape = read_grid(grid_of)
        check_affine(grid_of, of_image)
        labels, affine = in_order_of(labels, affine, of_image)
        way_out = (
            "The two must lie on one grid: bring the one that is off to the other's (values of the nearest "
            "voxel), or mend the header that is wrong"
        )
        if labels.shape != shape:
            raise DataError(
                f"{path}: shape {labels.shape} does not match {shape}, that of {grid_of}. {way_out}"
            )
        if not same_grid(affine, of_image, shape):
            raise DataError(f"{path}: its affine differs from that of {grid_of}. {way_out}")
    _check_finite(path, labels, "; a label must be a whole number")
    found, place = np.unique(labels, return_inverse=True)
    whole = np.rint(found.astype(np.float64))
    apart = np.abs(found.astype(np.float64) - whole)
    wrong = found[apart > np.maximum(_precision(path, voxels) * np.maximum(np.abs(whole), 1), _step(path))]
    wrong = np.union1d(wrong, found[np.abs(whole) > MAX_LABEL])
    if values is not None:
        unknown = found[~np.isin(whole, list(values))]
        wrong = np.union1d(wrong, unknown)
    if len(wrong):
        number = repr(wrong[0].item()).removesuffix(".0")
        known = "" if values is None else f"; there are classes for {list(values)}"
        reason = "has no class" if values is not None else "is not a whole number below 2^31"
        raise DataError(f"{path}: label value {number} {reason}{known}")
    smallest = np.uint8 if len(whole) and 0 <= whole.min() <= whole.max() <= 255 else np.int64
    return whole.astype(smallest)[place].reshape(labels.shape)


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The affine of a file, or of the folder of a DICOM series, to mm; and its voxels, real numbers.

    Raises DataError where it cannot be read, has no orientation, or was damaged."""
    file = load(path)
    with _readable(path, file) as late:
        voxels = np.asarray(late)
    _check_real(path, voxels)
    return affine_of(file), voxels


@contextmanager
def _readable(path: Path, file: nib.Nifti1Image) -> Iterator[Any]:
    """The voxels of a file that `load` gave, to be read inside, from the first on to the last.

    Raises DataError where they cannot be read, or were damaged.
    """
    try:
        if path.name.lower().endswith(".nii.gz"):
            with gzip.open(path) as stream:
                yield type(file).from_stream(stream).dataobj
                # Nibabel reads as far as the voxels go, and never sees the checksum behind them.
                while stream.read(2**20):
                    pass
        else:
            yield file.dataobj
    except DataError:
        raise
    except Exception as error:  # a broken file makes nibabel, zlib or numpy raise one of a dozen
        raise DataError(f"{path}: not readable as NIfTI ({str(error) or type(error).__name__})") from error


def _check_real(path: Path, voxels: np.ndarray) -> None:
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{path}: its voxels are {voxels.dtype}; they must be real numbers")


def _late_volume(path: Path) -> Volume:
    """The volume of a file, whose voxels are read each time that they are asked for."""
    file = load(path)
    voxels = LateVoxels(file.shape, file.get_data_dtype(), lambda: read_volume(path)[1])
    return Volume(path, affine_of(file), voxels)


def _channels(volume: Volume) -> Iterator[np.ndarray]:
    """The channels (X, Y, Z) of a volume (X, Y, Z) or (X, Y, Z, channel), which are read one by one where a
    file can be."""
    shape = volume.voxels.shape
    late = isinstance(volume.voxels, LateVoxels) and load(volume.source)
    if late and isinstance(late.dataobj, nib.arrayproxy.ArrayProxy) and math.prod(shape[3:]) > 1:
        with _readable(volume.source, late) as voxels:
            for place in np.ndindex(shape[3:]):
                channel = np.asarray(voxels[(slice(None),) * 3 + place])
                _check_real(volume.source, channel)
                yield channel
                del channel
    else:
        whole = _without_ones(np.asarray(volume.voxels), 4)
        yield from np.moveaxis(whole[..., None] if whole.ndim == 3 else whole, 3, 0)


def _check_grid(case: Case, volume: Volume, affine: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raises DataError where one of a case's files is no volume, or lies on another grid and may not."""
    path, own = volume.source, _shape_without_ones(volume.voxels.shape, 3)
    if len(own) != 3:
        raise DataError(f"{path}: has shape {own}; it must be X, Y, Z")
    check_affine(path, volume.affine)
    empty, other = in_order_of(np.broadcast_to(np.int8(0), own), volume.affine, affine)
    same = empty.shape == shape and same_grid(other, affine, shape)
    if not same and not case.resample:
        what = (
            "lies on another grid than {} (their affines differ)"
            if empty.shape == shape
            else f"shape {empty.shape} does not match {shape}, that of {{}}"
        )
        raise DataError(
            f"{path}: {what.format(case.image)}. With --resample first, or the name of a modality, all are "
            "brought to the grid of that one"
        )


def _brought(case: Case, volume: Volume, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The voxels of one of a case's files on the case's grid."""
    voxels, other = in_order_of(_without_ones(np.asarray(volume.voxels), 3), volume.affine, affine)
    if voxels.shape == shape and same_grid(other, affine, shape):
        return voxels
    _check_finite(volume.source, voxels, "")
    moved = resampled(voxels, other, shape, affine)
    if not moved.any() and voxels.any():
        raise DataError(
            f"{volume.source}: has nothing where {case.image} is: by their headers the two show different "
            "places. Mend the header that is wrong, or give the scan that belongs to it"
        )
    return moved


def read_grid(path: Path) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The affine of a file to mm, and the first three lengths of its shape."""
    file = load(path)
    x, y, z = (*file.shape, 1, 1, 1)[:3]
    return affine_of(file), (x, y, z)


def write_volume(voxels: np.ndarray, like: Path, path: Path) -> None:
    """Write voxels (X, Y, Z) or (X, Y, Z, n) on the grid of `like`.

    Both qform and sform are copied from its header: viewers differ in which of them they believe.
    """
    with atomic(path) as temporary:
        save(on_grid_of(voxels, like), temporary)


def maps_on_grid_of(maps: np.ndarray, like: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """Maps (n, X, Y, Z), none negative, on the grid of `like`, as (X, Y, Z, n) in steps of a 4095th of the
    largest value: a quarter of the file that floats make. And the maps as that has them."""
    slope = np.float32(float(maps.max()) / MAP_STEPS or 1.0)
    steps = np.rint(maps / slope).astype(np.uint16)
    volume = on_grid_of(np.moveaxis(steps, 0, -1), like)
    volume.header.set_slope_inter(slope, 0)
    return volume, steps * slope


def on_grid_of(voxels: np.ndarray, like: Path | nib.Nifti1Pair) -> nib.Nifti1Image:
    """Voxels (X, Y, Z) or (X, Y, Z, n) on the grid of the file or image `like`, in its unit."""
    source = load(like) if isinstance(like, Path) else like
    volume = nib.Nifti1Image(voxels, source.affine)
    volume.header["pixdim"][:4] = source.header["pixdim"][:4]
    for name in GRID_FIELDS:
        volume.header[name] = source.header[name]
    return volume


def digest_of_case(case: Case) -> str:
    """Of the contents of a case's files, in their order."""
    files = case.files
    return hashlib.sha256(
        " ".join(digest_of(file) for path in files for file in parts_of(path)).encode()
    ).hexdigest()


def digest_of_cases(cases: Iterable[Case]) -> str:
    """Of the names of cases, in alphabetical order, and the contents of their files."""
    known = sorted((case.name, digest_of_case(case)) for case in cases)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def check_affine(path: Path, affine: np.ndarray) -> None:
    """Raises DataError where the affine of a file is singular, or its voxels are of no scanner's size."""
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise DataError(f"{path}: its affine is singular")
    sizes = nib.affines.voxel_sizes(affine)
    if sizes.min() < MIN_SPACING or sizes.max() > MAX_SPACING:
        told, by, way_out = " x ".join(f"{size:.4g}" for size in sizes), "", ""
        if is_volume(path):
            unit = {1: "metres", 3: "micrometres"}.get(int(load(path).header["xyzt_units"]) & 7, "mm")
            by = f", by a header in {unit}"
            way_out = ". Mend the header: its unit (xyzt_units) or its voxel size"
        raise DataError(
            f"{path}: its voxels are {told} mm large{by}; they must be between {MIN_SPACING:g} and "
            f"{MAX_SPACING:g} mm{way_out}"
        )


def _check_finite(path: Path, voxels: np.ndarray, where: str) -> None:
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        bad = int((~np.isfinite(voxels)).sum())
        raise DataError(
            f"{path}: holds NaN or infinite values{where}, in {count(bad, 'voxel')}; replace them"
        )


def _check_order(case: Case, modalities: Sequence[str]) -> None:
    """Whether the names of several files say the order of the modalities that they are taken for."""
    if len(case.images) != len(modalities) or len(modalities) == 1:
        return
    for place, found in enumerate(places_by_name(case.images, modalities)):
        if found is not None and found != place:
            raise DataError(
                f"{case.images[place]}: is given as {modalities[place]}, and by its name is "
                f"{modalities[found]}; the order of the files must be {', '.join(modalities)}. Put them in "
                "order, or give the file another name"
            )


def _without_ones(voxels: np.ndarray, dims: int) -> np.ndarray:
    """(X, Y, Z, 1, …) without the axes of length 1 after the third, down to `dims` axes and those needed.

    A time axis of one point is in front of the channels: (X, Y, Z, 1, C) is (X, Y, Z, C).
    """
    while voxels.ndim > 3 and voxels.shape[3] == 1 and (voxels.ndim > 4 or dims == 3):
        voxels = voxels[:, :, :, 0]
    while voxels.ndim > dims and voxels.shape[-1] == 1:
        voxels = voxels[..., 0]
    return voxels


def _shape_without_ones(shape: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return _without_ones(np.broadcast_to(np.int8(0), shape), dims).shape


def _precision(path: Path, voxels: np.ndarray) -> float:
    """The rounding of a file's values as a part of them: float32's at least, as programs go through it."""
    stored = load(path).get_data_dtype()
    kinds = [dtype for dtype in (stored, voxels.dtype) if dtype.kind == "f"]
    return max([4 * float(np.finfo(dtype).eps) for dtype in kinds] + [1e-6])


def _step(path: Path) -> float:
    """Half the step between the values of a file of integers times a slope; 0 for plain ones."""
    file = load(path)
    slope = getattr(file.dataobj, "slope", 1.0)
    if file.get_data_dtype().kind not in "iu" or not math.isfinite(slope) or abs(slope) >= 1:
        return 0.0
    return min(abs(slope) / 2 * (1 + 1e-6), LABEL_ROUNDING)
