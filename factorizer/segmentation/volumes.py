"""Volumes: their files in and out, and what can be wrong with them.

All lengths are in mm, whatever the unit of a file. Every error is a `DataError` that names the file, what
it holds and what it must hold.
"""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console
from scipy.ndimage import affine_transform, gaussian_filter, maximum_filter, minimum_filter

from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic, digest_of
from factorizer.segmentation.formats import LateVoxels, load, parts_of, save
from factorizer.segmentation.intensities import clean, is_ct, window_of
from factorizer.segmentation.names import is_volume, numbers_of, places_by_name
from factorizer.segmentation.recipe import RANGE_QUANTILES
from factorizer.segmentation.screen import count, log_lines, progress, tell_warning

# What a NIfTI header says about the grid, beside the voxel sizes. Its other fields (dtype, scaling, intent,
# description) are about the image's intensities and do not hold for what is written on its grid.
GRID_FIELDS = (
    *("xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z", "qform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
)
GRID_TOLERANCE = 1e-2  # mm, and a fifth of a voxel at most, between the places that two files give to a voxel
MILLIMETRES = {1: 1e3, 2: 1.0, 3: 1e-3}  # of NIfTI's units; a file that says none means mm
MIN_SPACING, MAX_SPACING = 0.01, 100.0  # mm; no scanner's beyond
MAX_LABEL = 2**31  # beyond it not every whole number has a float of its own, nor a class
UNSIGNED = "holds no value below 0 (air has -1000 Hounsfield units, fat -100: was an offset lost?)"
MIN_COVERED = 0.5  # of a grid that a modality is brought to
ALIKE, ALIKE_SAMPLE = 1 - 1e-4, 2**18  # correlation of a volume with its copy; by so many voxels
MAP_STEPS = 4095  # from 0 to the largest value of maps in a file
LABEL_ROUNDING = 0.05  # a label's distance from a whole number, at most, where the file's steps are coarse


@dataclass(frozen=True)
class Geometry:
    """What planning must know of a case; axes right, anterior, superior.

    Attributes:
        shape: voxels of the volume's nonzero part.
        spacing: mm of a voxel.
        windows: for each channel the 0.5 and 99.5 percentiles of the labelled voxels' intensities; None
            where nothing is labelled.
        labelled: number of voxels of each label value that is there.
        sides: for each of them, from where to where its voxels lie from left (-1) to right (1) in the
            nonzero part: their 5 and 95 percentiles.
        constant: channels that hold a single value.
        identical: pairs of channels with the same voxels, but for a factor and an offset.
        unsigned: channels of CT without a value below 0.
        digest: of the image's voxels.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    windows: tuple[tuple[float, float] | None, ...] = ()
    labelled: Mapping[int, int] = field(default_factory=dict)
    sides: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    constant: tuple[int, ...] = ()
    identical: tuple[tuple[int, int], ...] = ()
    unsigned: tuple[int, ...] = ()
    digest: str = ""


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
    orientation = nib.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    box = [np.nonzero(nonzero.any(axis=tuple(a for a in range(3) if a != axis)))[0] for axis in range(3)]
    shape = [int(np.ptp(box[axis])) + 1 for axis in order]
    spacing = nib.affines.voxel_sizes(affine)[order].tolist()
    windows = tuple(
        window_of(image[label != 0, channel], RANGE_QUANTILES) if label.any() else None
        for channel in range(len(task.modalities))
    )
    left_right = int(order[0])
    constant, identical, unsigned = _oddities(image, task.modalities)
    values, voxels = np.unique(label, return_counts=True)
    return Geometry(
        (shape[0], shape[1], shape[2]),
        (spacing[0], spacing[1], spacing[2]),
        windows,
        dict(zip(values.tolist(), voxels.tolist(), strict=True)),
        {
            value: _side(label == value, left_right, orientation[left_right, 1], box[left_right])
            for value in values.tolist()
            if value
        },
        constant,
        identical,
        unsigned,
        hashlib.sha256(np.ascontiguousarray(image).data).hexdigest(),
    )


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
    _check_affine(case.image, affine)
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
    the whole numbers that they stand for. A file that has the grid of the image `grid_of` with its axes in
    another order or direction is brought to that one's.

    Raises DataError where the file cannot be read, lies on another grid than the image `grid_of`, or has
    other values than `values` (None: any whole number).
    """
    affine, voxels = read_volume(path)
    _check_affine(path, affine)
    labels = _without_ones(voxels, 3)
    if labels.ndim != 3:
        raise DataError(
            f"{path}: has shape {voxels.shape}; a label volume must be X, Y, Z, one value for a voxel"
        )
    if grid_of is not None:
        of_image, shape = read_grid(grid_of)
        _check_affine(grid_of, of_image)
        labels, affine = in_order_of(labels, affine, of_image)
        way_out = "Bring it to that grid (values of the nearest voxel), or mend the header that is wrong"
        if labels.shape != shape:
            raise DataError(
                f"{path}: shape {labels.shape} does not match its image's {shape} ({grid_of}). {way_out}"
            )
        if not same_grid(affine, of_image, shape):
            raise DataError(f"{path}: its affine differs from its image's ({grid_of}). {way_out}")
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
    _check_affine(path, volume.affine)
    empty, other = in_order_of(np.broadcast_to(np.int8(0), own), volume.affine, affine)
    same = empty.shape == shape and same_grid(other, affine, shape)
    if not same and not case.resample:
        what = (
            "lies on another grid than {} (their affines differ)"
            if empty.shape == shape
            else f"shape {empty.shape} does not match {shape}, that of {{}}"
        )
        raise DataError(
            f"{path}: {what.format(case.image)}. With --resample first, or the name of a "
            "modality, all are "
            "brought to the grid of that one"
        )


def _brought(case: Case, volume: Volume, affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The voxels of one of a case's files on the case's grid."""
    voxels, other = in_order_of(_without_ones(np.asarray(volume.voxels), 3), volume.affine, affine)
    if voxels.shape == shape and same_grid(other, affine, shape):
        return voxels
    _check_finite(volume.source, voxels, "")
    moved = _on_grid(voxels, other, shape, affine)
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


def write_maps(maps: np.ndarray, like: Path, path: Path) -> np.ndarray:
    """Write maps (n, X, Y, Z), none negative, on the grid of `like`, as (X, Y, Z, n) in steps of a 4095th of
    the largest value: a quarter of the file that floats make. Returns them as the file has them."""
    slope = np.float32(float(maps.max()) / MAP_STEPS or 1.0)
    steps = np.rint(maps / slope).astype(np.uint16)
    volume = on_grid_of(np.moveaxis(steps, 0, -1), like)
    volume.header.set_slope_inter(slope, 0)
    with atomic(path) as temporary:
        save(volume, temporary)
    return steps * slope


def on_grid_of(voxels: np.ndarray, like: Path | nib.Nifti1Pair) -> nib.Nifti1Image:
    """Voxels (X, Y, Z) or (X, Y, Z, n) on the grid of the file or image `like`, in its unit."""
    source = load(like) if isinstance(like, Path) else like
    volume = nib.Nifti1Image(voxels, source.affine)
    volume.header["pixdim"][:4] = source.header["pixdim"][:4]
    for name in GRID_FIELDS:
        volume.header[name] = source.header[name]
    return volume


def in_order_of(voxels: np.ndarray, affine: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) or (X, Y, Z, n) and their affine, with the axes in the order and direction of those
    of the affine `wanted`. No value changes."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(wanted))
    turned = affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape[:3])
    return nib.apply_orientation(voxels, turn), turned


def digest_of_case(case: Case) -> str:
    """Of the contents of a case's files, in their order."""
    files = [path for path in (*case.images, case.label) if path is not None]
    return hashlib.sha256(
        " ".join(digest_of(file) for path in files for file in parts_of(path)).encode()
    ).hexdigest()


def digest_of_cases(cases: Iterable[Case]) -> str:
    """Of the names of cases, in alphabetical order, and the contents of their files."""
    known = sorted((case.name, digest_of_case(case)) for case in cases)
    return hashlib.sha256(repr(known).encode()).hexdigest()


def check_cases(console: Console, task: Task, training: Iterable[Case] | None = None) -> dict[str, Geometry]:
    """The geometry of each case of a task; what looks wrong is told. `training`: the cases to learn from,
    where they are not all.

    Raises DataError for the first case that cannot be used.
    """
    geometries: dict[str, Geometry] = {}
    tell = log_lines(console)
    with progress(console) as bar:
        for case in bar.track(task.cases, description="Checking volumes"):
            geometries[case.name] = check_case(task, case)
            tell(f"checked {len(geometries)} of {count(len(task.cases), 'case')}")
    for warning in doubts(task, geometries, [case.name for case in training or task.cases]):
        tell_warning(console, warning)
    return geometries


def doubts(task: Task, geometries: Mapping[str, Geometry], training: Sequence[str]) -> list[str]:
    """Sentences about what is allowed, and seldom meant: each names the cases. `training`: names of those
    that are learned from."""
    found = []
    for value, name in task.labels.items():
        having = [case for case, geometry in geometries.items() if value in geometry.labelled]
        if value and not set(having).intersection(training):
            others = f", but only {_some(having)}" if having else ""
            found.append(
                f"no training case has a voxel of {name!r} (label value {value}){others}: nothing can be "
                "learned about it"
            )
    empty = [name for name, geometry in geometries.items() if not geometry.sides]
    if 2 * len(empty) > len(geometries):
        found.append(
            f"the label map is empty in {len(empty)} of {count(len(geometries), 'case')}: {_some(empty)}"
        )
    for channel, modality in enumerate(task.modalities):
        flat = [name for name, geometry in geometries.items() if channel in geometry.constant]
        if flat:
            found.append(f"{modality} holds a single value in {count(len(flat), 'case')}: {_some(flat)}")
    for a, b in itertools.combinations(range(len(task.modalities)), 2):
        same = [name for name, geometry in geometries.items() if (a, b) in geometry.identical]
        if same:
            which = f"{task.modalities[a]} and {task.modalities[b]}"
            found.append(f"{which} are the same volume in {count(len(same), 'case')}: {_some(same)}")
    for channel, modality in enumerate(task.modalities):
        unsigned = [name for name, geometry in geometries.items() if channel in geometry.unsigned]
        if unsigned:
            found.append(f"{modality} {UNSIGNED} in {count(len(unsigned), 'case')}: {_some(unsigned)}")
    by_path: dict[Path | None, list[str]] = {}
    for case in task.cases:
        by_path.setdefault(case.label, []).append(case.name)
    for path, names in by_path.items():
        if path and len(names) > 1:
            found.append(f"these cases have the same label file: {_some(names)}")
    found.extend(doubts_of_files(task.cases))
    by_digest: dict[str, list[str]] = {}
    for name, geometry in geometries.items():
        by_digest.setdefault(geometry.digest, []).append(name)
    for digest, names in by_digest.items():
        if digest and len(names) > 1:
            known = set(training).intersection(names)
            leak = "; some are trained on, others held out" if known and len(known) < len(names) else ""
            found.append(f"these cases hold the same image: {_some(names)}{leak}")
    return found


def doubts_of_image(image: np.ndarray, modalities: Sequence[str]) -> list[str]:
    """Sentences about what is allowed, and seldom meant, in an image (X, Y, Z, channel)."""
    constant, identical, unsigned = _oddities(image, modalities)
    return [
        *(f"{modalities[channel]} holds a single value" for channel in constant),
        *(f"{modalities[a]} and {modalities[b]} are the same volume" for a, b in identical),
        *(f"{modalities[channel]} {UNSIGNED}" for channel in unsigned),
    ]


def _oddities(
    image: np.ndarray, modalities: Sequence[str]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Channels that hold a single value, pairs of channels that are one volume, and channels of CT without
    a value below 0."""
    channels = list(np.moveaxis(image, 3, 0))
    lowest = [float(channel.min()) for channel in channels]
    constant = tuple(k for k, channel in enumerate(channels) if lowest[k] == channel.max())
    pairs = itertools.combinations(range(len(channels)), 2)
    identical = tuple((a, b) for a, b in pairs if _alike(channels[a], channels[b]))
    unsigned = tuple(k for k, name in enumerate(modalities) if is_ct(name) and lowest[k] >= 0)
    return constant, identical, unsigned


def doubts_of_files(cases: Sequence[Case]) -> list[str]:
    """Sentences about what is odd in the names and the headers of files; they name the cases."""
    return _doubts_of_names(cases) + _doubts_of_headers(cases)


def _doubts_of_names(cases: Sequence[Case]) -> list[str]:
    """About files of a case whose names have the numbers of another one's first file."""
    owners: dict[tuple[int, ...], list[Case]] = {}
    for case in cases:
        owners.setdefault(numbers_of(case.images[0]) if case.images else (), []).append(case)
    found = []
    for numbers, members in owners.items():
        for case in members if numbers else ():
            others = [*case.images[1:], *([] if case.label is None else [case.label])]
            for file in others:
                own, other = numbers_of(file), owners.get(numbers_of(file), [])
                if own != numbers and own and len(other) == 1:
                    found.append(f"{case.name} has {file.name}, which by its name is of {other[0].name}")
    if not found:
        return []
    return [f"files of other cases are given, by their names: {_some(found)}"]


def _doubts_of_headers(cases: Iterable[Case]) -> list[str]:
    """Sentences about files whose headers do not agree with themselves on which side is left, or do not say
    it, and about modalities that cover little of the grid that they are brought to; they name the cases.
    Files that cannot be read are told elsewhere."""
    silent, two, apart = [], [], []
    for case in cases:
        try:
            if case.resample and min(_covered(case)) < MIN_COVERED:
                apart.append(case.name)
            header = _header_of(case)
            if header is None:
                continue
            known = [form for form in (header.get_sform(coded=True), header.get_qform(coded=True)) if form[1]]
            directions = {nib.aff2axcodes(affine) for affine, _ in known}
        except (DataError, ValueError, nib.spatialimages.HeaderDataError):
            continue
        if not known:
            silent.append(case.name)
        elif len(directions) > 1:
            two.append(case.name)
    found = []
    if silent:
        found.append(
            f"the header does not say which side is left (sform_code and qform_code are 0) in "
            f"{count(len(silent), 'case')}, and the first axis is taken to run from right to left: "
            f"{_some(silent)}"
        )
    if apart:
        found.append(
            f"by the headers, a modality covers less than half of the grid that it is brought to in "
            f"{count(len(apart), 'case')}; the rest of it is 0: {_some(apart)}"
        )
    if two:
        found.append(
            f"sform and qform give the axes different directions in {count(len(two), 'case')}, and the sform "
            f"is believed: {_some(two)}"
        )
    return found


def _header_of(case: Case) -> nib.Nifti1Header | None:
    """Of the volume whose grid is the case's; None where that is in memory and no NIfTI image."""
    if isinstance(case, LoadedCase):
        return case.volumes[case.images.index(case.image)].header
    return load(case.image).header


def _grids_of(case: Case) -> dict[Path, tuple[np.ndarray, tuple[int, ...]]]:
    """Affine and shape of each volume of a case."""
    if isinstance(case, LoadedCase):
        return {volume.source: (volume.affine, volume.voxels.shape[:3]) for volume in case.volumes}
    return {path: read_grid(path) for path in case.images}


def _covered(case: Case) -> list[float]:
    """The share of the case's grid that lies within each of its files."""
    grids = _grids_of(case)
    affine, shape = grids[case.image]
    steps = [np.linspace(0, length - 1, 16) for length in shape]
    places = affine @ np.stack(np.meshgrid(*steps, [1], indexing="ij")).reshape(4, -1)
    shares = []
    for path, (of_file, size) in grids.items():
        _check_affine(path, of_file)
        voxels = (np.linalg.inv(of_file) @ places)[:3]
        inside = (voxels > -0.5).all(axis=0) & (voxels < np.array(size)[:, None] - 0.5).all(axis=0)
        shares.append(float(inside.mean()))
    return shares


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two channels are the same volume, on another scale too (a copy in other units, or rounded)."""
    if np.array_equal(one, other):
        return True
    step = max(1, one.size // ALIKE_SAMPLE)
    samples = np.stack([one.reshape(-1)[::step], other.reshape(-1)[::step]]).astype(np.float64)
    return bool((samples.std(axis=1) > 0).all() and float(np.corrcoef(*samples)[0, 1]) > ALIKE)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def affine_of(file: nib.Nifti1Pair) -> np.ndarray:
    """Voxels to mm, whatever the file's unit."""
    unit = MILLIMETRES.get(int(file.header["xyzt_units"]) & 7, 1.0)
    return np.diag([unit, unit, unit, 1.0]) @ file.affine


def _check_affine(path: Path, affine: np.ndarray) -> None:
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
                f"{modalities[found]}; the "
                f"order of the files must be {', '.join(modalities)}. Put them in order, or give the file "
                "another name"
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


def same_grid(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether two affines put the corners of a volume at the same places."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape[:3]], [1], indexing="ij")).reshape(4, -1)
    tolerance = min(GRID_TOLERANCE, 0.2 * float(nib.affines.voxel_sizes(other).min()))
    return bool(np.abs((affine - other) @ corners).max() < max(tolerance, 1e-6))


def _on_grid(voxels: np.ndarray, affine: np.ndarray, shape: Sequence[int], wanted: np.ndarray) -> np.ndarray:
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


def _side(mask: np.ndarray, axis: int, direction: float, box: np.ndarray) -> tuple[float, float]:
    """The 5 and 95 percentiles of a mask's places from left (-1) to right (1) within a box."""
    voxels = mask.sum(axis=tuple(a for a in range(3) if a != axis))
    share = np.cumsum(voxels) / voxels.sum()
    middle, half = (box[0] + box[-1]) / 2, max((box[-1] - box[0]) / 2, 0.5)
    places = [(int(np.searchsorted(share, quantile)) - middle) / half for quantile in (0.05, 0.95)]
    low, high = sorted(place * float(direction) for place in places)
    return low, high
