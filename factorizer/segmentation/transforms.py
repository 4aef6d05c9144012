"""From files to what a network sees: normalised volumes, and training crops drawn from them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, MetaTensor
from monai.transforms import (
    ClassesToIndicesd,
    Compose,
    CropForegroundd,
    EnsureTyped,
    MapLabelValued,
    MapTransform,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandScaleIntensityd,
    RandScaleIntensityFixedMeand,
    RandShiftIntensityd,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
    RandZoomd,
    ResampleToMatch,
    Spacingd,
    SpatialPadd,
)
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset

from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError, FlatImageError, data_error
from factorizer.segmentation.files import load_tensors, save_tensors
from factorizer.segmentation.formats import parts_of
from factorizer.segmentation.grids import OwnGrid
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.processes import group_position
from factorizer.segmentation.survey import Geometry, doubts_of_image
from factorizer.segmentation.volumes import check_image, read_labels

COARSE = 3.0  # a volume is too coarse for a network where its voxels are longer than so many of the network's
CACHE_BYTES = 6 * 2**30  # volumes beyond this are read again at every use


def files_of(case: Case) -> dict[str, Any]:
    """The item that `preprocessing` starts from: the case under "image", its label's path under "label"."""
    item: dict[str, Any] = {"image": case}
    return item if case.label is None else item | {"label": case.label}


class ReadVolumesd(MapTransform):
    """Files to volumes (C, X, Y, Z) float32 on the case's grid, as `check_image` and `read_labels` read them.

    Labels get the very affine of their image, so that rounding in theirs cannot make resampling give them one
    voxel more or less. An item with "doubts" gets what is odd about the image (`doubts_of_image`) there.
    """

    def __init__(self, keys: Sequence[str], plan: Plan) -> None:
        super().__init__(keys)
        self.plan = plan

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item, case = dict(data), data["image"]
        affine, image = check_image(case, self.plan.modalities)
        if "doubts" in item:
            item["doubts"] = doubts_of_image(image, self.plan.modalities)
        for key in self.key_iterator(item):
            if key == "image":
                voxels = np.moveaxis(image, 3, 0)
            else:
                voxels = read_labels(Path(item[key]), list(self.plan.labels), grid_of=case.image)[None]
            tensor = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
            item[key] = MetaTensor(tensor, meta={"affine": affine, "original_affine": affine})
        return item


class Normalised(MapTransform):
    """Each channel of an image on a scale of its own.

    A channel with a window (low, high) is clipped to it and brought to [-1, 1]. Another gets the mean 0 and
    the standard deviation 1 of its nonzero voxels; zeros stay. Sums are float64.
    """

    def __init__(self, windows: Sequence[tuple[float, float] | None]) -> None:
        super().__init__("image")
        self.windows = windows

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        item = dict(data)
        # Within the image, which remembers how it was resampled, and in place; a part of a larger image is
        # copied, so that that one is freed. A slice at a time: float64 is large.
        item["image"] = item["image"].contiguous()
        for channel, window in zip(item["image"].as_tensor(), self.windows, strict=True):
            if window is None:
                values = channel.numpy()  # whose masks need no index of every voxel
                signal = torch.from_numpy(values[values != 0]).double()
                std, mean = (
                    torch.std_mean(signal, correction=0) if len(signal) else (signal.new_ones(()),) * 2
                )
                spread = float(std) or 1.0
                for part in channel:
                    part.copy_(torch.where(part != 0, (part.double() - mean) / spread, 0))
            else:
                low, high = window
                for part in channel:
                    part.copy_(((part.double() - low) / (high - low) * 2 - 1).clip(-1, 1))
        return item


def preprocessing(plan: Plan, keys: Sequence[str]) -> Compose:
    """Files to network input: one orientation, one spacing, no empty margins, intensities on one scale.

    Axes run right, anterior, superior, `plan.spacing` mm a voxel, over the smallest box with the
    image's nonzero voxels. `keys` name the files of an item: "image", and label volumes under any
    other name, whose values become class indices 0, 1, ... in the order of `plan.labels`. Each
    becomes (C, X, Y, Z). Each channel of the image is normalised as `Normalised` says.
    """
    labels = [key for key in keys if key != "image"]
    transforms: list[Callable[..., Any]] = [
        ReadVolumesd(keys, plan),
        Orientationd(keys, axcodes="RAS", labels=None),
        Spacingd(
            keys, pixdim=plan.spacing, mode=["nearest" if key in labels else "bilinear" for key in keys]
        ),
        CropForegroundd(keys, source_key="image", select_fn=_nonzero, allow_smaller=True),
        Normalised(plan.window),
    ]
    values = list(plan.labels)
    if labels and values != list(range(len(values))):
        transforms.append(MapLabelValued(labels, values, list(range(len(values)))))
    return Compose(transforms)


def run_steps(steps: Compose, item: Mapping[str, Any]) -> Any:
    """What transforms make of an item. Raises the DataError of one of them, which MONAI hides."""
    try:
        return steps(item)
    except RuntimeError as error:
        raise data_error(error) or error from None


