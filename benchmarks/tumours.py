"""A task to study where no tumours are at hand: ``python -m benchmarks.tumours FOLDER [--cases 70]``.

Writes a Decathlon folder of synthetic heads: three modalities, voxels of 1.2 x 1.2 x 4 mm, and in each head a
tumour of oedema, core and enhancing rim, whose contrast changes from case to case, beside healthy structures
that look like one: ventricles, white matter and bright spots. Case i depends on the cases before it alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.progress import track
from scipy.ndimage import gaussian_filter

from factorizer.commands.demo.synthetic import write_task

Array = NDArray[np.float64]

SIZE, SPACING = (120, 140, 30), (1.2, 1.2, 4.0)
LABELS = {"0": "background", "1": "edema", "2": "core", "3": "enhancing"}
# Of white matter, grey matter, ventricles, oedema, core, rim and spots.
INTENSITIES = {
    "T1c": (0.75, 0.55, 0.25, 0.62, 0.5, 0.95, 0.9),
    "T2": (0.42, 0.58, 1.0, 0.78, 0.85, 0.7, 0.85),
    "FLAIR": (0.5, 0.6, 0.15, 0.82, 0.72, 0.75, 0.8),
}


def head(rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The volumes (S1, S2, S3, 3) of a head, and its labels (S1, S2, S3)."""

    def field(width: float) -> Array:
        """Noise of unit variance, smooth over ``width`` mm."""
        smooth = gaussian_filter(rng.standard_normal(SIZE), [width / step for step in SPACING])
        return smooth / smooth.std()

    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(SIZE, SPACING, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))  # mm from the centre

    def distance(centre: Array, scale: Array) -> Array:
        offset = (grid - centre[:, None, None, None]) * scale[:, None, None, None]
        return np.sqrt((offset**2).sum(0))

    radii = np.array([62, 75, 52]) * rng.uniform(0.9, 1.05, 3)
    centre = rng.normal(0, 3, 3)
    depth = distance(centre, 1 / radii) + 0.05 * field(15)
    brain = depth < 1
    white = (depth < 0.75) & (field(6) > -0.3)
    x, y, z = grid - centre[:, None, None, None]
    pair = np.sqrt(((np.abs(x) - 9) / 5) ** 2 + (y / 24) ** 2 + (z / 14) ** 2)
    ventricles = pair + 0.15 * field(6) < 1

    place = centre + rng.uniform(-0.5, 0.5, 3) * radii
    size = rng.uniform(9, 24)
    shape = distance(place, rng.uniform(0.8, 1.25, 3)) / size + 0.28 * field(7)
    oedema = (shape < 1.25) & brain & ~ventricles & (white | (shape < 1.0))
    core = (shape < 0.75) & brain
    rim = core & (shape > 0.5) & (field(8) > -0.4)
    label = np.zeros(SIZE, np.uint8)
    label[oedema], label[core], label[rim] = 1, 2, 3
    spots = (field(3) > 2.6) & brain & (label == 0)

    volumes = []
    for white_matter, grey_matter, fluid, *tissues, spot in INTENSITIES.values():
        image = np.full(SIZE, grey_matter)
        image[white], image[ventricles], image[spots] = white_matter, fluid, spot
        for mask, value, least in zip((oedema, core, rim), tissues, (0.45, 0.5, 0.4), strict=True):
            image[mask] += rng.uniform(least, 1) * (value - image[mask])
        image = gaussian_filter(image, [0.8, 0.8, 0.35]) + 0.05 * field(4)
        image += 0.07 * rng.standard_normal(SIZE)
        image *= np.exp(0.12 * field(40))
        image[depth >= 1.02] = 0
        volumes.append(np.clip(image, 0, None) * rng.uniform(200, 900))
    return np.stack(volumes, -1).astype(np.float32), label


def main(
    folder: Annotated[Path, typer.Argument(help="To be made, or written over.")],
    cases: Annotated[int, typer.Option(min=3)] = 70,
) -> None:
    """Write a Decathlon folder of synthetic tumours."""
    rng = np.random.default_rng(0)
    content = {
        "name": "Synthetic tumours",
        "modality": {str(i): name for i, name in enumerate(INTENSITIES)},
        "labels": LABELS,
    }
    write_task(folder, (head(rng) for _ in track(range(cases), "Synthetic heads")), content, SPACING)


if __name__ == "__main__":
    typer.run(main)
