"""Figures: segmentations beside the truth, and components over the image."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from scipy import ndimage
from torch import Tensor

from factorizer.segmentation.files import atomic
from factorizer.segmentation.transforms import PreparedCase

# Told apart also by people who do not see all colours (Okabe and Ito's palette).
COLOURS = ("#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#F0E442", "#0072B2")
BACKGROUND, TEXT = "#111417", "#e8e8e8"
VIEWS = ("sagittal", "coronal", "axial")
PANEL = 2.5  # inches
MAPS_SHOWN = 4


@dataclass(frozen=True)
class Picture:
    """A case as the network sees it, its axes ordered right, anterior, superior.

    image (C, X, Y, Z); truth and prediction (X, Y, Z), class indices; spacing in mm. A case without
    a label has no truth. Slices are counted from `start`, where these are cut out of a larger volume.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray | None
    prediction: np.ndarray
    spacing: Sequence[float]
    caption: str
    start: tuple[int, ...] = (0, 0, 0)


def picture(
    prepared: PreparedCase, prediction: np.ndarray, truth: np.ndarray | None, caption: str = ""
) -> Picture:
    """A case with label values (X', Y', Z') on its own grid."""
    return Picture(
        prepared.case.name,
        prepared.image.numpy(),
        None if truth is None else prepared.class_indices(truth),
        prepared.class_indices(prediction),
        prepared.plan.spacing,
        caption,
    )


def component_row(
    name: str, maps: Tensor, best: Iterable[tuple[int, str]]
) -> tuple[str, np.ndarray, list[str]]:
    """A row of `draw_components`: up to four of the maps (n, X, Y, Z) of a layer, with captions.

    `best` has for each target the map that tells it best, and what to say of it (`told`). These come first,
    then the maps with most in them.
    """
    captions: dict[int, list[str]] = {}
    for index, text in best:
        captions.setdefault(index, []).append(text)
    by_content = maps.flatten(1).mean(1).argsort(descending=True).tolist()
    shown = [*captions, *(index for index in by_content if index not in captions)][:MAPS_SHOWN]
    texts = ["\n".join([f"component {index}", *captions.get(index, [])]) for index in shown]
    return f"{name} layer", maps[shown].numpy(), texts


def told(target: str, marks: str, auc: float) -> str:
    """What to say over the picture of a component: which side of a target it marks, and how well."""
    side = f"outside of {target}" if marks == "outside" else target
    return f"{side}\nAUC {auc:.2f}"  # two lines: panels of small volumes are narrow


def draw_segmentations(
    path: Path,
    cases: Sequence[Picture],
    modalities: Sequence[str],
    classes: Sequence[str],
    title: str,
) -> None:
    """A row for each case: up to two modalities, the truth and the prediction, on one slice.

    All rows are cut along the axis that shows the classes of all cases best.
    """
    shown = list(modalities)[:2]
    columns = [*shown, "ground truth", "prediction"]
    views = [slice_scores(case.truth, len(classes)) for case in cases]  # type: ignore[arg-type]
    axis = max(range(3), key=lambda a: sum(scores[a].max() for scores in views))
    figure, grid = _panels(cases[0], axis, len(cases), len(columns))
    for row, case, scores in zip(grid, cases, views, strict=True):
        index = int(scores[axis].argmax())
        for channel, ax in enumerate(row[: len(shown)]):
            _show(ax, case, channel, axis, index)
        for ax, labels in zip(row[len(shown) :], (case.truth, case.prediction), strict=True):
            _show(ax, case, 0, axis, index)
            _overlay(ax, np.take(labels, index, axis), len(classes), fill=0.45)  # type: ignore[arg-type]
        row[0].set_ylabel(f"{case.name}\n{VIEWS[axis]}, {index}", color=TEXT, fontsize=8)
        row[-1].set_xlabel(
            case.caption, color=TEXT, fontsize=8, loc="right"
        )  # it may be wider than the panel
    for ax, name in zip(grid[0], columns, strict=True):
        ax.set_title(name, color=TEXT, fontsize=11)
    _finish(figure, path, title, classes)