class PreparedCase:
    """The image of a case as a network sees it, and the ways between its grid and the case's own.

    Args:
        plan: names the preprocessing.
        case: whose files are read.

    Attributes:
        image: (C, X, Y, Z) float32, see `preprocessing`.
        doubts: sentences about what is odd about the files' voxels.

    Raises:
        DataError: see `check_image`; FlatImageError where there is nothing to be seen.
    """

    def __init__(self, plan: Plan, case: Case) -> None:
        self.plan, self.case = plan, case
        self._preprocess = preprocessing(plan, ("image",))
        self._item: dict[str, Any] = run_steps(self._preprocess, {**files_of(case), "doubts": []})
        self.doubts: list[str] = self._item.pop("doubts") + self._doubts_of_spacing()
        self.image: torch.Tensor = self._item["image"].as_tensor()
        if bool((self.image == self.image[:, :1, :1, :1]).all()):
            clipped = ", clipped to the windows of the plan" if any(plan.window) else ""
            raise FlatImageError(
                f"{case.image}: holds a single value in each channel{clipped}: there is nothing to be seen"
            )

    def _doubts_of_spacing(self) -> list[str]:
        affine = self._item["image"].meta["original_affine"]
        sizes = nib.affines.voxel_sizes(affine)[nib.io_orientation(affine)[:, 0].argsort()]
        if (sizes <= COARSE * np.array(self.plan.spacing)).all():
            return []
        own, known = (" x ".join(f"{size:.3g}" for size in grid) for grid in (sizes, self.plan.spacing))
        return [f"its voxels are {own} mm large, the network's {known} mm: details that it knows are missing"]

    def to_own_grid(self, values: torch.Tensor) -> torch.Tensor:
        """Values (n, X, Y, Z) on the network's grid to the case's own (n, X', Y', Z'); interpolated
        linearly, 0 where preprocessing has cut voxels off."""
        return self.own_grid.bring(values)

    @cached_property
    def own_grid(self) -> OwnGrid:
        """Where the voxels of the case's own grid lie on the network's."""
        image = self._item["image"]
        steps = {step["class"]: step for step in image.applied_operations}
        crop = steps["CropForeground"]
        return OwnGrid(
            np.asarray(image.meta["original_affine"]),
            steps["Orientation"]["orig_size"],
            image.affine.numpy(),
            [-before for before in crop["extra_info"]["cropped"][::2]],
            crop["orig_size"],
        )

    def class_indices(self, labels: np.ndarray) -> np.ndarray:
        """Label values (X', Y', Z') on the case's own grid to class indices (X, Y, Z) on the network's,
        uint8; each voxel takes the nearest."""
        image = self._item["image"]
        volume = MetaTensor(
            torch.from_numpy(labels.astype(np.float32))[None], affine=image.meta["original_affine"]
        )
        moved: Any = ResampleToMatch(mode="nearest", padding_mode="zeros")(volume, image)
        index = np.zeros(256, np.uint8)
        index[list(self.plan.labels)] = range(len(self.plan.labels))
        return index[moved[0].numpy().astype(np.uint8)]


