"""factorizer evaluate: Dice and HD95 of written segmentations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from factorizer.data import Case, DataError, find_cases, prepare_folder, read_decathlon, read_nifti
from factorizer.evaluation import Score, Summary, Targets, evaluate_case, label_in, summarise, write_scores
from factorizer.inference import failure
from factorizer.screen import progress, table
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
    cases = _pair(predictions, labels)
    prepare_folder("output", out.resolve().parent)
    targets, values = _targets(cases, labels, checkpoint)
    scores: list[Score] = []
    failed = 0
    with progress(console) as bar:
        for case in bar.track(cases, description="Comparing"):

            def compare(case: Case = case) -> None:
                scores.extend(evaluate_case(case.image, case, values, targets))

            if reason := failure(compare):
                failed += 1
                console.print(f"[red]{case.name}: failed:[/] {reason}", soft_wrap=True)
    write_scores(out, scores)
    console.print(summary_table(f"{len(cases) - failed} cases; each of them is in {out}", summarise(scores)))
    return failed


def summary_table(title: str, rows: list[Summary]) -> Table:
    """Means over the cases, a row for each target."""
    shown = table(title, "target", "Dice", "HD95, mm", "one mask empty")
    for row in rows:
        shown.add_row(row.target, f"{row.dice:.4f}", f"{row.hd95:.2f}", str(row.infinite))
    return shown


def _pair(predictions: Path, labels: Path) -> list[Case]:
    """The predictions as cases whose image is the prediction."""
    if not predictions.is_dir():
        raise DataError(f"predictions: {predictions} is not a folder")
    made = {case.name: case.image for case in find_cases([predictions])}
    listing = labels / "dataset.json" if labels.is_dir() else labels
    if listing.suffix == ".json" and listing.is_file():
        listed = find_cases([listing], None)
        known = {case.name: case.label for case in listed}
        return [Case(name, (path,), known.get(name)) for name, path in made.items()]
    if not labels.is_dir():
        raise DataError(f"labels: {labels} is no folder and no data list")
    return [Case(name, (path,), label_in(labels, name)) for name, path in made.items()]


def _targets(cases: list[Case], labels: Path, checkpoint: Path | None) -> tuple[Targets, list[int]]:
    """What is measured, and all the values that a label may have."""
    if checkpoint is not None:
        plan = read_checkpoint(checkpoint)[0]
        return plan.targets, list(plan.labels)
    root = labels if labels.is_dir() else labels.parent
    if (root / "dataset.json").is_file():
        task = read_decathlon(root)
        return {name: (value,) for value, name in task.labels.items() if value}, list(task.labels)
    found: set[int] = set()
    for case in cases:
        for path in (case.image, case.label):
            try:
                found |= set() if path is None else set(np.unique(read_nifti(path)[1]).tolist())
            except DataError:
                continue  # told when its case is compared
    values = sorted({int(value) for value in found} | {0})
    return {str(value): (value,) for value in values if value}, values
