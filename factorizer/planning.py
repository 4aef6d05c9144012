"""From what a task's volumes are like to the network, the crops and the training for it.

Everything that a run depends on beside the files themselves stands in a `Plan`, which is plain
data: it is kept in the checkpoint, and two runs with equal plans train the same network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from factorizer import Factorizer, LayerNorm, SWMatricize
from factorizer.data import Case, Geometry, Task

WIDTH, STRIDES, PATCH = (24, 48, 96), (1, 2, 2), 4
DIVISOR = PATCH * math.prod(STRIDES)  # a crop is a whole number of windows in the deepest stage
MAX_CROP_VOXELS = 64**3
BATCH_SIZE = 2
ROUNDS, MIN_STEPS, MAX_STEPS = 10, 300, 1000


@dataclass(frozen=True)
class Plan:
    """What a run depends on.

    `spacing` (mm) and `crop` (voxels) are those of the network's input, axes right, anterior,
    superior. `network` holds the arguments of `build_network`. `sided`: a class is a left or a
    right one, so that augmentation must not exchange the sides.
    """

    task: str
    modalities: tuple[str, ...]
    labels: dict[int, str]
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    spacing: tuple[float, ...]
    crop: tuple[int, ...]
    network: dict[str, Any]
    batch_size: int
    steps: int
    learning_rate: float
    weight_decay: float
    sided: bool
    seed: int

    @property
    def classes(self) -> list[str]:
        """Names of the foreground classes."""
        return list(self.labels.values())[1:]


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
    300 and at most 1000.
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
    size = tuple(int(length) for length in crop)
    names = " ".join(task.labels.values()).lower()
    return Plan(
        task=task.name,
        modalities=task.modalities,
        labels=task.labels,
        training=tuple(case.name for case in training),
        held_out=tuple(case.name for case in held_out),
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
            "head_dim": 8,
            "patch_size": PATCH,
            "shifts": (None, PATCH // 2),
            "mlp_ratio": 2,
        },
        batch_size=BATCH_SIZE,
        steps=steps,
        learning_rate=5e-3,
        weight_decay=1e-2,
        sided="left" in names or "right" in names,
        seed=seed,
    )


def build_network(
    *,
    in_channels: int,
    out_channels: int,
    spatial_size: Sequence[int],
    encoder_depth: Sequence[int],
    encoder_width: Sequence[int],
    strides: Sequence[int],
    decoder_depth: Sequence[int],
    head_dim: int,
    patch_size: int,
    shifts: Sequence[int | None],
    mlp_ratio: float,
    seed: int,
) -> nn.Module:
    """A Swin Factorizer: (B, in, *spatial_size) to logits (B, out, ...).

    Weights and initial factors are drawn with `seed`; the caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Factorizer(
            in_channels=in_channels,
            out_channels=out_channels,
            spatial_size=tuple(spatial_size),
            encoder_depth=tuple(encoder_depth),
            encoder_width=tuple(encoder_width),
            strides=tuple(strides),
            decoder_depth=tuple(decoder_depth),
            norm=LayerNorm,
            reshape=(
                SWMatricize,
                {"head_dim": head_dim, "patch_size": patch_size, "shifts": tuple(shifts)},
            ),
            act=nn.ReLU,
            rank=1,
            mlp_ratio=mlp_ratio,
        )
