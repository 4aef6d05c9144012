"""What was segmented, at a glance: a picture of a case with its label map, and volumes in ml."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from factorizer.segmentation.cases import Case
from factorizer.segmentation.explanation import clearest_channel
from factorizer.segmentation.figures import Picture, draw_planes
from factorizer.segmentation.files import atomic
from factorizer.segmentation.intensities import body
from factorizer.segmentation.volumes import check_image, read_labels, read_nifti

Targets = Mapping[str, Sequence[int]]


def preview_of(folder: Path, name: str) -> Path:
    """Where the picture of a case lies."""
    return folder / f"{name}.png"


def draw_preview(
    folder: Path,
    case: Case,
    prediction: Path,
    targets: Targets,
    words: Mapping[str, str] | None = None,
    modalities: Sequence[str] | None = None,
) -> None:
    """Writes folder/NAME.png: three planes through the largest structure of the label, or else of the
    prediction, over the modality in which it stands out best; volumes, and `words` for each target.

    A case without images is drawn without. `modalities` of None: as many as it has, without names.

    Raises DataError where a file cannot be read.
    """
    affine, voxels = read_nifti(prediction)
    labels = {"prediction": read_labels(prediction, None)}
    if case.label is not None:
        labels["label"] = read_labels(case.label, None, grid_of=prediction)
    names = list(modalities or [f"modality {k}" for k in range(_channels(case))]) if case.images else []
    image = check_image(case, names)[1] if names else np.zeros((*voxels.shape[:3], 1), np.float32)
    shown = labels["label"] if labels.get("label", np.zeros(1)).any() else labels["prediction"]
    masks = [np.isin(shown, list(values)) for values in targets.values()]
    channel = clearest_channel(image, masks, body(image, names) | (shown != 0)) if len(names) > 1 else 0
    orientation = nib.io_orientation(affine)
    indices = {
        key: nib.apply_orientation(class_indices(values, targets), orientation)
        for key, values in labels.items()
    }
    picture = Picture(
        case.name,
        np.moveaxis(nib.apply_orientation(image, orientation), 3, 0),
        indices.get("label"),
        indices["prediction"],
        nib.affines.voxel_sizes(affine)[np.argsort(orientation[:, 0])].tolist(),
        "",
    )
    over = f"{case.name}, {names[channel]}" if names else case.name
    captions = _captions(labels, affine, targets, words or {})
    draw_planes(preview_of(folder, case.name), picture, list(targets), over, channel, captions)


def _captions(
    labels: Mapping[str, np.ndarray], affine: np.ndarray, targets: Targets, words: Mapping[str, str]
) -> list[str]:
    """A line for each target: the ml of the prediction, of the label where there is one, and the words."""
    ml = {key: volumes(values, affine, targets) for key, values in labels.items()}
    lines = []
    for name in targets:
        truth = f", {ml['label'][name]:.3g} ml in the label" if "label" in ml else ""
        more = f", {words[name]}" if name in words else ""
        lines.append(f"{name}: {ml['prediction'][name]:.3g} ml{truth}{more}")
    return lines


def class_indices(labels: np.ndarray, targets: Targets) -> np.ndarray:
    """Label values to 1, 2, … for the innermost target that has them, 0 for those that none has."""
    indices = np.zeros(labels.shape, np.uint8)
    order = sorted(enumerate(targets.values(), 1), key=lambda item: -len(item[1]))
    for number, values in order:
        indices[np.isin(labels, list(values))] = number
    return indices


def volumes(labels: np.ndarray, affine: np.ndarray, targets: Targets) -> dict[str, float]:
    """The volume of each target in ml, for label values on a grid whose affine is to mm."""
    voxel = abs(float(np.linalg.det(affine[:3, :3]))) / 1e3
    return {name: voxel * int(np.isin(labels, list(values)).sum()) for name, values in targets.items()}


def write_statistics(path: Path, results: Mapping[str, Path], targets: Targets) -> None:
    """A CSV with the voxels and ml of each target in the label map of each case, by its name."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("case", "target", "voxels", "ml"))
        for name, result in results.items():
            affine = read_nifti(result)[0]
            labels = read_labels(result, None)
            for target, ml in volumes(labels, affine, targets).items():
                table.writerow((name, target, int(np.isin(labels, list(targets[target])).sum()), f"{ml:.6g}"))


def _channels(case: Case) -> int:
    """How many channels the images of a case have."""
    if len(case.images) != 1:
        return len(case.images)
    shape = read_nifti(case.images[0])[1].shape
    return shape[-1] if len(shape) > 3 else 1