def augmentation(plan: Plan) -> Compose:
    """Volume to training crop: a random place, a small affine map, and changes of intensity.

    All by the plan's recipe. Axes are flipped as the plan says.
    """
    keys, modes, recipe = ("image", "label"), ("bilinear", "nearest"), plan.recipe
    crop: Callable[..., Any] = RandSpatialCropd(keys, roi_size=plan.crop, random_size=False)
    if recipe.balanced:
        crop = RandCropByLabelClassesd(
            keys,
            label_key="label",
            spatial_size=plan.crop,
            num_classes=len(plan.labels),
            indices_key="label_cls_indices",
            warn=False,
        )
    sigma = recipe.blur_sigma
    gamma: dict[str, Any] = {"gamma": recipe.gamma, "retain_stats": True}
    low, high = recipe.zoom
    if 1 in plan.crop:
        low = max(low, 1.0)  # of one slice nothing would be left
    turned = [math.radians(recipe.rotation)] * 3
    if recipe.in_plane and max(plan.crop) > recipe.in_plane * min(plan.crop):
        planes = [[n for k, n in enumerate(plan.crop) if k != axis] for axis in range(3)]
        squarest = min(range(3), key=lambda axis: max(planes[axis]) / min(planes[axis]))
        turned = [angle if axis == squarest else 0.0 for axis, angle in enumerate(turned)]
    # Both of MONAI's defaults take the voxel at or below a place.
    magnified, sampled_down = ("nearest-exact", "area") if recipe.centred else ("nearest", "nearest")
    # Left out where they never act: so the draws of a plan that was made before them stay what they were.
    changes: list[tuple[float, Callable[..., Any]]] = [
        (
            recipe.affine_prob,
            partial(
                RandAffined,
                keys,
                rotate_range=turned,
                scale_range=(recipe.scaling,) * 3,
                mode=modes,
                padding_mode=recipe.padding,
            ),
        ),
        (
            recipe.zoom_prob,
            partial(
                RandZoomd,
                keys,
                min_zoom=low,
                max_zoom=high,
                mode=("trilinear", magnified),
                padding_mode="edge" if recipe.padding == "border" else "constant",
            ),
        ),
        (recipe.noise_prob, partial(RandGaussianNoised, "image", std=recipe.noise_std)),
        (recipe.blur_prob, partial(RandGaussianSmoothd, "image", sigma, sigma, sigma)),
        (recipe.scale_prob, partial(RandScaleIntensityd, "image", factors=recipe.scale)),
        (recipe.shift_prob, partial(RandShiftIntensityd, "image", offsets=recipe.shift)),
        (
            recipe.contrast_prob,
            partial(RandScaleIntensityFixedMeand, "image", factors=recipe.contrast, preserve_range=True),
        ),
        (
            recipe.low_resolution_prob,
            partial(
                RandSimulateLowResolutiond,
                "image",
                zoom_range=recipe.low_resolution,
                downsample_mode=sampled_down,
            ),
        ),
        (recipe.gamma_prob, partial(RandAdjustContrastd, "image", **gamma)),
        (recipe.inverted_gamma_prob, partial(RandAdjustContrastd, "image", **gamma, invert_image=True)),
        *((recipe.flip_prob, partial(RandFlipd, keys, spatial_axis=axis)) for axis in plan.flips),
    ]
    return Compose([crop, *(change(prob=prob) for prob, change in changes if prob)])


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
            ClassesToIndicesd(
                "label", num_classes=len(plan.labels), max_samples_per_class=plan.recipe.class_voxels
            ),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
            EnsureTyped("label", dtype=torch.uint8, track_meta=False),
        ]
    )
    if cache is not None:
        return CachedVolumes(plan, cases, steps, Path(cache))  # type: ignore[return-value]
    if geometries is None:
        raise ValueError("geometries must be given where cache is None")
    items = [files_of(case) for case in cases]
    extents = [np.array(geometries[c.name].shape) * geometries[c.name].spacing for c in cases]
    largest = max(math.prod(np.maximum(extent / plan.spacing, plan.crop).tolist()) for extent in extents)
    number = max(1, int(CACHE_BYTES / (largest * (4 * len(plan.modalities) + 1))))
    return CacheDataset(  # type: ignore[return-value]
        items, transform=steps, cache_num=number, progress=False, copy_cache=False
    )


class CachedVolumes(Dataset):
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
        files = [str(path.resolve()) for path in case.files]
        states = [Path(file).stat() for path in files for file in parts_of(Path(path))]
        times = [(s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for s in states]
        kept = (
            files,
            times,
            (case.grid, case.resample),
            plan.modalities,
            plan.labels,
            plan.spacing,
            plan.crop,
            plan.window,
            plan.recipe.class_voxels,
        )
        path = self.folder / f"{case.name}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:16]}.pt"
        if path.exists():
            return load_tensors(path)
        item = run_steps(self.steps, files_of(case))
        volume = {key: convert_to_tensor(item[key]) for key in ("image", "label", "label_cls_indices")}
        save_tensors(volume, path, shared=True)
        return volume


class CropBatches:
    """Training batches as a pure function of (plan, step), so that a resumed run goes on exactly.

    Batch `step` holds images (B, C, *crop) and class indices (B, 1, *crop), both float32. The
    volumes come in a new random order in every round. Where several processes train together, each
    takes its part of every batch, B = batch_size / processes: together they see what one would.

    Args:
        plan: its crop, recipe, batch size and seed.
        volumes: items of `training_volumes`.

    Raises:
        DataError: the batch cannot be shared evenly among the processes.
    """

    def __init__(self, plan: Plan, volumes: Sequence[dict[str, Any]]) -> None:
        self.plan, self.volumes, self.augment = plan, volumes, augmentation(plan)
        self.process_index, self.process_count = group_position()
        if plan.batch_size % self.process_count:
            raise DataError(
                f"batch_size must be a multiple of the {self.process_count} processes, got {plan.batch_size}"
            )

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.plan.batch_size
        own = range(self.process_index, size, self.process_count)
        crops = [self._crop(step * size + i) for i in own]
        image, label = (torch.stack([crop[key] for crop in crops]).float() for key in ("image", "label"))
        return image.as_subclass(torch.Tensor), label.as_subclass(torch.Tensor)

    def case_names(self, step: int) -> list[str]:
        """The cases that the crops of a batch come from, all processes' together."""
        size, names = self.plan.batch_size, self.plan.training
        places = {self._place(position) for position in range(step * size, (step + 1) * size)}
        return [names[k] if k < len(names) else f"number {k}" for k in sorted(places)]

    def _place(self, position: int) -> int:
        """Which volume a crop is of: in every round each comes once."""
        round_, place = divmod(position, len(self.volumes))
        return int(np.random.default_rng([self.plan.seed, round_]).permutation(len(self.volumes))[place])

    def _crop(self, position: int) -> dict[str, torch.Tensor]:
        state = np.random.SeedSequence([self.plan.seed, position]).generate_state(1)[0]
        self.augment.set_random_state(seed=int(state))
        crop = self.augment(self.volumes[self._place(position)])
        return crop[0] if isinstance(crop, list) else crop


def _nonzero(image: torch.Tensor) -> torch.Tensor:
    return image != 0