def draw_components(
    path: Path,
    case: Picture,
    layers: Sequence[tuple[str, np.ndarray, Sequence[str]]],
    classes: Sequence[str],
    title: str,
    channel: int = 0,
) -> None:
    """A row for each layer (its name, its maps (n, X, Y, Z), their captions), on one slice of `channel`.

    The first column has the truth as outlines, in the second row the prediction; the maps have the
    truth's, or without a truth the prediction's.
    """
    columns = 1 + max(len(maps) for _, maps, _ in layers)
    outlined = case.prediction if case.truth is None else case.truth
    axis, index = 2, outlined.shape[2] // 2  # where nothing is labelled
    if outlined.any():
        scores = slice_scores(outlined, len(classes))
        axis = max(range(3), key=lambda a: scores[a].max())
        index = int(scores[axis].argmax())
    figure, grid = _panels(case, axis, len(layers), columns)
    known = [("ground truth", case.truth), ("prediction", case.prediction)]
    outlines = [(name, labels) for name, labels in known if labels is not None]
    outline = np.take(outlined, index, axis)
    for number, (row, (name, maps, captions)) in enumerate(zip(grid, layers, strict=True)):
        label_name, labels = outlines[min(number, len(outlines) - 1)]
        _show(row[0], case, channel, axis, index)
        _overlay(row[0], np.take(labels, index, axis), len(classes), fill=0)
        row[0].set_title(label_name if labels.any() else f"{label_name}: empty", color=TEXT, fontsize=9)
        row[0].set_ylabel(name, color=TEXT, fontsize=10)
        for ax in row[1 + len(maps) :]:
            ax.set_visible(False)
        for ax, volume, caption in zip(row[1:], maps, captions, strict=False):
            _show(ax, case, channel, axis, index)
            plane = np.take(volume, index, axis).T
            strength = np.clip(plane / (np.quantile(plane, 0.995) or 1), 0, 1)
            ax.imshow(
                strength,
                cmap="inferno",
                alpha=0.15 + 0.75 * strength,
                origin="lower",
                aspect=ax.get_aspect(),
            )
            _overlay(ax, outline, len(classes), fill=0)
            ax.set_title(caption, color=TEXT, fontsize=9)
    _finish(figure, path, title, classes)


def draw_planes(
    path: Path, case: Picture, classes: Sequence[str], title: str, channel: int, captions: Sequence[str]
) -> None:
    """Three planes through the largest structure: the image, the truth where there is one, the prediction.

    `captions` stand under the columns.
    """
    whole = case.prediction if case.truth is None or not case.truth.any() else case.truth
    places = [length // 2 for length in whole.shape]
    if whole.any():
        places = [int(scores.argmax()) for scores in slice_scores(_largest(whole), len(classes))]
    rows: list[tuple[str, np.ndarray | None]] = [("image", None)] if case.image.any() else []
    rows += [] if case.truth is None else [("ground truth", case.truth)]
    rows += [("prediction", case.prediction)]
    extent = [n * mm for n, mm in zip(case.prediction.shape, case.spacing, strict=True)]
    widths, heights = [extent[1], extent[0], extent[0]], [extent[2], extent[2], extent[1]]
    scale = PANEL / max(extent)
    size = (scale * sum(widths) + 1.6, len(rows) * (scale * max(heights) + 0.25) + 1.4)
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), facecolor=BACKGROUND)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.06)
    grid = figure.subplots(len(rows), 3, squeeze=False, width_ratios=widths)
    for line, (name, labels) in zip(grid, rows, strict=True):
        for axis, ax in enumerate(line):
            _show(ax, case, channel, axis, places[axis])
            if labels is not None:
                _overlay(ax, np.take(labels, places[axis], axis), len(classes), fill=0.3)
        empty = labels is not None and not labels.any()
        line[0].set_ylabel(f"{name}: empty" if empty else name, color=TEXT, fontsize=9)
    for axis, ax in enumerate(grid[0]):
        ax.set_title(f"{VIEWS[axis]}, {places[axis] + case.start[axis]}", color=TEXT, fontsize=9)
    _finish(figure, path, "\n".join([title, *captions]), classes)


