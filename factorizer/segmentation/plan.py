"""From what a task's volumes are like to the network, the crops and the training for it.

Everything that a run depends on beside the files themselves stands in a `Plan`, which is plain
data: it is kept in the checkpoint, so that a checkpoint alone is enough to segment with, and two
runs with equal plans train the same network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorizer.segmentation.anisotropy import (
    in_words,
    strides_for,
    target_spacing,
    total_stride,
    window_for,
)
from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.dataset import own_values
from factorizer.segmentation.errors import DataError, check_counts
from factorizer.segmentation.intensities import is_ct
from factorizer.segmentation.recipe import (
    BATCH_SIZE,
    HALF_GRID,
    LEARNING_RATE,
    MAX_CROP_VOXELS,
    MAX_STEPS,
    MIN_STEPS,
    NETWORK,
    PATCH,
    RECIPE,
    ROUNDS,
    STRIDES,
    WEIGHT_DECAY,
    Recipe,
)
from factorizer.segmentation.sides import mirrored_axes
from factorizer.segmentation.survey import Geometry
from factorizer.segmentation.volumes import MAX_SPACING, MIN_SPACING, digest_of_cases

HEAD_DIM = NETWORK["reshape"][1]["head_dim"]
RESHAPES = ("swin", "local", "global")


@dataclass(frozen=True)
class Plan:
    """What a run depends on.

    Attributes:
        task: a name.
        modalities: one for each channel of the image, in their order.
        labels: the label values and their names, 0 (background) first.
        spacing: of the network's input, mm, axes right, anterior, superior.
        crop: of the network's input, voxels, the same axes.
        network: arguments of `build_network`.
        training: names of cases.
        held_out: names of cases.
        regions: names of the network's outputs, each with the label values that it unites, for
            outputs that overlap, each decided by a sigmoid; of two regions one holds the other, or
            they share nothing. Empty: the outputs are the labels, which exclude one another (softmax).
        window: for each channel the intensities that it is clipped to, (low, high), or None for z-scores of
            its nonzero voxels. One pair alone holds for all channels.
        flips: axes along which mirror images are as likely as the originals.
        batch_size: crops in a training step, of all processes together.
        steps: of the training, in all.
        learning_rate: of AdamW, after a linear warm-up; a cosine ends it.
        weight_decay: of AdamW.
        seed: of the first weights, the crops and their augmentation.
        init: file of the weights that training starts from; empty: random ones.
        notes: sentences about what was decided, and why; nothing depends on them.
        data: a digest of the files that the run is about; empty where it is not known.
        resample: see `Case`: the modality whose grid the others are brought to, "first", or empty.
        recipe: all other numbers of the training; a mapping of the fields that differ from
            `Recipe`'s defaults serves as well.

    Raises:
        DataError: channels or regions do not fit, or a number of the recipe is out of its range.
        TypeError: the recipe has no such field.
    """

    task: str
    modalities: tuple[str, ...]
    labels: dict[int, str]
    spacing: tuple[float, ...]
    crop: tuple[int, ...]
    network: dict[str, Any]
    training: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    window: tuple[tuple[float, float] | None, ...] = ()
    flips: tuple[int, ...] = ()
    batch_size: int = BATCH_SIZE
    steps: int = MAX_STEPS
    learning_rate: float = LEARNING_RATE
    weight_decay: float = WEIGHT_DECAY
    seed: int = 0
    init: str = ""
    notes: tuple[str, ...] = ()
    data: str = ""
    resample: str = ""
    recipe: Recipe = field(default_factory=Recipe)  # not RECIPE: what plans without it were trained by

    def __post_init__(self) -> None:
        # A configuration file knows no tuples, and no keys but strings.
        for name, value in vars(self).items():
            object.__setattr__(self, name, _tuples(value))
        object.__setattr__(self, "labels", {int(value): name for value, name in self.labels.items()})
        window: Any = self.window or (None,)
        if isinstance(window[0], (int, float)) or len(window) == 1:  # as plans had it that knew one for all
            one = window if isinstance(window[0], (int, float)) else window[0]
            object.__setattr__(self, "window", (one,) * len(self.modalities))
        _check_windows(self.window, self.modalities)
        if isinstance(self.recipe, Mapping):
            object.__setattr__(self, "recipe", Recipe(**self.recipe))
        outputs = len(self.regions) or len(self.labels)
        for name, wanted in (("in_channels", len(self.modalities)), ("out_channels", outputs)):
            if self.network.get(name) != wanted:
                raise DataError(f"plan: network[{name!r}] must be {wanted}, got {self.network.get(name)}")
        self._own_values()

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes."""
        return list(self.labels.values())[1:]

    @property
    def outputs(self) -> list[str]:
        """Names of the network's outputs: the regions, or the labels, background first."""
        return list(self.regions) or list(self.labels.values())

    @property
    def targets(self) -> dict[str, tuple[int, ...]]:
        """What is measured: the regions or the foreground classes, with their label values."""
        return self.regions or {name: (value,) for value, name in self.labels.items() if value}

    def masks(self, classes: Tensor) -> Tensor:
        """Class indices (B, 1, ...) to the targets' masks (B, targets, ...), float32."""
        values = list(self.labels)
        indices = [torch.tensor([values.index(v) for v in united]) for united in self.targets.values()]
        return torch.cat([torch.isin(classes, i.to(classes)) for i in indices], dim=1).float()

    def decide(self, logits: Tensor) -> Tensor:
        """Logits (outputs, ...) to label values (...), uint8."""
        if not self.regions:
            values = torch.tensor(list(self.labels), dtype=torch.uint8)
            return values[logits.argmax(dim=0).cpu()]
        decided = torch.zeros(logits.shape[1:], dtype=torch.uint8)
        inside = dict(zip(self.regions, (logits > 0).cpu(), strict=True))
        for name, value in self._own_values().items():  # an inner region is written over its outer one
            decided[inside[name]] = value
        return decided

    def probabilities(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (outputs, ...) to probabilities (outputs, ...): of the regions, each for itself, or of the
        labels, together 1. Where the mask `seen` (...) is false, of which logits say nothing, is background.
        """
        if self.regions:
            return logits.sigmoid() * seen
        background = torch.zeros_like(logits)
        background[0] = 1
        return torch.where(seen, logits.softmax(0), background)

    def values_around(self) -> dict[str, int]:
        """For each target, outer ones first, the label value of what holds it: of a region, or 0."""
        own = self._own_values()
        around = dict.fromkeys(own or self.targets, 0)
        for name in own:
            # From the outermost on, so that the last one is the innermost that holds it.
            for other, value in own.items():
                if set(self.regions[other]) > set(self.regions[name]):
                    around[name] = value
        return around

    def _own_values(self) -> dict[str, int]:
        """For each region, outer ones first, the label value that it has and no region inside it."""
        own = own_values("plan", self.regions)
        for name, united in self.regions.items():
            if not set(united) <= set(self.labels):
                raise DataError(
                    f"plan: the region {name!r} unites the label values {united}; they must be of "
                    f"{list(self.labels)[1:]}"
                )
        return own


@dataclass(frozen=True)
class Wishes:
    """What a user may decide in place of `plan_run`; None leaves it to the data.

    Attributes:
        steps, batch_size, learning_rate: see `Plan`.
        crop, spacing: three numbers, axes right, anterior, superior; voxels and mm.
        network: "swin", "local" or "global": windows that are shifted, are not, or hold the whole volume.
        rank: of every factorisation.
        width: channels of each level, finest first.
        half_grid: whether the stages work on half of the crop's grid (`stem_stride` of the network); None:
            they do not, but see `within`.
        flips: axes, see `Plan`.
    """

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    crop: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    network: str | None = None
    rank: int | None = None
    width: tuple[int, ...] | None = None
    half_grid: bool | None = None
    flips: tuple[int, ...] | None = None

    def within(self, budget: str, device: torch.device) -> Wishes:
        """These, where a budget (`recipe.BUDGETS`) says how long to train unless they name the steps.

        In a short one on a CPU the stages work on half of the grid, if that was not decided: fewer voxels
        leave time for more steps, and a better network; of as many steps the whole grid makes the better one.
        """
        if self.half_grid is not None or self.steps is not None or device.type != "cpu":
            return self
        return replace(self, half_grid=budget in HALF_GRID)

    def of_the_network(self) -> dict[str, Any]:
        """What is said about the network, by the options' names."""
        grid = None if self.half_grid is None else "half" if self.half_grid else "full"
        return {"network": self.network, "rank": self.rank, "width": self.width, "grid": grid}

    def __post_init__(self) -> None:
        """Raises DataError for a value that no run can have."""
        check_counts(steps=(self.steps, 1), batch_size=(self.batch_size, 1), rank=(self.rank, 1))
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise DataError(f"learning-rate: got {self.learning_rate:g}; it must be above 0 and below 10")
        if self.crop is not None and (len(self.crop) != 3 or not all(8 <= n <= 1024 for n in self.crop)):
            raise DataError(
                f"crop: got {_listed(self.crop)}; it must be three numbers of voxels from 8 to 1024"
            )
        if self.spacing is not None and (
            len(self.spacing) != 3 or not all(MIN_SPACING <= n <= MAX_SPACING for n in self.spacing)
        ):
            raise DataError(
                f"spacing: got {_listed(self.spacing)}; it must be three lengths from {MIN_SPACING:g} to "
                f"{MAX_SPACING:g} mm"
            )
        if self.network not in (None, *RESHAPES):
            raise DataError(f"network: got {self.network!r}; it must be one of {', '.join(RESHAPES)}")
        if self.width is not None and (
            not 2 <= len(self.width) <= 8 or any(n < HEAD_DIM or n % HEAD_DIM for n in self.width)
        ):
            raise DataError(
                f"width: got {_listed(self.width)}; it must be 2 to 8 numbers of channels, multiples of "
                f"{HEAD_DIM}"
            )
        if self.flips is not None and (set(self.flips) - {0, 1, 2} or len(set(self.flips)) < len(self.flips)):
            raise DataError(
                f"flips: got {_listed(self.flips)}; it must be none, or some of 0 (left-right), 1 "
                "(front-back), 2 (bottom-top)"
            )


AS_PLANNED = Wishes()


def same_value(name: str, one: Any, other: Any) -> bool:
    """Whether two plans say the same by their values of the field `name`: of labels and regions also in one
    order, which is that of the network's outputs."""
    return one == other and (name not in ("labels", "regions") or list(one) == list(other))


def plan_run(
    task: Task,
    geometries: Mapping[str, Geometry],
    training: Sequence[Case],
    held_out: Sequence[Case],
    wishes: Wishes = AS_PLANNED,
    *,
    seed: int = 0,
    resample: str = "",
) -> Plan:
    """The plan for a task with this split, and with these geometries by the names of its cases.

    Spacing: the median of the volumes, or what `anisotropy.target_spacing` says. Crop: their median shape at
    that spacing, each axis rounded up to a multiple of what the network halves it by (on half of the grid
    all but the last time), then the axis that is longest in mm shortened until at most 64^3 voxels are left;
    windows that do not divide it are completed with zeros. An axis is halved, and a window extends along it,
    as far as its voxels are about as fine as the others (`anisotropy`). Steps: so many that training sees 10
    times the voxels of its volumes, but at least 300 and at most 1000. Left and right are exchanged unless a
    class is bound to a side (`sides`); front and back, top and bottom never are: anatomy has no such
    symmetry. A channel of CT is clipped to the
    window that the labelled voxels of the training cases have in it in the median; others are not. What
    `wishes` decide is not asked of the data.

    Raises:
        DataError: a channel is CT, and no training case has a labelled voxel; or a wish that no network fits.
    """
    notes = []
    spacings = np.array([g.spacing for g in geometries.values()])
    shapes = np.array([g.shape for g in geometries.values()])
    spacing = np.array(wishes.spacing) if wishes.spacing else target_spacing(spacings, shapes)
    median = np.median(shapes * spacings / spacing, axis=0)
    if not wishes.spacing and not np.allclose(spacing, np.median(spacings, axis=0)):
        notes.append("spacing: along the coarse axis that of the finer volumes, as slices are few and thick")
    half = bool(wishes.half_grid)
    stem, *below = strides_for(spacing.tolist(), (1 + half, *_strides(wishes.width)[1:]))
    patch = window_for((spacing * stem).tolist(), PATCH)
    kind = wishes.network or "swin"
    if words := in_words(spacing.tolist(), (stem, *below), None if kind == "global" else patch):
        notes.append(words)
    # A level that the crop does not fit is padded: on half a grid the coarsest one is, which is cheaper than
    # twice as coarse a choice of crops.
    divisor = total_stride((stem, *below[: len(below) - half]))
    if wishes.crop:
        crop = np.array(wishes.crop)
    else:
        crop = np.ceil(np.round(median / divisor, 6)).astype(int) * divisor
        while crop.prod() > MAX_CROP_VOXELS and (crop > divisor).any():
            longest = np.where(crop > divisor, crop * spacing, 0).argmax()
            crop[longest] -= divisor[longest]
    batch_size = wishes.batch_size or BATCH_SIZE
    steps = wishes.steps
    if steps is None:
        crops_per_round = len(training) * max(1.0, float(median.prod() / crop.prod()))
        steps = math.ceil(ROUNDS * crops_per_round / batch_size)
        steps = min(max(steps, MIN_STEPS), MAX_STEPS)
    window = tuple(
        _window(name, [geometries[case.name].windows[channel] for case in training]) if is_ct(name) else None
        for channel, name in enumerate(task.modalities)
    )
    size = tuple(int(length) for length in crop)
    names = task.labels | {-1 - k: name for k, name in enumerate(task.regions)}
    flips, reason = mirrored_axes(names, [geometries[case.name] for case in training])
    if wishes.flips is not None:
        flips, reason = wishes.flips, "as was asked for"
    told = "left and right are exchanged" if 0 in flips else "left and right are not exchanged"
    notes.append(f"flips: {told}: {reason}")
    network: dict[str, Any] = {
        "in_channels": len(task.modalities),
        "out_channels": len(task.regions) or len(task.labels),
        "spatial_size": size,
        **NETWORK,
        "strides": (1, *below),
        "reshape": reshape_for(kind, patch),
    }
    if half:
        network["stem_stride"] = stem
    if wishes.rank is not None:
        network["rank"] = wishes.rank
    if wishes.width is not None:
        levels = len(wishes.width)
        depths = {"encoder_depth": (1,) * levels, "decoder_depth": (1,) * (levels - 1)}
        network |= {"encoder_width": wishes.width, **depths}
        if "num_deep_supr" in network:
            network["num_deep_supr"] = min(network["num_deep_supr"], levels - 1)
    return Plan(
        task=task.name,
        modalities=task.modalities,
        labels=task.labels,
        regions=task.regions,
        spacing=tuple(spacing.tolist()),
        crop=size,
        network=network,
        training=tuple(case.name for case in training),
        held_out=tuple(case.name for case in held_out),
        window=window,
        flips=flips,
        batch_size=batch_size,
        steps=steps,
        learning_rate=wishes.learning_rate or LEARNING_RATE,
        seed=seed,
        recipe=RECIPE,
        notes=tuple(notes),
        data=digest_of_cases([*training, *held_out]) if any(c.images for c in training) else "",
        resample=resample,
    )


def _strides(width: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of every level; all but the first are halved."""
    return STRIDES if width is None else (1,) + (2,) * (len(width) - 1)


def reshape_for(kind: str, patch: int | tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """How the network's layers cut a volume into windows."""
    name, options = NETWORK["reshape"]
    if kind == "global":
        return "Matricize", {"head_dim": options["head_dim"], "grid_size": 1}
    if kind == "local":
        return "Matricize", {"head_dim": options["head_dim"], "patch_size": patch}
    shifts = options["shifts"]
    if patch != options["patch_size"]:
        half = tuple(p // 2 for p in patch) if isinstance(patch, tuple) else patch // 2
        shifts = tuple(shift if shift is None else half for shift in shifts)
    return name, {**options, "patch_size": patch, "shifts": shifts}


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _window(name: str, windows: Sequence[tuple[float, float] | None]) -> tuple[float, float]:
    """What a channel of CT is clipped to: the median of what the training cases' labelled voxels have."""
    found = [window for window in windows if window is not None]
    if not found:
        raise DataError(
            f"data: no training case has labelled voxels of several intensities, so {name} has no window"
        )
    low, high = np.median(found, axis=0).tolist()
    return low, high


def _check_windows(windows: Any, modalities: Sequence[str]) -> None:
    if len(windows) != len(modalities) or not all(
        w is None or (len(w) == 2 and w[0] < w[1]) for w in windows
    ):
        raise DataError(
            f"plan: window must be None or (low, high) for each of the {len(modalities)} modalities, got "
            f"{windows!r}"
        )


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
