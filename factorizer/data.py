"""Decathlon folders: read, check, split, and turn into normalised volumes and training crops.

A Decathlon folder (the layout of the Medical Segmentation Decathlon) holds `dataset.json` and the
NIfTI files that it names. What can be wrong with one is found here, before anything is trained:
every error is a `DataError` that names the file or field, what it got and what it needs.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, load_decathlon_datalist
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapLabelValued,
    NormalizeIntensityd,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    Spacingd,
    SpatialPadd,
)
from nibabel.filebasedimages import ImageFileError

MIN_CASES = 3  # two to train on and one held out
HELD_OUT, MAX_HELD_OUT = 0.2, 40  # share and number of the cases that training never sees
CACHE_BYTES = 6 * 2**30  # volumes beyond this are read again at every use


class DataError(ValueError):
    """Data that cannot be used. The message names the file or field, and what it needs."""


@dataclass(frozen=True)
class Case:
    """One labelled volume: its name and the absolute paths of its two files."""

    name: str
    image: Path
    label: Path


@dataclass(frozen=True)
class Task:
    """What a Decathlon folder says about itself.

    `labels` maps each label value to its name, in ascending order and with 0, the background,
    first. The network's class k is the k-th of these values.
    """

    name: str
    modalities: tuple[str, ...]
    labels: dict[int, str]
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Geometry:
    """Of a volume's nonzero part: shape in voxels, spacing in mm; axes right, anterior, superior."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` to write to, renamed to `path` on success.

    So a file under its final name is always whole: after an exception or a kill the old one, or
    none. The temporary name keeps the suffix, which is how nibabel and matplotlib know the format.
    """
    path = Path(path)
    temporary = path.with_name(f".part-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_decathlon(root: str | Path) -> Task:
    """The task that `root`/dataset.json describes. Reads no volume, but looks for every file.

    Raises DataError where the folder, dataset.json, one of its fields or a file is missing or of
    the wrong kind, or where there are fewer than three cases.
    """
    root = Path(root)
    path = root / "dataset.json"
    if not root.is_dir():
        raise DataError(f"data: {root} is not a folder; it must be one in the Decathlon's layout")
    if not path.is_file():
        raise DataError(
            f"{root}: dataset.json is missing; the Decathlon's layout is dataset.json, imagesTr/ "
            "and labelsTr/"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    wanted = {
        "modality": (dict, 'an object such as {"0": "MRI"}'),
        "labels": (dict, 'an object such as {"0": "background", "1": "tumour"}'),
        "training": (list, 'a list of {"image": ..., "label": ...}'),
    }
    for field, (kind, example) in wanted.items():
        if field not in content:
            raise DataError(f"{path}: the field {field!r} is missing; it must be {example}")
        if not isinstance(content[field], kind) or not content[field]:
            raise DataError(f"{path}: {field!r} is {content[field]!r}; it must be {example}")
    try:
        labels = {int(value): str(name) for value, name in content["labels"].items()}
    except ValueError as error:
        raise DataError(f"{path}: the keys of 'labels' must be label values ({error})") from error
    labels = dict(sorted(labels.items()))
    if next(iter(labels)) != 0 or len(labels) < 2 or max(labels) > 255:
        raise DataError(
            f"{path}: 'labels' has the values {list(labels)}; it needs 0, the background, and at "
            "least one more, none above 255"
        )
    for index, entry in enumerate(content["training"]):
        files = [entry.get("image"), entry.get("label")] if isinstance(entry, dict) else [None]
        if not all(isinstance(file, str) for file in files):
            raise DataError(
                f"{path}: training[{index}] is {entry!r}; it must name one file as 'image' and one as 'label'"
            )
    cases = tuple(
        Case(_stem(entry["image"]), Path(entry["image"]), Path(entry["label"]))
        for entry in load_decathlon_datalist(path, base_dir=root.resolve())
    )
    missing = [str(f) for case in cases for f in (case.image, case.label) if not f.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{path} names files that are missing: {', '.join(missing[:3])}{more}")
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: two training cases are called {twice!r}; names must differ")
    if len(cases) < MIN_CASES:
        raise DataError(f"{path}: too few cases: {len(cases)}; at least {MIN_CASES} are needed")
    return Task(
        name=str(content.get("name") or root.resolve().name),
        modalities=tuple(str(name) for name in content["modality"].values()),
        labels=labels,
        cases=cases,
    )


def check_case(task: Task, case: Case) -> Geometry:
    """Read both files of a case, check that they fit the task and each other.

    Raises DataError where a file cannot be read, the image is not three-dimensional, lacks
    channels or holds NaN, infinity or nothing but zeros, the label lies on another grid than its
    image, or a label value stands for no class.
    """
    image_file, image = _read_nifti(case.image)
    label_file, label = _read_nifti(case.label)
    if image.ndim not in (3, 4):
        raise DataError(f"{case.image}: has shape {image.shape}; it must be X, Y, Z or X, Y, Z, channel")
    channels = image.shape[3] if image.ndim == 4 else 1
    if channels != len(task.modalities):
        raise DataError(
            f"{case.image}: {channels} channels; dataset.json lists {len(task.modalities)} "
            f"modalities ({', '.join(task.modalities)})"
        )
    if label.shape != image.shape[:3]:
        raise DataError(
            f"{case.label}: shape {label.shape} does not match its image's {image.shape[:3]} ({case.image})"
        )
    if np.linalg.matrix_rank(image_file.affine) < 4:
        raise DataError(f"{case.image}: its affine is singular")
    if not np.allclose(image_file.affine, label_file.affine, atol=1e-2):
        raise DataError(f"{case.label}: its affine differs from its image's ({case.image})")
    if not np.isfinite(image).all():
        raise DataError(f"{case.image}: holds NaN or infinite values")
    unknown = sorted(set(np.unique(label).tolist()) - set(task.labels))
    if unknown:
        raise DataError(
            f"{case.label}: label value {unknown[0]:g} has no class; dataset.json lists {list(task.labels)}"
        )
    nonzero = image != 0 if image.ndim == 3 else (image != 0).any(axis=3)
    if not nonzero.any():
        raise DataError(f"{case.image}: holds nothing but zeros")
    # The axes in the order that `preprocessing` will bring them into.
    order = np.argsort(nib.io_orientation(image_file.affine)[:, 0])
    shape = [int(np.ptp(np.nonzero(nonzero)[axis])) + 1 for axis in order]
    spacing = nib.affines.voxel_sizes(image_file.affine)[order].tolist()
    return Geometry((shape[0], shape[1], shape[2]), (spacing[0], spacing[1], spacing[2]))


def split_cases(cases: Sequence[Case], seed: int) -> tuple[list[Case], list[Case]]:
    """(training, held out), both sorted: a fifth, at most 40, is held out, drawn with `seed`."""
    count = min(max(1, round(HELD_OUT * len(cases))), MAX_HELD_OUT)
    by_name = sorted(cases, key=lambda case: case.name)
    drawn = set(np.random.default_rng(seed).permutation(len(cases))[:count].tolist())
    training = [case for index, case in enumerate(by_name) if index not in drawn]
    held_out = [case for index, case in enumerate(by_name) if index in drawn]
    return training, held_out


def preprocessing(keys: Sequence[str], spacing: Sequence[float], values: Sequence[int]) -> Compose:
    """Files to network input: one orientation, one spacing, no empty margins, z-scores.

    Axes run right, anterior, superior, `spacing` mm a voxel, over the smallest box with the
    image's nonzero voxels. `keys` name the files of an item: "image", whose channels are each
    normalised by the mean and standard deviation of their nonzero voxels, and label volumes under
    any other name, whose values become class indices 0, 1, ... in the order of `values`. Each
    becomes (C, X, Y, Z).
    """
    labels = [key for key in keys if key != "image"]
    transforms: list[Callable[..., Any]] = [
        LoadImaged(keys, reader="NibabelReader"),
        EnsureChannelFirstd(keys),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(keys, pixdim=spacing, mode=["nearest" if key in labels else "bilinear" for key in keys]),
        CropForegroundd(keys, source_key="image", select_fn=_nonzero, allow_smaller=True),
        NormalizeIntensityd("image", nonzero=True, channel_wise=True),
    ]
    if labels and list(values) != list(range(len(values))):
        transforms.append(MapLabelValued(labels, list(values), list(range(len(values)))))
    return Compose(transforms)


def augmentation(crop: Sequence[int], num_classes: int, sided: bool) -> Compose:
    """Volume to training crop: a random place, a small affine map, and changes of intensity.

    Left and right are exchanged in half of the crops, unless the classes are `sided`. Front and
    back, top and bottom never are: anatomy has no such symmetry.
    """
    keys, modes = ("image", "label"), ("bilinear", "nearest")
    angle, scale = math.radians(15), 0.15
    transforms: list[Callable[..., Any]] = [
        RandCropByLabelClassesd(
            keys,
            label_key="label",
            spatial_size=crop,
            num_classes=num_classes,
            indices_key="label_cls_indices",
            warn=False,
        ),
        RandAffined(
            keys,
            prob=0.3,
            rotate_range=(angle,) * 3,
            scale_range=(scale,) * 3,
            mode=modes,
            padding_mode="border",
        ),
        RandGaussianNoised("image", prob=0.15, std=0.1),
        RandScaleIntensityd("image", factors=0.1, prob=0.3),
        RandShiftIntensityd("image", offsets=0.1, prob=0.3),
        RandAdjustContrastd("image", prob=0.15, gamma=(0.7, 1.5), retain_stats=True),
    ]
    if not sided:
        transforms.append(RandFlipd(keys, prob=0.5, spatial_axis=0))
    return Compose([*transforms, EnsureTyped(keys, track_meta=False)])


def training_volumes(
    cases: Sequence[Case],
    geometries: Sequence[Geometry],
    channels: int,
    spacing: Sequence[float],
    values: Sequence[int],
    crop: Sequence[int],
) -> Sequence[dict[str, Any]]:
    """The preprocessed volumes of `cases`, padded to the crop, as many in memory as 6 GiB hold.

    An item has image (C, X, Y, Z) float32, label (1, X, Y, Z) uint8, and the places of each class,
    from which `augmentation` draws the middle of a crop.
    """
    largest = max(math.prod(geometry.shape) for geometry in geometries)
    keys = ("image", "label")
    steps = Compose(
        [
            *preprocessing(keys, spacing, values).transforms,
            SpatialPadd(keys, spatial_size=crop),
            ClassesToIndicesd("label", num_classes=len(values), max_samples_per_class=10_000),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
            EnsureTyped("label", dtype=torch.uint8, track_meta=False),
        ]
    )
    return CacheDataset(  # type: ignore[return-value]
        [{"image": str(case.image), "label": str(case.label)} for case in cases],
        transform=steps,
        cache_num=max(1, CACHE_BYTES // (largest * (4 * channels + 1))),
        progress=False,
        copy_cache=False,
    )


class Crops:
    """Training batches as a pure function of (seed, step), so that a resumed run goes on exactly.

    Batch `step` holds images (B, C, *crop) and class indices (B, 1, *crop), both float32. The
    volumes come in a new random order in every round.
    """

    def __init__(
        self, volumes: Sequence[dict[str, Any]], augment: Compose, batch_size: int, seed: int
    ) -> None:
        self.volumes, self.augment = volumes, augment
        self.batch_size, self.seed = batch_size, seed

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        state = np.random.SeedSequence([self.seed, step]).generate_state(1)[0]
        self.augment.set_random_state(seed=int(state))
        crops = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            round_, place = divmod(position, len(self.volumes))
            order = np.random.default_rng([self.seed, round_]).permutation(len(self.volumes))
            crops.extend(self.augment(self.volumes[int(order[place])]))
        return (
            torch.stack([crop["image"] for crop in crops]),
            torch.stack([crop["label"] for crop in crops]),
        )


def _nonzero(image: torch.Tensor) -> torch.Tensor:
    return image != 0


def _stem(file: str) -> str:
    return Path(file).name.removesuffix(".gz").removesuffix(".nii")


def _read_nifti(path: Path) -> tuple[Any, np.ndarray]:
    try:
        file = nib.load(path)
        return file, np.asarray(file.dataobj)  # type: ignore[attr-defined]
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not readable as NIfTI ({error})") from error
