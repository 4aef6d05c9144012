"""What was segmented, at a glance: a picture of a case with its label map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from factorizer.segmentation.affines import in_order_of, same_grid
from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.explanation import clearest_channel
from factorizer.segmentation.figures import Picture, draw_planes
from factorizer.segmentation.intensities import body
from factorizer.segmentation.statistics import Targets, volumes
from factorizer.segmentation.volumes import check_image, read_labels, read_volume

MARGIN = 2  # voxels of air around the head or body that are drawn


def draw_preview(
    path: Path,
    case: Case,
    prediction: Path,
    targets: Targets,
    words: Mapping[str, str] | None = None,
    modalities: Sequence[str] | None = None,
) -> None:
    """Writes a picture: three planes through the largest structure of the label, or else of the
    prediction, over the modality in which it stands out best, cut to the head or body and the labels;
    volumes, and `words` for each target.

    A case without images is drawn without. `modalities` of None: as many as it has, without names.

    Raises DataError where a file cannot be read.
    """
    affine, voxels = read_volume(prediction)
    labels = {"prediction": read_labels(prediction, None)}
    if case.label is not None:
        labels["label"] = read_labels(case.label, None, grid_of=prediction)
    names = list(modalities or [f"modality {k}" for k in range(_channels(case))]) if case.images else []
    image = np.zeros((*voxels.shape[:3], 1), np.float32)
    if names:
        of_image, image = check_image(case, names)
        image, of_image = in_order_of(image, of_image, affine)
        if image.shape[:3] != voxels.shape[:3] or not same_grid(of_image, affine, image.shape):
            raise DataError(f"{prediction}: lies on another grid than its image ({case.image})")
    shown = labels["label"] if labels.get("label", np.zeros(1)).any() else labels["prediction"]
    masks = [np.isin(shown, list(values)) for values in targets.values()]
    inside = body(image, names) if names else np.ones(shown.shape, bool)
    channel = clearest_channel(image, masks, inside | (shown != 0)) if len(names) > 1 else 0
    orientation = nib.io_orientation(affine)
    filled = np.any([inside, *(values != 0 for values in labels.values())], axis=0)
    box = _box(nib.apply_orientation(filled, orientation))
    indices = {
        key: nib.apply_orientation(class_indices(values, targets), orientation)[box]
        for key, values in labels.items()
    }
    picture = Picture(
        case.name,
        np.moveaxis(nib.apply_orientation(image, orientation)[box], 3, 0),
        indices.get("label"),
        indices["prediction"],
        nib.affines.voxel_sizes(affine)[np.argsort(orientation[:, 0])].tolist(),
        "",
        tuple(axis.start for axis in box),
    )
    over = f"{case.name}, {names[channel]}" if names else case.name
    captions = _captions(labels, affine, targets, words or {})
    draw_planes(path, picture, list(targets), over, channel, captions)


def _box(filled: np.ndarray) -> tuple[slice, ...]:
    """The box of the true voxels (X, Y, Z), a little larger: air around them is not worth the paper."""
    box = []
    for axis in range(3):
        places = np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (int(places[0]), int(places[-1]) + 1) if len(places) else (0, filled.shape[axis])
        box.append(slice(max(low - MARGIN, 0), min(high + MARGIN, filled.shape[axis])))
    return tuple(box)


def _captions(
    labels: Mapping[str, np.ndarray], affine: np.ndarray, targets: Targets, words: Mapping[str, str]
) -> list[str]:
    """A line for each target: the ml of the prediction, of the label where there is one, and the words."""
    ml = {key: volumes(values, affine, targets) for key, values in labels.items()}
    lines = []
    for name in targets:
        truth = f", {ml['label'][name]:.4g} ml in the label" if "label" in ml else ""
        more = f", {words[name]}" if name in words else ""
        lines.append(f"{name}: {ml['prediction'][name]:.4g} ml{truth}{more}")
    return lines


def class_indices(labels: np.ndarray, targets: Targets) -> np.ndarray:
    """Label values to 1, 2, … for the innermost target that has them, 0 for those that none has."""
    indices = np.zeros(labels.shape, np.uint8)
    order = sorted(enumerate(targets.values(), 1), key=lambda item: -len(item[1]))
    for number, values in order:
        indices[np.isin(labels, list(values))] = number
    return indices


def _channels(case: Case) -> int:
    """How many channels the images of a case have."""
    if len(case.images) != 1:
        return len(case.images)
    shape = read_volume(case.images[0])[1].shape
    return shape[-1] if len(shape) > 3 else 1
