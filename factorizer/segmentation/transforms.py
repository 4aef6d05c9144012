"""From files to what a network sees: normalised volumes, and training crops drawn from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor, NibabelReader
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    MapLabelValued,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialPadd,
)
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset

from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import load_tensors, save_tensors
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.volumes import Geometry, check_image, check_label

CACHE_BYTES = 6 * 2**30  # volumes beyond this are read again at every use


def files_of(case: Case) -> dict[str, Any]:
    """The item that `preprocessing` starts from: paths under "image" and, if there is one, "label"."""
    images = [str(path) for path in case.images]
    item: dict[str, Any] = {"image": images[0] if len(images) == 1 else images}
    return item if case.label is None else item | {"label": str(case.label)}


class CaseReader(NibabelReader):
    """Reads the files of a case on the grid of the first: `check_image` lets their affines differ by
    rounding, which MONAI does not."""

    def read(self, data: Any, **kwargs: Any) -> Any:
        files = super().read(data, **kwargs)
        if not isinstance(files, list):
            return files
        return [nib.Nifti1Image(file.dataobj, files[0].affine) for file in files]


class OneGridd(MapTransform):
    """Gives labels the very affine of their image, so that rounding in theirs cannot make resampling give
    them one voxel more or less."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        for key in self.key_iterator(item):
            item[key].affine = item["image"].affine
        return item


def preprocessing(plan: Plan, keys: Sequence[str]) -> Compose:
    """Files to network input: one orientation, one spacing, no empty margins, intensities on one scale.

    Axes run right, anterior, superior, `plan.spacing` mm a voxel, over the smallest box with the
    image's nonzero voxels. `keys` name the files of an item: "image", and label volumes under any
    other name, whose values become class indices 0, 1, ... in the order of `plan.labels`. Each
    becomes (C, X, Y, Z). Each channel of the image is normalised by the mean and standard deviation
    of its nonzero voxels or, where the plan has a window, clipped to it and brought to [-1, 1].
    """
    labels = [key for key in keys if key != "image"]
    transforms: list[Callable[..., Any]] = [
        LoadImaged(keys, reader=CaseReader),
        EnsureChannelFirstd(keys),
        OneGridd(keys),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(
            keys, pixdim=plan.spacing, mode=["nearest" if key in labels else "bilinear" for key in keys]
        ),
        CropForegroundd(keys, source_key="image", select_fn=_nonzero, allow_smaller=True),
    ]
    if plan.window is None:
        transforms.append(NormalizeIntensityd("image", nonzero=True, channel_wise=True))
    else:
        low, high = plan.window
        transforms.append(ScaleIntensityRanged("image", low, high, -1, 1, clip=True))
    values = list(plan.labels)
    if labels and values != list(range(len(values))):
        transforms.append(MapLabelValued(labels, values, list(range(len(values)))))
    return Compose(transforms)


def to_own_grid(values: torch.Tensor, item: dict[str, Any], before: Compose) -> torch.Tensor:
    """Values (C, X, Y, Z) on the grid of item["image"], which `before` has made, to the grid of its
    files; interpolated linearly, 0 where `before` has cut voxels off."""
    after = Invertd("values", transform=before, orig_keys="image", nearest_interp=False)
    result: Any = {**item, "values": MetaTensor(values)}
    return after(result)["values"].as_tensor()


def augmentation(plan: Plan) -> Compose:
    """Volume to training crop: a random place, a small affine map, and changes of intensity.

    The crop's middle is a voxel of a class that is drawn first. Axes are flipped as the plan says.
    """
    keys, modes = ("image", "label"), ("bilinear", "nearest")
    angle, scale = math.radians(15), 0.15
    transforms: list[Callable[..., Any]] = [
        RandCropByLabelClassesd(
            keys,
            label_key="label",
            spatial_size=plan.crop,
            num_classes=len(plan.labels),
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
        *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in plan.flips),
    ]
    return Compose(transforms)


