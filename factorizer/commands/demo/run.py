"""The demo from a folder to a report: check, plan, train, segment, explain, time, write."""

from __future__ import annotations

import itertools
import json
import math
import platform
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from rich.console import Console

from factorizer.commands.demo import screen
from factorizer.commands.demo.synthetic import NOTICE, write_synthetic
from factorizer.commands.demo.timing import kernel_backend, time_networks
from factorizer.models.build import build_network, parameter_count
from factorizer.segmentation.cases import Case, Task, read_decathlon, split_cases
from factorizer.segmentation.errors import DataError, FlatImageError, check_counts
from factorizer.segmentation.evaluation import Score, evaluate_case, summarise
from factorizer.segmentation.explanation import best_components, case_components
from factorizer.segmentation.figures import (
    component_row,
    draw_components,
    draw_segmentations,
    picture,
    told,
)
from factorizer.segmentation.files import atomic, check_apart, prepare_folder
from factorizer.segmentation.formats import save
from factorizer.segmentation.inference import Predictor, load_predictor
from factorizer.segmentation.measure import side_by_side, versions
from factorizer.segmentation.plan import Plan, Wishes, plan_run
from factorizer.segmentation.provenance import made, write_result
from factorizer.segmentation.screen import progress, tell_warning
from factorizer.segmentation.survey import Geometry, check_cases
from factorizer.segmentation.trained import SHIPPED
from factorizer.segmentation.training import Trainer, fit, prepare, rehearse
from factorizer.segmentation.transforms import PreparedCase
from factorizer.segmentation.volumes import check_label, on_grid_of, read_grid, read_volume

SEED = 0
WRITTEN = ("report.json", "segmentation.png", "components.png")  # at the end of a run
WAY_OUT = "give another --out, or delete that file"
EXPLAINED = 4  # cases of each part, at most, that components are compared with the truth on


