"""From what a task's volumes are like to the network, the crops and the training for it.

Everything that a run depends on beside the files themselves stands in a `Plan`, which is plain
data: it is kept in the checkpoint, so that a checkpoint alone is enough to segment with, and two
runs with equal plans train the same network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.recipe import (
    BATCH_SIZE,
    DIVISOR,
    LEARNING_RATE,
    MAX_CROP_VOXELS,
    MAX_STEPS,
    MIN_STEPS,
    NETWORK,
    RECIPE,
    ROUNDS,
    WEIGHT_DECAY,
    Recipe,
)
from factorizer.segmentation.volumes import Geometry


@dataclass(frozen=True)
class Plan:
    """What a run depends on.

    Attributes:
        task: a name.
        modalities: one for each channel of the image, in their order.
        labels: the label values and their names, 0 (background) first.
        spacing, crop: of the network's input, mm and voxels, axes right, anterior, superior.
        network: arguments of `build_network`.
        training, held_out: names of cases.
        regions: names of the network's outputs, each with the label values that it unites, for
            outputs that overlap, each decided by a sigmoid; of two regions one holds the other, or
            they share nothing. Empty: the outputs are the labels, which exclude one another (softmax).
        intensity_range: what the image is clipped to; None for z-scores of the nonzero voxels.
        flips: axes along which mirror images are as likely as the originals.
        batch_size: crops in a training step, of all processes together.
        steps, learning_rate, weight_decay: of AdamW, with linear warm-up, then cosine.
        seed: of the first weights, the crops and their augmentation.
        init: file of the weights that training starts from; empty: random ones.
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
    intensity_range: tuple[float, float] | None = None
    flips: tuple[int, ...] = ()
    batch_size: int = BATCH_SIZE
    steps: int = MAX_STEPS
    learning_rate: float = LEARNING_RATE
    weight_decay: float = WEIGHT_DECAY
    seed: int = 0
    init: str = ""
    recipe: Recipe = field(default_factory=Recipe)  # not RECIPE: what plans without it were trained by

    def __post_init__(self) -> None:
        # A configuration file knows no tuples, and no keys but strings.
        for name, value in vars(self).items():
            object.__setattr__(self, name, _tuples(value))
        object.__setattr__(self, "labels", {int(value): name for value, name in self.labels.items()})
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

    def _own_values(self) -> dict[str, int]:
        """For each region, outer ones first, the label value that it has and no region inside it."""
        own = {}
        for name, united in sorted(self.regions.items(), key=lambda item: -len(item[1])):
            inner = [set(r) for n, r in self.regions.items() if n != name and set(r) <= set(united)]
            rest = set(united).difference(*inner)
            if len(rest) != 1 or not set(united) <= set(self.labels) - {0}:
                raise DataError(
                    f"plan: the region {name!r} unites the label values {united}; they must be of "
                    f"{list(self.labels)[1:]}, and exactly one of them in no region inside it"
                )
            own[name] = rest.pop()
        return own


def read_plan(content: Mapping[str, Any]) -> Plan:
    """The plan that `dataclasses.asdict` made plain data of, also that of version 0.1.0.

    There `intensity_range` was called window, and the recipe was always `Recipe`'s defaults.

    Raises:
        DataError, TypeError: see `Plan`.
    """
    content = dict(content)
    if "window" in content:
        content["intensity_range"] = content.pop("window")
    return Plan(**content)


def plan_run(
    task: Task,
    geometries: Mapping[str, Geometry],
    training: Sequence[Case],
    held_out: Sequence[Case],
    *,
    steps: int | None = None,
    seed: int = 0,
) -> Plan:
    """The plan for a task with this split, and with these geometries by the names of its cases.

    Spacing: the median of the volumes. Crop: their median shape at that spacing, each axis rounded up
    to a multiple of 4, then the longest axis shortened until at most 64^3 voxels are left. Steps,
    where not given: so many that training sees 10 times the voxels of its volumes, but at least
    300 and at most 1000. Left and right are exchanged unless a class is named left or right; front
    and back, top and bottom never are: anatomy has no such symmetry. CT is clipped to the intensities
    that the labelled voxels of the training cases have in the median.

    Raises:
        DataError: the images are CT, and no training case has a labelled voxel.
    """
    spacing = np.median([geometry.spacing for geometry in geometries.values()], axis=0)
    shapes = np.array([g.shape for g in geometries.values()])
    shapes = shapes * [g.spacing for g in geometries.values()] / spacing
    median = np.median(shapes, axis=0)
    crop = np.ceil(median / DIVISOR).astype(int) * DIVISOR
    while crop.prod() > MAX_CROP_VOXELS:
        crop[crop.argmax()] -= DIVISOR
    if steps is None:
        crops_per_round = len(training) * max(1.0, float(median.prod() / crop.prod()))
        steps = math.ceil(ROUNDS * crops_per_round / BATCH_SIZE)
        steps = min(max(steps, MIN_STEPS), MAX_STEPS)
    intensity_range = None
    if any(name.upper() == "CT" for name in task.modalities):
        ranges = [r for case in training if (r := geometries[case.name].intensity_range) is not None]
        if not ranges:
            raise DataError("data: no training case has a labelled voxel, so CT has no range of intensities")
        low, high = np.median(ranges, axis=0).tolist()
        intensity_range = (low, high)
    size = tuple(int(length) for length in crop)
    names = " ".join(task.labels.values()).lower()
    channels = {"in_channels": len(task.modalities), "out_channels": len(task.labels)}
    return Plan(
        task=task.name,
        modalities=task.modalities,
        labels=task.labels,
        spacing=tuple(spacing.tolist()),
        crop=size,
        network={**channels, "spatial_size": size, **NETWORK},
        training=tuple(case.name for case in training),
        held_out=tuple(case.name for case in held_out),
        intensity_range=intensity_range,
        flips=() if "left" in names or "right" in names else (0,),
        steps=steps,
        seed=seed,
        recipe=RECIPE,
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