def training_volumes(
    plan: Plan,
    cases: Sequence[Case],
    geometries: Mapping[str, Geometry] | None = None,
    cache: str | Path | None = None,
) -> Sequence[dict[str, Any]]:
    """The preprocessed volumes of `cases`, padded to the crop.

    An item has image (C, X, Y, Z) float32, label (1, X, Y, Z) uint8, and the places of each class,
    from which `augmentation` draws the middle of a crop.

    With `cache`, a folder, volumes are checked and prepared at their first use and kept there. Without it as
    many are held in memory as 6 GiB take, by the `geometries` of the cases' names, and the others
    read again at every use.
    """
    keys = ("image", "label")
    steps = Compose(
        [
            *preprocessing(plan, keys).transforms,
            SpatialPadd(keys, spatial_size=plan.crop),
            ClassesToIndicesd("label", num_classes=len(plan.labels), max_samples_per_class=10_000),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
            EnsureTyped("label", dtype=torch.uint8, track_meta=False),
        ]
    )
    if cache is not None:
        return KeptVolumes(plan, cases, steps, Path(cache))  # type: ignore[return-value]
    if geometries is None:
        raise ValueError("geometries must be given where cache is None")
    items = [files_of(case) for case in cases]
    extents = [np.array(geometries[c.name].shape) * geometries[c.name].spacing for c in cases]
    largest = max(math.prod(np.maximum(extent / plan.spacing, plan.crop).tolist()) for extent in extents)
    number = max(1, int(CACHE_BYTES / (largest * (4 * len(plan.modalities) + 1))))
    return CacheDataset(  # type: ignore[return-value]
        items, transform=steps, cache_num=number, progress=False, copy_cache=False
    )


class KeptVolumes(Dataset):
    """Volumes that are checked and prepared at their first use, and then kept in a folder.

    The name of a file there depends on the case's files, their times and the plan's preprocessing:
    what has changed is prepared anew.
    """

    def __init__(self, plan: Plan, cases: Sequence[Case], steps: Compose, folder: Path) -> None:
        self.plan, self.cases, self.steps, self.folder = plan, cases, steps, folder
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        plan, case = self.plan, self.cases[index]
        files = [str(path.resolve()) for path in (*case.images, case.label) if path is not None]
        times = [Path(file).stat().st_mtime_ns for file in files]
        kept = (files, times, plan.labels, plan.spacing, plan.crop, plan.window)
        path = self.folder / f"{case.name}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:16]}.pt"
        if path.exists():
            return load_tensors(path)
        check_image(case, plan.modalities)
        check_label(case, list(plan.labels))
        item: Any = self.steps(files_of(case))
        volume = {key: convert_to_tensor(item[key]) for key in ("image", "label", "label_cls_indices")}
        save_tensors(volume, path, shared=True)
        return volume


class Crops:
    """Training batches as a pure function of (seed, step), so that a resumed run goes on exactly.

    Batch `step` holds images (B, C, *crop) and class indices (B, 1, *crop), both float32. The
    volumes come in a new random order in every round. With `parts` processes each takes its part of
    every batch, B = batch_size / parts: together they see what one process would.
    """

    def __init__(
        self,
        volumes: Sequence[dict[str, Any]],
        augment: Compose,
        batch_size: int,
        seed: int,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        if batch_size % parts:
            raise DataError(f"batch_size must be a multiple of the {parts} processes, got {batch_size}")
        self.volumes, self.augment = volumes, augment
        self.batch_size, self.seed = batch_size, seed
        self.part, self.parts = part, parts

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = step * self.batch_size
        crops = [self._crop(first + i) for i in range(self.part, self.batch_size, self.parts)]
        image, label = (torch.stack([crop[key] for crop in crops]).float() for key in ("image", "label"))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

    def _crop(self, position: int) -> dict[str, torch.Tensor]:
        round_, place = divmod(position, len(self.volumes))
        order = np.random.default_rng([self.seed, round_]).permutation(len(self.volumes))
        state = np.random.SeedSequence([self.seed, position]).generate_state(1)[0]
        self.augment.set_random_state(seed=int(state))
        crop = self.augment(self.volumes[int(order[place])])
        return crop[0] if isinstance(crop, list) else crop


def _nonzero(image: torch.Tensor) -> torch.Tensor:
    return image != 0
