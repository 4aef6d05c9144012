"""A made-up task to try the network on when there is no data: lesions in two contrasts.

Nothing here is anatomy, and a Dice on it says nothing about patients. What it does ask of a network
is what multi-contrast MRI asks: contrast A shows a lesion's halo but shows harmless spots just
as bright; contrast B tells the two apart and shows the core, but tissue there is about as bright.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.networks.layers import GaussianFilter
from torch.nn.functional import interpolate

from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic, read_json
from factorizer.segmentation.formats import save

CASES = 30
SHAPE = (40, 48, 40)  # voxels, about
NOTICE = "SYNTHETIC volumes drawn at random by the demo; not patients, not anatomy"


def write_synthetic(
    root: Path, *, cases: int = CASES, shape: tuple[int, int, int] = SHAPE, seed: int = 0
) -> Path:
    """Write the task as a Decathlon folder and return it; the same `seed` gives the same voxels.

    Volumes of two contrasts, each axis within 3 voxels of `shape`, 1 mm apart; labels
    0 background, 1 halo, 2 core. dataset.json comes last, so a folder that has one is whole, and
    is left as it is.

    Raises DataError where that one is of other data, which nobody may take for synthetic.
    """
    known = root / "dataset.json"
    if known.exists():
        content = read_json(known)
        if not isinstance(content, dict) or content.get("description") != NOTICE:
            raise DataError(
                f"out: {root} holds other data; give another folder, or --data {root} to train on it"
            )
        return root
    drawn = (synthetic_case(np.random.default_rng([seed, index]), shape) for index in range(cases))
    return write_task(
        root,
        drawn,
        {
            "name": "Synthetic lesions",
            "description": NOTICE,
            "tensorImageSize": "4D",
            "modality": {"0": "contrast A", "1": "contrast B"},
            "labels": {"0": "background", "1": "halo", "2": "core"},
        },
    )


def write_task(
    root: Path,
    cases: Iterable[tuple[np.ndarray, np.ndarray]],
    content: dict[str, Any],
    spacing: Sequence[float] = (1, 1, 1),
) -> Path:
    """Write cases, images (X, Y, Z, C) and labels (X, Y, Z), as a Decathlon folder and return it.

    `content` is what dataset.json says beside the cases; it comes last. `spacing` is in mm.
    """
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    training, affine = [], np.diag([*spacing, 1.0])
    for index, (image, label) in enumerate(cases):
        name = f"synthetic_{index + 1:03d}.nii.gz"
        for folder, volume in (("imagesTr", image), ("labelsTr", label)):
            with atomic(root / folder / name) as temporary:
                save(nib.Nifti1Image(volume, affine), temporary)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {**content, "numTraining": len(training), "numTest": 0, "training": training, "test": []}
    with atomic(root / "dataset.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return root


def synthetic_case(
    rng: np.random.Generator, about: tuple[int, int, int] = SHAPE
) -> tuple[np.ndarray, np.ndarray]:
    """One case: image (X, Y, Z, 2) float32 and label (X, Y, Z) uint8."""
    shape = tuple(int(length + rng.integers(-3, 4)) for length in about)
    axes = [np.linspace(-1, 1, length, dtype=np.float32) for length in shape]
    place = np.stack(np.meshgrid(*axes, indexing="ij"))

    # An ellipsoid of two tissues with a folded border between them, on air.
    radius = np.sqrt(((place / 0.92) ** 2).sum(0)) + 0.04 * _smooth(rng, shape, 5)
    inside = radius < 1
    inner = _sigmoid(16 * (0.75 - radius + 0.12 * _smooth(rng, shape, 9)))
    contrast_a = 0.75 - 0.3 * inner
    contrast_b = 0.4 + 0.4 * inner

    halo, core = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for _ in range(rng.integers(1, 4)):
        size = rng.uniform(0.22, 0.4)
        distance = _blob(rng, place, size, reach=0.65 - size / 2)
        halo |= inside & (distance < 1)
        core |= inside & (distance < rng.uniform(0.5, 0.7))
    spots = np.zeros(shape, dtype=bool)  # as bright as a halo in A, plain tissue in B
    for _ in range(rng.integers(1, 4)):
        spots |= inside & ~halo & (_blob(rng, place, rng.uniform(0.12, 0.22), reach=0.75) < 1)
    texture = 0.06 * _smooth(rng, shape, 8)
    contrast_a = np.select([core, halo, spots], [0.8 + texture, 0.95 + texture, 0.95], contrast_a)
    contrast_b = np.select([core, halo], [0.85 + texture, 0.5 + texture], contrast_b)
    label = np.select([core, halo], [2, 1], 0).astype(np.uint8)

    channels = []
    for contrast in (contrast_a, contrast_b):
        clean = torch.from_numpy((contrast * inside).astype(np.float32))
        blurred = GaussianFilter(3, sigma=0.6)(clean[None, None])[0, 0].numpy()
        shading = 1 + 0.1 * _smooth(rng, shape, 3)  # as an uneven coil sensitivity gives
        noisy = blurred * shading + 0.06 * rng.standard_normal(shape)
        channels.append(np.where(inside, np.maximum(noisy, 0.01), 0) * rng.uniform(400, 900))
    return np.stack(channels, axis=-1).astype(np.float32), label


def _blob(rng: np.random.Generator, place: np.ndarray, size: float, reach: float) -> np.ndarray:
    """Distance from a random centre, 1 on the surface of a lumpy ellipsoid of about that size."""
    direction = rng.standard_normal(3)
    centre = reach * rng.uniform(0.2, 1) * direction / np.linalg.norm(direction)
    axes = size * rng.uniform(0.8, 1.25, 3)
    offset = (place - centre[:, None, None, None]) / axes[:, None, None, None]
    return np.sqrt((offset**2).sum(0)) + 0.12 * _smooth(rng, place.shape[1:], 7)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> np.ndarray:
    """Smooth noise of about unit variance, with about `cells` bumps along each axis."""
    coarse = torch.from_numpy(rng.standard_normal((1, 1, cells, cells, cells), dtype=np.float32))
    fine = interpolate(coarse, size=shape, mode="trilinear", align_corners=True)[0, 0].numpy()
    return (fine / fine.std()).astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