def run_demo(
    out: str | Path,
    data: str | Path | None = None,
    *,
    steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train on the Decathlon folder `data`, or on made-up volumes, and write everything into `out`.

    Where `out` holds the checkpoint of the same run, it continues from there. `steps`: training
    steps, by default as many as the budget "quick" is enough for. Where a shipped model segments what the
    data has labels of, it does so with the held-out cases first.

    Writes report.json, segmentation.png, components.png, checkpoint.pt, predictions/NAME.nii.gz,
    shipped/NAME.nii.gz where a shipped model fits, with what they were made from (`provenance`), and,
    without `data`, the volumes themselves under data/. Returns the report. A flat held-out volume gets an
    empty label map.

    Raises DataError, before training, for data or an `out` that cannot be used, which is also one that holds
    the data, or results of something else under the names of these.
    """
    start, out, console = time.perf_counter(), Path(out), console or Console(markup=False)
    check_counts(steps=(steps, 1))
    task = None if data is None else read_decathlon(data)
    inputs: list[Path] = []
    if task is not None:
        inputs = [Path(str(data)) / "dataset.json", *(file for case in task.cases for file in case.files)]
    for folder in (out, out / "predictions"):
        prepare_folder("out", folder, inputs)
    check_apart("out", out / "shipped", inputs)
    if task is None:
        with console.status("Drawing synthetic volumes"):
            task = read_decathlon(write_synthetic(out / "data", seed=SEED))
    geometries = check_cases(console, task)
    training, held_out = split_cases(task.cases, SEED)
    checkpoint = out / "checkpoint.pt"
    if not checkpoint.exists():
        _check_vacant(out, held_out)
    plan = plan_run(task, geometries, training, held_out, Wishes(steps=steps), seed=SEED)
    for part, cases in (("training", training), ("held-out", held_out)):
        if not any(_seen(plan, cases)):
            raise DataError(f"data: the {part} images hold a single value each: there is nothing to be seen")
    trainer, crops, step_seconds = prepare(
        plan,
        checkpoint,
        lambda plan: Trainer(plan, build_network(plan.network, plan.seed)),
        partial(rehearse, console, plan, training, geometries),
        "quick" if steps is None else None,
    )
    plan = trainer.plan
    if not trainer.finished:
        _check_vacant(out, held_out)
    seconds_before = trainer.seconds

    shipped = segment_with_shipped(console, task, held_out, out / "shipped")
    screen.announce(
        console,
        plan,
        source=NOTICE if data is None else str(data),
        synthetic=data is None,
        parameters=parameter_count(trainer.network),
        backend=kernel_backend(),
        steps_done=trainer.step,
        seconds=(step_seconds or 0.0) * (plan.steps - trainer.step)
        + _segmenting_seconds(plan, [geometries[c.name] for c in held_out]),
        out=out,
    )
    if crops is not None:
        fit(console, trainer, crops, checkpoint)
    predictor = Predictor([(trainer.result, plan)])
    scores, seen = _segment(console, predictor, held_out, out / "predictions")
    with console.status("Comparing components with the truth"):
        components = _explain(predictor, training, seen)
    with console.status("Timing the networks side by side"):
        speeds = time_networks(plan)
    with console.status("Drawing"):
        notice = f"\n{NOTICE}" if data is None else ""
        _draw(out, predictor, seen, scores, components, notice)

    report = {
        "task": task.name,
        "data": NOTICE if data is None else str(data),
        "synthetic": data is None,
        "dice": _mean({row.target: row.dice for row in summarise(itertools.chain(*scores.values()))}),
        "dice_per_case": {
            name: _mean({score.target: score.dice for score in members}) for name, members in scores.items()
        },
        "seconds": round(seconds_before + time.perf_counter() - start, 2),
        "seconds_training": round(trainer.seconds, 2),
        "backend": kernel_backend(),
        "timings": {
            "forward_input": [1, len(plan.modalities), *plan.crop],
            "training_step_input": [plan.batch_size, len(plan.modalities), *plan.crop],
            "threads": torch.get_num_threads(),
            "networks": [asdict(speed) for speed in speeds],
        },
        "components": components,
        "shipped": shipped,
        "loss": {"first": trainer.losses[0], "last": trainer.losses[-1]},
        "split": {"training": plan.training, "held_out": plan.held_out},
        "settings": asdict(plan),
        "versions": {"python": platform.python_version(), **versions()},
    }
    with atomic(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    screen.conclude(console, report, out)
    return report


def segment_with_shipped(
    console: Console, task: Task, cases: Sequence[Case], folder: Path
) -> dict[str, Any] | None:
    """Segments the cases with the shipped model for what the task labels: its name, time and Dice.

    Cases that the model was trained on are left out, unless it was trained on all, which is said then. None
    where no model fits. Raises DataError where something else is there under a result's name.
    """
    for path in sorted(SHIPPED.glob("*.pt")):
        predictor = load_predictor([path], device="cpu")
        plan = predictor.plan
        seen = {name for _, member in predictor.models for name in member.training}
        if (plan.modalities, plan.labels) != (task.modalities, task.labels):
            continue
        unseen = [case for case in cases if case.name not in seen]
        shown = unseen or cases
        start = time.perf_counter()
        prepare_folder("out", folder)
        scores, _ = _segment(console, predictor, shown, folder)
        found = {
            "model": path.stem,
            "cases": len(shown),
            "trained_on_them": not unseen,
            "seconds": round(time.perf_counter() - start, 2),
            "dice": _mean({row.target: row.dice for row in summarise(itertools.chain(*scores.values()))}),
        }
        screen.tell_shipped(console, found, folder)
        return found
    return None


def _segmenting_seconds(plan: Plan, held_out: Sequence[Geometry]) -> float:
    """How long segmenting will take, from three forwards of a throw-away network."""
    network = build_network(plan.network, plan.seed).eval()
    image = torch.randn(1, len(plan.modalities), *plan.crop)
    with torch.no_grad():
        forward = side_by_side({"forward": lambda: network(image)}, 3)["forward"] / 1e3
    windows = 0
    for geometry in held_out:
        length = np.array(geometry.shape) * geometry.spacing / plan.spacing
        size = np.maximum(np.rint(length).astype(int), plan.crop)
        windows += len(dense_patch_slices(size, plan.crop, [c // 2 for c in plan.crop]))
    return forward * windows


def _segment(
    console: Console, predictor: Predictor, cases: Sequence[Case], folder: Path
) -> tuple[dict[str, list[Score]], list[Case]]:
    """Segment the cases into `folder`; returns their scores, on the cases' own grids, and those in which
    there is something to be seen. Raises DataError where something else is there under a result's name."""
    plan, scores, seen = predictor.plan, {}, []
    settings, results = predictor.settings(), {case: folder / f"{case.name}.nii.gz" for case in cases}
    for case, path in results.items():  # all, before the first is written
        made(path, case, settings, way_out=WAY_OUT)
    with progress(console) as bar:
        for case, path in bar.track(list(results.items()), description="Segmenting"):
            try:
                values = predictor.segment(case)
                seen.append(case)
            except FlatImageError as error:
                tell_warning(console, f"{case.name}: {error}; its label map is empty")
                values = np.zeros(read_grid(case.image)[1], np.uint8)
            write_result(path, case, settings, partial(save, on_grid_of(values, case.image)))
            scores[case.name] = evaluate_case(path, case, list(plan.labels), plan.targets)
    return scores, seen


def _seen(plan: Plan, cases: Iterable[Case]) -> Iterator[Case]:
    """Those in whose image there is something to be seen."""
    for case in cases:
        with suppress(FlatImageError):
            PreparedCase(plan, case)
            yield case


def _check_vacant(out: Path, held_out: Sequence[Case]) -> None:
    """Raises DataError where a file is there that only a run whose training has ended leaves."""
    results = [out / "predictions" / f"{case.name}.nii.gz" for case in held_out]
    for path in (*(out / name for name in WRITTEN), *results):
        if path.exists():
            raise DataError(f"out: {path} is there, and this run's training has not ended; {WAY_OUT}")


def _explain(predictor: Predictor, training: Sequence[Case], held_out: Sequence[Case]) -> dict[str, Any]:
    """`best_components` for the report; AUC is None where no case has the class."""
    chosen_on = list(itertools.islice(_seen(predictor.plan, training), EXPLAINED))
    found = best_components(predictor, chosen_on, held_out[:EXPLAINED])
    return {
        depth: {
            "layer": best.layer,
            "maps": best.maps,
            "best": {
                name: {"map": m, "marks": marks, "auc": None if math.isnan(auc) else round(auc, 4)}
                for name, (m, marks, auc) in best.targets.items()
            },
        }
        for depth, best in found.items()
    }


def _draw(
    out: Path,
    predictor: Predictor,
    held_out: Sequence[Case],
    scores: dict[str, list[Score]],
    components: dict[str, Any],
    notice: str,
) -> None:
    plan = predictor.plan
    by_dice = sorted(held_out, key=lambda case: -sum(score.dice for score in scores[case.name]))
    middle = by_dice[len(by_dice) // 2]
    pictures = {}
    for case in dict.fromkeys((by_dice[0], middle, by_dice[-1])):
        values = [f"{score.target} {score.dice:.2f}" for score in scores[case.name]]
        caption = textwrap.fill("Dice " + ", ".join(values), 40)
        _, prediction = read_volume(out / "predictions" / f"{case.name}.nii.gz")
        truth = check_label(case, list(plan.labels))
        pictures[case] = picture(PreparedCase(plan, case), prediction, truth, caption)
    draw_segmentations(
        out / "segmentation.png",
        list(pictures.values()),
        plan.modalities,
        plan.classes,
        f"{plan.task}: held-out cases, best, median and worst of {len(held_out)}{notice}",
    )

    names = [record["layer"] for record in components.values()]
    maps = case_components(predictor, names, middle).maps
    rows = []
    for depth, record in components.items():
        texts = [
            (best["map"], told(name, best["marks"], best["auc"]))
            for name, best in record["best"].items()
            if best["auc"] is not None
        ]
        rows.append(component_row(depth, maps[record["layer"]], texts))
    draw_components(
        out / "components.png",
        pictures[middle],
        rows,
        plan.classes,
        f"{plan.task}: NMF components of a held-out case, {middle.name}; bright: much of it{notice}",
    )


def _mean(values: dict[str, float]) -> dict[str, float]:
    """The values after their mean, rounded."""
    mean = sum(values.values()) / len(values)
    return {name: round(value, 4) for name, value in {"mean": mean, **values}.items()}
