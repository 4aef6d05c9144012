"""How well label volumes agree: Dice and HD95 of each target and case."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from monai.metrics import compute_hausdorff_distance
from torch import nn

from factorizer.data import Case, DataError, atomic, check_label, read_nifti
from factorizer.inference import Predictor
from factorizer.planning import Plan
from factorizer.processes import place

Targets = Mapping[str, Sequence[int]]  # names, each with the label values that it unites


@dataclass(frozen=True)
class Score:
    """Of one target in one case; HD95 in mm."""

    case: str
    target: str
    dice: float
    hd95: float


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|) of two masks; 1 where both are empty."""
    both = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / both if both else 1.0


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """The larger of the two 95th percentiles of the distances between the surfaces of two masks, mm.

    0 where both are empty, infinite where one is.
    """
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else math.inf
    # Away from the masks there is no surface: the distance transforms need only their box.
    box = tuple(slice(int(places.min()), int(places.max()) + 1) for places in np.nonzero(prediction | truth))
    a, b = (torch.from_numpy(np.pad(mask[box], 1)[None, None]) for mask in (prediction, truth))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.5 to 1.6 about its own argument
        distance = compute_hausdorff_distance(
            a, b, include_background=True, percentile=95, spacing=list(spacing)
        )
    return float(distance)


def compare(
    prediction: np.ndarray, truth: np.ndarray, targets: Targets, spacing: Sequence[float], case: str
) -> list[Score]:
    """The score of each target for two label volumes (X, Y, Z) on one grid."""
    scores = []
    for name, values in targets.items():
        masks = np.isin(prediction, list(values)), np.isin(truth, list(values))
        scores.append(Score(case, name, dice(*masks), hd95(*masks, spacing)))
    return scores


def evaluate_case(prediction: Path, case: Case, values: Sequence[int], targets: Targets) -> list[Score]:
    """The scores of a written segmentation against `case.label`, on the grid of both.

    Raises DataError where a file cannot be read, the two lie on different grids, or a value stands
    for no class.
    """
    if case.label is None:
        raise DataError(f"{prediction}: there is no label for it")
    truth = check_label(Case(case.name, (prediction,), case.label), values)
    labels = check_label(Case(case.name, (prediction,), prediction), values)
    spacing = nib.affines.voxel_sizes(nib.load(prediction).affine).tolist()  # type: ignore[attr-defined]
    return compare(labels, truth, targets, spacing, case.name)


@dataclass(frozen=True)
class Summary:
    """Of one target over the cases: mean Dice; mean HD95 over the cases where it is finite, and the
    number of the others, in which one of the two masks is empty."""

    target: str
    cases: int
    dice: float
    hd95: float
    infinite: int


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
        summaries.append(Summary(target, len(members), mean_dice, mean, len(members) - len(finite)))
    return summaries


def write_scores(path: Path, scores: Iterable[Score]) -> None:
    """One line for each case and target."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("case", "target", "dice", "hd95_mm"))
        for score in scores:
            table.writerow((score.case, score.target, f"{score.dice:.6f}", f"{score.hd95:.6g}"))


def label_in(folder: Path, name: str) -> Path:
    """folder/NAME.nii where it is there, else folder/NAME.nii.gz, which reading finds missing or not."""
    plain = folder / f"{name}.nii"
    return plain if plain.is_file() else folder / f"{name}.nii.gz"


class MeanDice:
    """A validation: the mean Dice of a network over cases and targets, on the cases' own grids.

    Where a process group is there each process segments its part of the cases, and all get the same.
    """

    def __init__(self, plan: Plan, cases: Sequence[Case], device: torch.device | str = "cpu") -> None:
        self.plan, self.cases, self.device = plan, cases, torch.device(device)

    def __call__(self, network: nn.Module) -> float:
        part, parts = place() if dist.is_initialized() else (0, 1)
        predictor = Predictor([(network, self.plan)], device=self.device)
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        for case in self.cases[part::parts]:
            assert case.label is not None
            labels, truth = predictor.segment(case), read_nifti(case.label)[1]
            for values in self.plan.targets.values():
                total[0] += dice(np.isin(labels, values), np.isin(truth, values))
                total[1] += 1
        if parts > 1:
            dist.all_reduce(total)
        return float(total[0] / total[1])
