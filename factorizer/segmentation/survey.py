"""A survey of a task: what planning must know of each case, and what is allowed but seldom meant.

Every error is a `DataError` that names the file, what it holds and what it must hold; a doubt is a sentence
that names the cases.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from rich.console import Console

from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.formats import load
from factorizer.segmentation.intensities import is_ct, window_of
from factorizer.segmentation.names import numbers_of
from factorizer.segmentation.recipe import RANGE_QUANTILES
from factorizer.segmentation.screen import count, log_lines, progress, tell_warning
from factorizer.segmentation.volumes import LoadedCase, check_affine, check_image, check_label, read_grid

UNSIGNED = "holds no value below 0 (air has -1000 Hounsfield units, fat -100: was an offset lost?)"
MIN_COVERED = 0.5  # of a grid that a modality is brought to
ALIKE, ALIKE_SAMPLE = 1 - 1e-4, 2**18  # correlation of a volume with its copy; by so many voxels


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
            "the header does not say which side is left (NIfTI: sform_code and qform_code are 0; NRRD: no "
            f"space or space directions; MHA: no TransformMatrix) in {count(len(silent), 'case')}, and the "
            f"first axis is taken to run from right to left: {_some(silent)}"
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


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two channels are the same volume, on another scale too (a copy in other units, or rounded)."""
    if np.array_equal(one, other):
        return True
    step = max(1, one.size // ALIKE_SAMPLE)
    samples = np.stack([one.reshape(-1)[::step], other.reshape(-1)[::step]]).astype(np.float64)
    return bool((samples.std(axis=1) > 0).all() and float(np.corrcoef(*samples)[0, 1]) > ALIKE)


def _covered(case: Case) -> list[float]:
    """The share of the case's grid that lies within each of its files."""
    grids = _grids_of(case)
    affine, shape = grids[case.image]
    steps = [np.linspace(0, length - 1, 16) for length in shape]
    places = affine @ np.stack(np.meshgrid(*steps, [1], indexing="ij")).reshape(4, -1)
    shares = []
    for path, (of_file, size) in grids.items():
        check_affine(path, of_file)
        voxels = (np.linalg.inv(of_file) @ places)[:3]
        inside = (voxels > -0.5).all(axis=0) & (voxels < np.array(size)[:, None] - 0.5).all(axis=0)
        shares.append(float(inside.mean()))
    return shares


def _grids_of(case: Case) -> dict[Path, tuple[np.ndarray, tuple[int, ...]]]:
    """Affine and shape of each volume of a case."""
    if isinstance(case, LoadedCase):
        return {volume.source: (volume.affine, volume.voxels.shape[:3]) for volume in case.volumes}
    return {path: read_grid(path) for path in case.images}


def _header_of(case: Case) -> nib.Nifti1Header | None:
    """Of the volume whose grid is the case's; None where that is in memory and no NIfTI image."""
    if isinstance(case, LoadedCase):
        return case.volumes[case.images.index(case.image)].header
    return load(case.image).header


def _side(mask: np.ndarray, axis: int, direction: float, box: np.ndarray) -> tuple[float, float]:
    """The 5 and 95 percentiles of a mask's places from left (-1) to right (1) within a box."""
    voxels = mask.sum(axis=tuple(a for a in range(3) if a != axis))
    share = np.cumsum(voxels) / voxels.sum()
    middle, half = (box[0] + box[-1]) / 2, max((box[-1] - box[0]) / 2, 0.5)
    places = [(int(np.searchsorted(share, quantile)) - middle) / half for quantile in (0.05, 0.95)]
    low, high = sorted(place * float(direction) for place in places)
    return low, high


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
