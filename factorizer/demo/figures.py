"""The demo's two figures: segmentations beside the truth, and components over the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from factorizer.data import Case, atomic, preprocessing
from factorizer.planning import Plan

# Told apart also by people who do not see all colours (Okabe and Ito's palette).
COLOURS = ("#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#0072B2")
BACKGROUND, TEXT = "#111417", "#e8e8e8"
VIEWS = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class Picture:
    """A case as the network sees it, its axes ordered right, anterior, superior.

    image (C, X, Y, Z); truth and prediction (X, Y, Z), class indices; spacing in mm.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    spacing: Sequence[float]
    caption: str


def picture(plan: Plan, case: Case, prediction: Path, caption: str) -> Picture:
    """Read a case and the segmentation that was written of it."""
    before = preprocessing(("image", "label", "prediction"), plan.spacing, list(plan.labels))
    files = {"image": str(case.image), "label": str(case.label), "prediction": str(prediction)}
    item = before(files)
    image, truth, predicted = (item[key].numpy() for key in files)
    return Picture(case.name, image, truth[0], predicted[0], plan.spacing, caption)


def draw_segmentations(
    path: Path,
    cases: Sequence[Picture],
    modalities: Sequence[str],
    classes: Sequence[str],
    title: str,
) -> None:
    """A row for each case: up to two modalities, the truth and the prediction, on one slice."""
    shown = list(modalities)[:2]
    columns = [*shown, "ground truth", "prediction"]
    figure = Figure(figsize=(2.9 * len(columns), 2.9 * len(cases) + 1.2), facecolor=BACKGROUND)
    grid = figure.subplots(len(cases), len(columns), squeeze=False)
    for row, case in zip(grid, cases, strict=True):
        axis, index = best_slice(case.truth, len(classes))
        for ax, channel in zip(row, range(len(shown)), strict=False):
            _show(ax, case, channel, axis, index)
        for ax, labels in zip(row[len(shown) :], (case.truth, case.prediction), strict=True):
            _show(ax, case, 0, axis, index)
            _overlay(ax, _cut(labels, axis, index), len(classes), fill=0.45)
        row[0].set_ylabel(f"{case.name}\n{VIEWS[axis]} slice {index}", color=TEXT, fontsize=8)
        row[-1].set_xlabel(case.caption, color=TEXT, fontsize=8)
    for ax, name in zip(grid[0], columns, strict=True):
        ax.set_title(name, color=TEXT, fontsize=11)
    _finish(figure, path, title, classes)


def draw_components(
    path: Path,
    case: Picture,
    layers: Sequence[tuple[str, np.ndarray, Sequence[str]]],
    classes: Sequence[str],
    title: str,
) -> None:
    """A row for each layer (its name, its maps (n, X, Y, Z), their captions), over one slice.

    The first column shows the truth and the prediction as outlines; so do the maps the truth.
    """
    columns = 1 + max(len(maps) for _, maps, _ in layers)
    figure = Figure(figsize=(2.6 * columns, 3.0 * len(layers) + 1.2), facecolor=BACKGROUND)
    grid = figure.subplots(len(layers), columns, squeeze=False)
    axis, index = best_slice(case.truth, len(classes))
    outlines = (("ground truth", case.truth), ("prediction", case.prediction))
    for row, (name, maps, captions), (outline, labels) in zip(grid, layers, outlines, strict=False):
        _show(row[0], case, 0, axis, index)
        _overlay(row[0], _cut(labels, axis, index), len(classes), fill=0)
        row[0].set_title(outline, color=TEXT, fontsize=9)
        row[0].set_ylabel(name, color=TEXT, fontsize=10)
        for ax in row[1 + len(maps) :]:
            ax.set_visible(False)
        for ax, volume, caption in zip(row[1:], maps, captions, strict=False):
            _show(ax, case, 0, axis, index)
            plane = _cut(volume, axis, index)
            top = np.quantile(plane, 0.995) or 1.0
            strength = np.clip(plane / top, 0, 1)
            ax.imshow(
                strength.T,
                cmap="inferno",
                alpha=0.15 + 0.75 * strength.T,
                origin="lower",
                aspect=_aspect(case, axis),
            )
            _overlay(ax, _cut(case.truth, axis, index), len(classes), fill=0)
            ax.set_title(caption, color=TEXT, fontsize=9)
    _finish(figure, path, title, classes)


def best_slice(labels: np.ndarray, num_classes: int) -> tuple[int, int]:
    """(axis, index) of the slice that shows the classes best: the largest sum of their √area."""
    best = (0.0, 2, labels.shape[2] // 2)
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        areas = np.stack([(labels == k).sum(others) for k in range(1, num_classes + 1)])
        score = np.sqrt(areas).sum(0)
        if score.max() > best[0]:
            best = (float(score.max()), axis, int(score.argmax()))
    return best[1], best[2]


def _cut(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    return np.take(volume, index, axis=axis)


def _aspect(case: Picture, axis: int) -> float:
    across, up = (case.spacing[a] for a in range(3) if a != axis)
    return up / across


def _show(ax: Axes, case: Picture, channel: int, axis: int, index: int) -> None:
    low, high = np.quantile(case.image[channel], [0.01, 0.995])
    ax.imshow(
        _cut(case.image[channel], axis, index).T,
        cmap="gray",
        vmin=low,
        vmax=high,
        origin="lower",
        aspect=_aspect(case, axis),
    )
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _overlay(ax: Axes, plane: np.ndarray, num_classes: int, fill: float) -> None:
    """Classes of a slice as outlines, and as a colour of opacity `fill`."""
    for k in range(1, num_classes + 1):
        mask, colour = (plane == k).T, COLOURS[(k - 1) % len(COLOURS)]
        if not mask.any():
            continue
        if fill:
            tint = np.zeros((*mask.shape, 4))
            tint[mask] = to_rgba(colour, fill)
            ax.imshow(tint, origin="lower", aspect=ax.get_aspect())
        # Padded, so that an outline is also drawn along the edge of the volume.
        padded = np.pad(mask, 1).astype(float)
        places = [np.arange(-1, length + 1) for length in (mask.shape[1], mask.shape[0])]
        ax.contour(*places, padded, levels=[0.5], colors=[to_rgb(colour)], linewidths=1.4)


def _finish(figure: Figure, path: Path, title: str, classes: Sequence[str]) -> None:
    figure.suptitle(title, color=TEXT, fontsize=12)
    patches = [Patch(color=COLOURS[k % len(COLOURS)], label=name) for k, name in enumerate(classes)]
    figure.legend(
        handles=patches,
        loc="lower center",
        ncols=min(len(classes), 6),
        frameon=False,
        labelcolor=TEXT,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 0.97))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=130, facecolor=BACKGROUND)
