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
from factorizer.segmentation.volumes import Geometry

WIDTH, STRIDES, PATCH = (24, 48, 96), (1, 2, 2), 4
DIVISOR = PATCH * math.prod(STRIDES)  # a crop is a whole number of windows in the deepest stage
MAX_CROP_VOXELS = 64**3
BATCH_SIZE = 2
ROUNDS, MIN_STEPS, MAX_STEPS = 10, 300, 1000

# Arguments of `Factorizer` that are classes, or pairs of a class and its arguments.
PARTS = ("norm", "reshape", "act", "factorize", "stem", "downsample", "upsample", "head", "pos_embed")


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
        window: intensities that the image is clipped to; None for z-scores of the nonzero voxels.
        flips: axes along which mirror images are as likely as the originals.
        batch_size: crops in a training step, of all processes together.
        steps, learning_rate, weight_decay: of AdamW, with linear warm-up, then cosine.
        seed: of the first weights, the crops and their augmentation.
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
    window: tuple[float, float] | None = None
    flips: tuple[int, ...] = ()
    batch_size: int = BATCH_SIZE
    steps: int = MAX_STEPS
    learning_rate: float = 5e-3
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        # A configuration file knows no tuples, and no keys but strings.
        for name, value in vars(self).items():
            object.__setattr__(self, name, _tuples(value))
        object.__setattr__(self, "labels", {int(value): name for value, name in self.labels.items()})
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

    Spacing: the median of the volumes. Crop: their median shape at that spacing, each axis rounded
    to a multiple of 16, then the longest axis shortened until at most 64^3 voxels are left. Steps,
    where not given: so many that training sees 10 times the voxels of its volumes, but at least
    300 and at most 1000. Left and right are exchanged unless a class is named left or right; front
    and back, top and bottom never are: anatomy has no such symmetry. CT is clipped to the window
    that the labelled voxels of the training cases have in the median.
    """
    spacing = np.median([geometry.spacing for geometry in geometries.values()], axis=0)
    shapes = np.array([g.shape for g in geometries.values()])
    shapes = shapes * [g.spacing for g in geometries.values()] / spacing
    median = np.median(shapes, axis=0)
    crop = np.maximum(np.rint(median / DIVISOR), 1).astype(int) * DIVISOR
    while crop.prod() > MAX_CROP_VOXELS:
        crop[crop.argmax()] -= DIVISOR
    if steps is None:
        crops_per_round = len(training) * max(1.0, float(median.prod() / crop.prod()))
        steps = math.ceil(ROUNDS * crops_per_round / BATCH_SIZE)
        steps = min(max(steps, MIN_STEPS), MAX_STEPS)
    window = None
    if any(name.upper() == "CT" for name in task.modalities):
        windows = [w for case in training if (w := geometries[case.name].window) is not None]
        if not windows:
            raise DataError("data: no training case has a labelled voxel, so CT has no window")
        low, high = np.median(windows, axis=0).tolist()
        window = (low, high)
    size = tuple(int(length) for length in crop)
    names = " ".join(task.labels.values()).lower()
    return Plan(
        task=task.name,
        modalities=task.modalities,
        labels=task.labels,
        spacing=tuple(spacing.tolist()),
        crop=size,
        network={
            "in_channels": len(task.modalities),
            "out_channels": len(task.labels),
            "spatial_size": size,
            "encoder_depth": (1,) * len(WIDTH),
            "encoder_width": WIDTH,
            "strides": STRIDES,
            "decoder_depth": (1,) * (len(WIDTH) - 1),
            "norm": "LayerNorm",
            "reshape": (
                "SWMatricize",
                {"head_dim": 8, "patch_size": PATCH, "shifts": (None, PATCH // 2)},
            ),
            "act": "ReLU",
            "factorize": "NMF",
            "rank": 1,
            "num_iters": 5,
            "mlp_ratio": 2,
        },
        training=tuple(case.name for case in training),
        held_out=tuple(case.name for case in held_out),
        window=window,
        flips=() if "left" in names or "right" in names else (0,),
        steps=steps,
        seed=seed,
    )


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
