"""factorizer explain: what the components of chosen layers show, and how well they agree with labels."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from factorizer.segmentation.cases import Case, find_cases, with_grid
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.evaluation import known_labels
from factorizer.segmentation.explanation import (
    Agreement,
    agreements,
    case_components,
    clearest_channel,
    find_layers,
    side_of,
)
from factorizer.segmentation.figures import component_row, draw_components, picture, told
from factorizer.segmentation.files import atomic, check_own, first_line, prepare_folder
from factorizer.segmentation.formats import save
from factorizer.segmentation.inference import Predictor, check_finite, load_predictor
from factorizer.segmentation.intensities import body
from factorizer.segmentation.provenance import made, remove_result, results_of, write_result
from factorizer.segmentation.screen import count, each_case, table, tell_warning
from factorizer.segmentation.survey import doubts_of_files
from factorizer.segmentation.transforms import PreparedCase
from factorizer.segmentation.volumes import MAP_STEPS, check_image, check_label, maps_on_grid_of, on_grid_of

COLUMNS = (
    "case",
    "layer",
    "target",
    "component",
    "marks",
    "auc",
    "best_dice",
    "threshold",
    "compared_with",
)
EMPTY = {"label": "label is empty", "prediction": "prediction is empty"}


@dataclass(frozen=True)
class Row:
    """The agreement of one component with one target in one case."""

    case: str
    layer: str
    component: int
    target: str
    reference: str  # "label" or "prediction", and whether it is empty
    agreement: Agreement


def explain(
    console: Console,
    checkpoint: Path,
    inputs: Sequence[str | Path],
    out: Path,
    *,
    layers: Sequence[str],
    labels: Path | None = None,
    section: str | None = None,
    resample: str = "",
    num_iters: int | None = None,
    whole: bool = False,
    background: str | None = None,
    overwrite: bool = False,
    device: str | None = None,
) -> int:
    """Writes for each case out/NAME_LAYER.nii.gz (X, Y, Z, component) on the image's grid,
    out/NAME_prediction.nii.gz and the figure out/NAME.png, and for all of them out/components.csv.

    A component is compared with the label of its case, in the data list of the inputs or in `labels`
    (`known_labels`), or without one with the prediction. The figure lies over the modality `background`, or
    the one in which the classes stand out best. Where results of other inputs are there under its name, a
    case fails, unless `overwrite`. Returns how many cases failed.

    Raises DataError for a checkpoint, inputs, layers, labels, a background or an `out` that cannot be used.
    """
    predictor = load_predictor([checkpoint], device=device, num_iters=num_iters, whole=whole)
    network, plan = predictor.models[0]
    if len(predictor.models) > 1:
        console.print(f"the first of the {len(predictor.models)} networks in {checkpoint} is explained")
    chosen = find_layers(network, plan, layers)
    cases = with_grid(find_cases(inputs, section), predictor.plan.modalities, resample)
    channel = None if background is None else _place(background, plan.modalities)
    if labels is not None:
        known = known_labels(labels)[0]
        unknown = Case("", ())
        cases = tuple(replace(case, label=known.get(case.name, unknown).label) for case in cases)
    prepare_folder("output", out, (path for case in cases for path in case.files))
    check_own(
        "output",
        out / "components.csv",
        lambda path: first_line(path) == ",".join(COLUMNS),
        "table of components",
    )
    for doubt in doubts_of_files(cases):
        tell_warning(console, doubt)

    def work(case: Case) -> list[Row]:
        if labels is not None and case.label is None:
            raise DataError(f"{labels}: has no label for it")
        if not overwrite:
            for name in ("_prediction.nii.gz", ".png", *(f"_{layer}.nii.gz" for layer in chosen)):
                made(out / f"{case.name}{name}", case, {})
        rows, doubts = _explain_case(predictor, chosen, case, out, channel)
        for doubt in doubts:
            tell_warning(console, f"{case.name}: {doubt}")
        if rows and rows[0].reference in EMPTY.values():
            tell_warning(console, f"{case.name}: the {rows[0].reference}: no component can agree with it")
        return rows

    outcomes = each_case(console, cases, "Explaining", work)
    rows = [row for outcome in outcomes for row in outcome.result or ()]
    failed = sum(outcome.failed for outcome in outcomes)
    if rows:
        _write(out / "components.csv", rows)
    console.print(_best_of_each(rows, len(cases) - failed))
    console.print(f"results in {out}", soft_wrap=True)
    return failed


def _explain_case(
    predictor: Predictor, layers: dict[str, str], case: Case, out: Path, channel: int | None
) -> tuple[list[Row], list[str]]:
    """Writes the files of a case; returns its rows of the table, and what is odd about its image."""
    network, plan = predictor.models[0]
    _, image = check_image(case, plan.modalities)
    truth = None if case.label is None else check_label(case, list(plan.labels))
    prepared = PreparedCase(plan, case)
    logits = predictor.run(network, plan, prepared.image)
    check_finite(logits, case)
    prediction = plan.decide(prepared.to_own_grid(logits)).numpy()
    labels, compared = (prediction, "prediction") if truth is None else (truth, "label")
    reference = compared if labels.any() else EMPTY[compared]
    signal = body(image, plan.modalities) | (labels != 0)
    components = case_components(predictor, list(layers.values()), case, prepared)
    volume = on_grid_of(prediction, case.image)
    # The first that is written, so that what comes after it never lies beside another input's.
    result = out / f"{case.name}_prediction.nii.gz"
    write_result(result, case, {}, partial(save, volume))
    files = {name: out / f"{case.name}_{name}.nii.gz" for name in layers}
    figure = out / f"{case.name}.png"
    for path in results_of(case, out):  # of other layers, maybe of another network
        if path not in (result, figure, *files.values()):
            remove_result(path)
    rows, shown = [], []
    maps = np.zeros((0, *labels.shape), np.float32)
    for name, layer in layers.items():
        volume, maps = maps_on_grid_of(components.on_grid(layer).numpy(), case.image)
        write_result(files[name], case, {}, partial(save, volume))
        found = agreements(torch.from_numpy(maps), labels, signal, plan)
        for target, of_maps in found.items():
            rows += [Row(case.name, name, m, target, reference, a) for m, a in enumerate(of_maps)]
        shown.append(component_row(name, components.maps[layer], _best_maps(found)))
    if channel is None:
        masks = [np.isin(labels, list(values)) for values in plan.targets.values()]
        if not labels.any():  # where the components of the last layer are high
            masks = [maps[k] > np.quantile(maps[k][signal], 0.95) for k in range(len(maps))]
        channel = clearest_channel(image, masks, signal)
    title = (
        f"{plan.task}: NMF components over {plan.modalities[channel]}, {case.name}; bright: much of it; "
        f"{'compared with the ' + compared if labels.any() else 'the ' + reference}"
    )
    drawn = picture(prepared, prediction, truth)
    write_result(
        figure, case, {}, lambda path: draw_components(path, drawn, shown, plan.classes, title, channel)
    )
    return rows, prepared.doubts


def _place(name: str, modalities: Sequence[str]) -> int:
    names = [modality.lower() for modality in modalities]
    if name.lower() not in names:
        raise DataError(f"background: got {name!r}; it must be one of {', '.join(modalities)}")
    return names.index(name.lower())


def _best_maps(found: Mapping[str, Sequence[Agreement]]) -> Iterator[tuple[int, str]]:
    """For each target that is there the map that tells it best, and what to write over it."""
    for target, of_maps in found.items():
        best = max(range(len(of_maps)), key=lambda m: _rank(of_maps[m].clarity))
        auc, dice, _ = of_maps[best]
        if of_maps[best].marks:
            yield best, f"{told(target, of_maps[best].marks, auc)}, Dice {dice:.2f}"


def _rank(clarity: float) -> float:
    return float(np.nan_to_num(clarity, nan=-1))


def _write(path: Path, rows: list[Row]) -> None:
    """Ranked within each case, layer and target, those farthest from chance first."""
    order = {key: place for place, key in enumerate(dict.fromkeys((r.case, r.layer, r.target) for r in rows))}
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for r in sorted(rows, key=lambda r: (order[r.case, r.layer, r.target], -_rank(r.agreement.clarity))):
            auc, dice, threshold = r.agreement
            marks = r.agreement.marks
            # One of a map's MAP_STEPS levels, which programs round differently: less than half a step on.
            threshold *= 1 + 0.4 / MAP_STEPS if marks == "outside" else 1 - 0.4 / MAP_STEPS
            numbers = (f"{auc:.4f}", f"{dice:.4f}", f"{threshold:.8g}")
            lines.writerow((r.case, r.layer, r.target, r.component, marks, *numbers, r.reference))


def _mean(values: list[Agreement]) -> tuple[float, float]:
    """AUC and best Dice over the cases that have the target; NaN where none has."""
    if not values:
        return float("nan"), float("nan")
    return sum(a.auc for a in values) / len(values), sum(a.dice for a in values) / len(values)


def _best_of_each(rows: list[Row], cases: int) -> Table:
    """For each layer and target the component whose AUC, averaged over the cases, is farthest from 1/2."""
    values: dict[tuple[str, str], dict[int, list[Agreement]]] = {}
    for row in rows:
        of_pair = values.setdefault((row.layer, row.target), {})
        of_pair.setdefault(row.component, []).append(row.agreement)
    title = f"The component that tells each class best, mean of {count(cases, 'case')}"
    shown = table(title, "layer", "target", "component", "marks", "AUC", "best Dice", texts=2)
    for (layer, target), of_pair in values.items():
        means = {m: _mean([a for a in of_map if not np.isnan(a.auc)]) for m, of_map in of_pair.items()}
        best = max(means, key=lambda m: _rank(abs(means[m][0] - 0.5)))
        auc, dice = means[best]
        none = np.isnan(auc)  # no case has the target
        numbers = ("none", "", "", "") if none else (str(best), side_of(auc), f"{auc:.3f}", f"{dice:.3f}")
        shown.add_row(layer, target, *numbers)
    return shown