def _largest(labels: np.ndarray) -> np.ndarray:
    """Class indices (X, Y, Z) without all that is not connected to the largest structure."""
    parts, _ = ndimage.label(labels)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.where(parts == sizes.argmax(), labels, 0)


def slice_scores(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """For each axis, how much of the classes each slice shows: the sum over them of √area.

    The root makes a slice with some of every class count more than one with much of a single one.
    `labels` are class indices (X, Y, Z); the scores are (X,), (Y,) and (Z,).
    """
    scores = []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        areas = [(labels == k).sum(others) for k in range(1, num_classes + 1)]
        scores.append(np.sqrt(areas).sum(0))
    return scores


def _panels(case: Picture, axis: int, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """A grid of axes in the shape of a slice of the case, the longer side of each PANEL inches."""
    width, height = (case.prediction.shape[a] * case.spacing[a] for a in range(3) if a != axis)
    scale = PANEL / max(width, height)
    size = (columns * (scale * width + 0.25) + 0.5, rows * (scale * height + 0.6) + 1.1)
    figure = Figure(figsize=size, facecolor=BACKGROUND)
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.08)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _show(ax: Axes, case: Picture, channel: int, axis: int, index: int) -> None:
    image = case.image[channel]
    signal = image[image != 0]
    low, high = np.quantile(signal if signal.size else image, [0.01, 0.995])
    plane = np.take(image, index, axis).T
    across, up = (case.spacing[a] for a in range(3) if a != axis)
    ax.imshow(
        np.where(plane == 0, low, plane),  # no signal is black, wherever zero lies in the scores
        cmap="gray",
        vmin=low,
        vmax=high,
        origin="lower",
        aspect=up / across,
    )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_facecolor(BACKGROUND)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _overlay(ax: Axes, plane: np.ndarray, num_classes: int, fill: float) -> None:
    """Classes of a slice as outlines, and as a colour of opacity `fill`."""
    limits = ax.get_xlim(), ax.get_ylim()
    areas = {k: int((plane == k).sum()) for k in range(1, num_classes + 1)}
    for k in sorted(areas, key=lambda k: -areas[k]):  # so that an outline that two share is the inner one's
        mask, colour = (plane == k).T, COLOURS[(k - 1) % len(COLOURS)]
        if not mask.any():
            continue
        if fill:
            tint = np.zeros((*mask.shape, 4))
            tint[mask] = to_rgba(colour, fill)
            ax.imshow(tint, origin="lower", aspect=ax.get_aspect())
        # Padded, so that an outline is also drawn along the edge of the volume.
        places = [np.arange(-1, length + 1) for length in (mask.shape[1], mask.shape[0])]
        ax.contour(*places, np.pad(mask, 1).astype(float), [0.5], colors=[colour], linewidths=1.4)
    ax.set(xlim=limits[0], ylim=limits[1])


def no_mathematics(figure: Figure) -> None:
    """Takes all texts of a figure as they are: a name may have a $."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def _finish(figure: Figure, path: Path, title: str, classes: Sequence[str]) -> None:
    # A narrow figure's title takes several lines: some 11 characters of this size are an inch wide.
    lines = textwrap.fill(title, int(11 * figure.get_figwidth()))
    figure.suptitle(lines, color=TEXT, fontsize=11)
    colours = [COLOURS[k % len(COLOURS)] for k in range(len(classes))]
    figure.legend(
        handles=[Patch(color=c, label=name) for c, name in zip(colours, classes, strict=True)],
        loc="outside lower center",
        ncols=min(len(classes), 6),
        frameon=False,
        labelcolor=TEXT,
    )
    no_mathematics(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=140, facecolor=BACKGROUND)
