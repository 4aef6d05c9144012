"""How well label volumes agree: Dice and HD95 of each target and case, and of a whole folder."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from rich.console import Console
from rich.table import Table
from torch import nn

from factorizer.segmentation.cases import Case, find_cases, read_classes, volumes_in
from factorizer.segmentation.checkpoint import read_all, read_first
from factorizer.segmentation.dataset import read_modalities
from factorizer.segmentation.errors import DataError, FlatImageError
from factorizer.segmentation.files import atomic, check_own, first_line, prepare_folder, read_json
from factorizer.segmentation.inference import Predictor
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.processes import group_position
from factorizer.segmentation.provenance import (
    is_result,
    made_from_others,
    remove_result,
    write_result,
)
from factorizer.segmentation.screen import count, each_case, table, tell_warning
from factorizer.segmentation.statistics import is_statistics, write_statistics
from factorizer.segmentation.volumes import check_label, read_grid, read_labels

SURFACE_TOLERANCE = 1.0  # mm
Targets = Mapping[str, Sequence[int]]  # names, each with the label values that it unites


@dataclass(frozen=True)
class Score:
    """The agreement of one target in one case; HD95 in mm, surface Dice at `SURFACE_TOLERANCE`."""

    case: str
    target: str
    dice: float
    hd95: float
    surface_dice: float


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two boolean masks of one shape; 1 where both are empty."""
    both = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / both if both else 1.0


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """The larger of the two 95th percentiles of the distances between the surfaces of two masks, in mm.

    0 where both are empty, infinite where one is. The surfaces and percentiles are those of MONAI's
    `compute_hausdorff_distance`.

    Args:
        prediction, truth: boolean masks (X, Y, Z).
        spacing: mm between voxels along each axis.
    """
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else math.inf
    a, b = _boxed(prediction, truth)
    with _quiet():
        distance = compute_hausdorff_distance(
            a, b, include_background=True, percentile=95, spacing=list(spacing)
        )
    return float(distance)


