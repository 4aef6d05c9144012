"""How much was segmented: the volume of each target in ml."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from factorizer.segmentation.files import atomic, first_line
from factorizer.segmentation.volumes import read_grid, read_labels

Targets = Mapping[str, Sequence[int]]
BY, COLUMNS = ("case", "target"), ("voxels", "ml", "label_voxels", "label_ml")


def volumes(labels: np.ndarray, affine: np.ndarray, targets: Targets) -> dict[str, float]:
    """The volume of each target in ml, for label values on a grid whose affine is to mm."""
    voxel = abs(float(np.linalg.det(affine[:3, :3]))) / 1e3
    return {name: voxel * int(np.isin(labels, list(values)).sum()) for name, values in targets.items()}


def is_statistics(path: Path) -> bool:
    """Whether a file is one that `write_statistics` writes."""
    # A folder of the name is somebody's own.
    return not path.is_dir() and first_line(path) in {
        ",".join((*BY, *columns)) for columns in (COLUMNS[:2], COLUMNS)
    }


def write_statistics(
    path: Path, results: Mapping[str, Path], targets: Targets, truths: Mapping[str, Path] | None = None
) -> None:
    """A CSV with the voxels and ml of each target in the label map of each case, by its name; with `truths`
    also those in its label, on the same grid."""
    columns = COLUMNS[: 2 if truths is None else 4]
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((*BY, *columns))
        for name, result in results.items():
            affine = read_grid(result)[0]
            maps = [read_labels(file, None) for file in (result, *([truths[name]] if truths else []))]
            for target, values in targets.items():
                numbers: list[object] = []
                for labels in maps:
                    ml = volumes(labels, affine, {target: values})[target]
                    numbers += [int(np.isin(labels, list(values)).sum()), f"{ml:.6g}"]
                table.writerow((name, target, *numbers))
