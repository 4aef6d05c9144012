"""factorizer evaluate: Dice and HD95 of written segmentations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from factorizer.data import (
    Case,
    DataError,
    find_cases,
    prepare_folder,
    read_classes,
    read_nifti,
    volumes_in,
)
from factorizer.evaluation import Score, Summary, Targets, evaluate_case, summarise, write_scores
from factorizer.inference import failure
from factorizer.screen import count, progress, table, tell_failure
from factorizer.training import read_checkpoint


def evaluate(
    console: Console, predictions: Path, labels: Path, out: Path, checkpoint: Path | None = None
) -> int:
    """Compares every predictions/NAME.nii.gz with its label, and writes the scores to the CSV `out`.

    `labels`: a folder with NAME.nii.gz, a folder in the Decathlon's layout, or a data list. What is
    measured (names, label values, nested regions) is read from `checkpoint`, or without one from
    dataset.json, or else is every value that a label has. Returns how many cases failed.

    Raises DataError for inputs that cannot be used at all.
    """
    if out.is_dir():
        raise DataError(f"output: {out} is a folder; it must be a file for the scores, such as scores.csv")
    known, classes = _labels(labels)
    cases = [Case(case.name, case.images, known.get(case.name)) for case in _predictions(predictions)]
    prepare_folder("output", out.resolve().parent)
    targets, values = _targets(cases, classes, checkpoint)
    scores: list[Score] = []
    failed = 0
    with progress(console) as bar:
        for case in bar.track(cases, description="Comparing"):

            def compare(case: Case = case) -> None:
                scores.extend(evaluate_case(case.image, case, values, targets))

            if reason := failure(compare):
                failed += 1
                tell_failure(console, case.name, reason)
    write_scores(out, scores)
    compared = count(len(cases) - failed, "case")
    console.print(summary_table(f"{compared}; the scores of each are in {out}", summarise(scores)))
    if missing := known.keys() - {case.name for case in cases}:
        console.print(f"{len(missing)} of {count(len(known), 'label')} have no prediction", soft_wrap=True)
    return failed


def summary_table(title: str, rows: list[Summary]) -> Table:
    """Means over the cases, a row for each target."""
    shown = table(title, "target", "Dice", "HD95, mm", "one mask empty")
    for row in rows:
        finite = row.cases > row.infinite
        shown.add_row(
            row.target, f"{row.dice:.4f}", f"{row.hd95:.2f}" if finite else "none", str(row.infinite)
        )
    return shown


def _predictions(folder: Path) -> tuple[Case, ...]:
    if not folder.is_dir():
        raise DataError(f"predictions: {folder} is not a folder")
    if not (cases := volumes_in(folder)):
        raise DataError(f"predictions: {folder} holds no NIfTI file")
    return cases


def _labels(labels: Path) -> tuple[dict[str, Path | None], dict[int, str]]:
    """The label file of each case, and the names of the label values where they are known."""
    listing = labels / "dataset.json" if labels.is_dir() else labels
    if listing.suffix == ".json" and listing.is_file():
        return {case.name: case.label for case in find_cases([listing], labelled=True)}, read_classes(listing)
    if not labels.is_dir():
        raise DataError(f"labels: {labels} is no folder and no data list")
    return {case.name: case.image for case in volumes_in(labels)}, {}


def _targets(
    cases: Sequence[Case], classes: dict[int, str], checkpoint: Path | None
) -> tuple[Targets, list[int]]:
    """What is measured, and all the values that a label may have."""
    if checkpoint is not None:
        plan = read_checkpoint(checkpoint)[0]
        return plan.targets, list(plan.labels)
    if not classes:
        found: set[int] = {0}
        for case in cases:
            for path in (case.image, case.label):
                try:
                    found |= set() if path is None else set(np.unique(read_nifti(path)[1]).tolist())
                except DataError:
                    continue  # told when its case is compared
        classes = {value: str(value) for value in sorted(map(int, found))}
    return {name: (value,) for value, name in classes.items() if value}, list(classes)