def surface_dice(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """The share of both masks' surfaces that lies within `SURFACE_TOLERANCE` of the other's.

    1 where both are empty, 0 where one is. The surfaces are those of MONAI's `compute_surface_dice`.

    Args:
        prediction, truth: boolean masks (X, Y, Z).
        spacing: mm between voxels along each axis.
    """
    if not prediction.any() or not truth.any():
        return float(prediction.any() == truth.any())
    a, b = _boxed(prediction, truth)
    with _quiet():
        share = compute_surface_dice(
            a, b, [SURFACE_TOLERANCE], include_background=True, spacing=list(spacing)
        )
    return float(share)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what MONAI 1.5 to 1.6 warns of, an argument of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _boxed(prediction: np.ndarray, truth: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """The two masks, as (1, 1, X, Y, Z), in the box that holds both: elsewhere there is no surface."""
    box = tuple(slice(int(places.min()), int(places.max()) + 1) for places in np.nonzero(prediction | truth))
    a, b = (torch.from_numpy(np.pad(mask[box], 1)[None, None]) for mask in (prediction, truth))
    return a, b


def score_labels(
    prediction: np.ndarray, truth: np.ndarray, targets: Targets, spacing: Sequence[float], case: str
) -> list[Score]:
    """The score of each target for two label volumes (X, Y, Z) on one grid."""
    scores = []
    for name, values in targets.items():
        masks = np.isin(prediction, list(values)), np.isin(truth, list(values))
        surface = surface_dice(*masks, spacing)
        scores.append(Score(case, name, dice(*masks), hd95(*masks, spacing), surface))
    return scores


def evaluate_case(prediction: Path, case: Case, values: Sequence[int], targets: Targets) -> list[Score]:
    """The scores of a written segmentation against `case.label`, on the grid of both.

    Raises DataError where a file cannot be read, the two lie on different grids, or a value stands
    for no class.
    """
    if case.label is None:
        raise DataError(f"{prediction}: there is no label for it")
    labels = read_labels(prediction, values, grid_of=prediction)
    truth = read_labels(case.label, values, grid_of=prediction)
    spacing = nib.affines.voxel_sizes(read_grid(prediction)[0]).tolist()
    return score_labels(labels, truth, targets, spacing, case.name)


@dataclass(frozen=True)
class Summary:
    """The means of one target over the cases.

    `hd95` is that of the cases where it is finite; `infinite` counts the others, in which one of the two
    masks is empty.
    """

    target: str
    cases: int
    dice: float
    hd95: float
    infinite: int
    surface_dice: float


def summarise(scores: Iterable[Score]) -> list[Summary]:
    """One summary for each target, in the order of their first appearance."""
    by_target: dict[str, list[Score]] = {}
    for score in scores:
        by_target.setdefault(score.target, []).append(score)
    summaries = []
    for target, members in by_target.items():
        finite = [score.hd95 for score in members if math.isfinite(score.hd95)]
        mean = sum(finite) / len(finite) if finite else math.nan
        mean_dice = sum(score.dice for score in members) / len(members)
        mean_surface = sum(score.surface_dice for score in members) / len(members)
        infinite = len(members) - len(finite)
        summaries.append(Summary(target, len(members), mean_dice, mean, infinite, mean_surface))
    return summaries


COLUMNS = ("case", "target", "dice", "hd95_mm", "surface_dice_1mm")


def is_scores(path: Path) -> bool:
    """Whether a file is one that `write_scores` writes."""
    return first_line(path) == ",".join(COLUMNS)


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """One line for each case and target."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for score in scores:
            values = f"{score.dice:.6f}", f"{score.hd95:.6g}", f"{score.surface_dice:.6f}"
            table.writerow((score.case, score.target, *values))


class MeanDice:
    """A validation: the mean Dice of a network over cases and targets, on the cases' own grids.

    Where a process group is there each process segments its part of the cases, and all get the same.
    """

    def __init__(self, plan: Plan, cases: Sequence[Case], device: torch.device | str = "cpu") -> None:
        self.plan, self.cases, self.device = plan, cases, torch.device(device)
        self.watch: Callable[[int, int], None] = lambda done, total: None

    def __call__(self, network: nn.Module) -> float:
        index, processes = group_position()
        predictor = Predictor([(network, self.plan)], device=self.device)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        own = self.cases[index::processes]
        for done, case in enumerate(own):
            self.watch(done, len(own))
            assert case.label is not None
            truth = check_label(case, list(self.plan.labels))
            try:
                labels = predictor.segment(case)
            except FlatImageError:  # told before the training
                labels = np.zeros_like(truth)
            for values in self.plan.targets.values():
                total[0] += dice(np.isin(labels, values), np.isin(truth, values))
                total[1] += 1
        self.watch(len(own), len(own))
        if processes > 1:
            dist.all_reduce(total)
        return float(total[0] / total[1])


def evaluate(
    console: Console,
    predictions: Path,
    labels: Path,
    out: Path,
    checkpoint: Path | None = None,
    *,
    preview: bool = False,
    statistics: bool = False,
) -> int:
    """Compares every predictions/NAME.nii.gz with its label, and writes the scores to the CSV `out`.

    With `preview` a picture of each case goes to the folder OUT_previews beside it (`draw_preview`), over the
    image where `labels` is a data list; with `statistics` the volume of each target in ml, in the prediction
    and in the label, to OUT_statistics.csv (`write_statistics`). What an earlier command left of these is
    removed.

    `labels`: a folder with NAME.nii.gz, a folder in the Decathlon's layout, or a data list. What is
    measured (names, label values, nested regions) is read from `checkpoint`, or without one from
    dataset.json, or else is every value that a label has. Returns how many cases failed.

    Raises DataError for inputs that cannot be used at all.
    """
    if out.is_dir():
        raise DataError(f"output: {out} is a folder; it must be a file for the scores, such as scores.csv")
    check_own("output", out, is_scores, "file of scores")
    known, classes, regions = known_labels(labels)
    cases = [
        Case(case.name, case.images, known[case.name].label if case.name in known else None)
        for case in _predictions(predictions)
    ]
    prepare_folder("output", out.resolve().parent)
    targets, values = _targets(console, cases, classes, regions, checkpoint)
    folder, volumes = (out.with_name(f"{out.stem}_{name}") for name in ("previews", "statistics.csv"))
    pictures = {case.name: folder / f"{case.name}.png" for case in cases}
    if statistics:
        check_own("output", volumes, is_statistics, "file of statistics")
    if preview:
        from factorizer.segmentation.preview import draw_preview  # matplotlib takes a second

        prepare_folder("output", folder)
        modalities = _modalities(labels, checkpoint)
        for path in pictures.values():
            check_own("output", path, is_result, "picture of an evaluation")
    if volumes.is_file() and is_statistics(volumes):
        volumes.unlink()
    for path in pictures.values():
        remove_result(path)

    def compare(case: Case) -> list[Score]:
        scores = evaluate_case(case.image, case, values, targets)
        if case.name in known and made_from_others(case.image, known[case.name]):
            tell_warning(
                console, f"{case.name}: {case.image} was made from other files than the case's in {labels}"
            )
        if preview:
            dices = {score.target: f"Dice {score.dice:.3f}" for score in scores}
            try:
                drawn = replace(known[case.name], resample=True)
                write_result(
                    pictures[case.name],
                    case,
                    {},
                    lambda path: draw_preview(path, drawn, case.image, targets, dices, modalities),
                )
            except DataError as error:
                tell_warning(console, f"{case.name}: no picture: {error}")
        return scores

    outcomes = each_case(console, cases, "Comparing", compare)
    scores = [score for outcome in outcomes for score in outcome.result or ()]
    failed = sum(outcome.failed for outcome in outcomes)
    write_scores(out, scores)
    if statistics:
        measured = [case for case, outcome in zip(cases, outcomes, strict=True) if not outcome.failed]
        truths = {case.name: case.label for case in measured if case.label is not None}
        write_statistics(volumes, {case.name: case.image for case in measured}, targets, truths)
    compared = count(len(cases) - failed, "case")
    console.print(summary_table(f"{compared}; the scores of each are in {out}", summarise(scores)))
    if missing := known.keys() - {case.name for case in cases}:
        console.print(f"{len(missing)} of {count(len(known), 'label')} have no prediction", soft_wrap=True)
    return failed


def summary_table(title: str, rows: list[Summary]) -> Table:
    """Means over the cases, a row for each target."""
    shown = table(title, "target", "Dice", "HD95, mm", "surface Dice, 1 mm", "one mask empty")
    for row in rows:
        finite = row.cases > row.infinite
        distance = f"{row.hd95:.2f}" if finite else "none"
        shown.add_row(row.target, f"{row.dice:.4f}", distance, f"{row.surface_dice:.4f}", str(row.infinite))
    return shown


def _predictions(folder: Path) -> tuple[Case, ...]:
    if not folder.is_dir():
        raise DataError(f"predictions: {folder} is not a folder")
    if not (cases := volumes_in(folder)):
        raise DataError(f"predictions: {folder} holds no NIfTI file")
    return cases


def known_labels(labels: Path) -> tuple[dict[str, Case], dict[int, str], Targets]:
    """The cases by name that `labels` has a label for, and the names of the label values and the regions
    where they are known. A case of a folder of label files has no images.

    `labels` is a folder with NAME.nii.gz, a folder with a dataset.json, or a data list. Raises DataError
    where it is none of these.
    """
    listing = labels / "dataset.json" if labels.is_dir() else labels
    if listing.suffix.lower() == ".json" and listing.is_file():
        return {c.name: c for c in find_cases([listing], labelled=True)}, *read_classes(listing)
    if not labels.is_dir():
        raise DataError(f"labels: {labels} is no folder and no data list")
    return {case.name: Case(case.name, (), case.image) for case in volumes_in(labels)}, {}, {}


def _modalities(labels: Path, checkpoint: Path | None) -> tuple[str, ...] | None:
    """The names of the images' channels, where the checkpoint or a dataset.json tells them."""
    if checkpoint is not None:
        return read_first(checkpoint)[0].modalities
    listing = labels / "dataset.json" if labels.is_dir() else labels
    content = read_json(listing) if listing.is_file() else None
    if not isinstance(content, dict) or not {"modality", "channel_names"}.intersection(content):
        return None
    return read_modalities(listing, content)


def _targets(
    console: Console,
    cases: Sequence[Case],
    classes: dict[int, str],
    regions: Targets,
    checkpoint: Path | None,
) -> tuple[Targets, list[int]]:
    """What is measured, and all the values that a label may have."""
    if checkpoint is not None:
        try:
            plans = [plan for plan, _ in read_all(checkpoint)]
        except FileNotFoundError as error:
            raise DataError(f"checkpoint: there is no {checkpoint}") from error
        plan, known = plans[0], {name for plan in plans for name in plan.training}
        which = "network was" if len(plans) == 1 else "networks were"
        if seen := sorted({case.name for case in cases}.intersection(known)):
            more = f" and {len(seen) - 5} more" if len(seen) > 5 else ""
            tell_warning(
                console,
                f"the {which} trained on cases of these names, whose scores say nothing about new ones: "
                f"{', '.join(seen[:5])}{more}",
            )
        return plan.targets, list(plan.labels)
    if not classes:
        of_images, of_labels = ({0}, {0})
        for case in cases:
            files = () if case.label is None else ((case.image, of_images), (case.label, of_labels))
            for path, values in files:
                try:
                    values |= set(np.unique(read_labels(path, None)).tolist())
                except DataError:
                    continue  # told when its case is compared
        if only := sorted(of_images - of_labels):
            tell_warning(
                console,
                f"no label has the values {only} that segmentations have: are they numbered otherwise? Name "
                "the classes by --checkpoint, or by a dataset.json as --labels",
            )
        found = of_images | of_labels
        classes = {value: str(value) for value in sorted(map(int, found))}
    return regions or {name: (value,) for value, name in classes.items() if value}, list(classes)
