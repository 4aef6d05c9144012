"""The demo from a folder to a report: check, plan, train, segment, explain, time, write."""

from __future__ import annotations

import json
import math
import platform
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from rich.console import Console
from torch import Tensor, nn

from factorizer.data import (
    Case,
    Crops,
    DataError,
    Geometry,
    Task,
    atomic,
    augmentation,
    check_case,
    read_decathlon,
    split_cases,
    training_volumes,
)
from factorizer.demo import screen
from factorizer.demo.figures import draw_components, draw_segmentations, picture
from factorizer.demo.synthetic import NOTICE, write_synthetic
from factorizer.demo.timing import compare, kernel_backend, parameter_count
from factorizer.explanation import case_components, component_agreement, shallow_and_deep
from factorizer.inference import dice, segment, write_segmentation
from factorizer.planning import Plan, build_network, plan_run
from factorizer.training import Trainer, read_checkpoint

SEED = 0
EXPLAINED = 4  # cases of each part, at most, that components are compared with the truth on
MAPS_SHOWN = 4
PACKAGES = ("torch", "monai", "numpy", "nibabel", "factorizer-kernels")


def run_demo(
    out: str | Path,
    data: str | Path | None = None,
    *,
    steps: int | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train on the Decathlon folder `data`, or on made-up volumes, and write everything into `out`.

    Where `out` holds the checkpoint of the same run, it continues from there. `steps`: training
    steps, by default as many as `factorizer.planning.plan_run` finds right for the data.

    Writes report.json, segmentation.png, components.png, checkpoint.pt, predictions/NAME.nii.gz
    and, without `data`, the volumes themselves under data/. Returns the report.

    Raises DataError, before training, for data or an `out` that cannot be used.
    """
    start, out, console = time.perf_counter(), Path(out), console or Console()
    if steps is not None and steps < 1:
        raise DataError(f"steps: got {steps}; it must be at least 1")
    task = None if data is None else read_decathlon(data)
    _prepare_out(out)
    if task is None:
        with console.status("Drawing synthetic volumes"):
            task = read_decathlon(write_synthetic(out / "data", seed=SEED))
    geometries = _check(console, task)
    training, held_out = split_cases(task.cases, SEED)
    plan = plan_run(task, geometries, training, held_out, steps=steps, seed=SEED)
    trainer = Trainer(plan, build_network(**plan.network, seed=plan.seed))
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        _resume(trainer, checkpoint)
    seconds_before = trainer.seconds

    screen.announce(
        console,
        plan,
        source=NOTICE if data is None else str(data),
        synthetic=data is None,
        parameters=parameter_count(trainer.network),
        backend=kernel_backend(),
        steps_done=trainer.step,
        seconds=_expected_seconds(plan, trainer.step, [geometries[c.name] for c in held_out]),
        out=out,
    )
    if trainer.step < plan.steps:
        _train(console, trainer, training, [geometries[c.name] for c in training], checkpoint)
    network = trainer.network.eval()
    scores = _segment(console, network, plan, held_out, out / "predictions")
    with console.status("Comparing components with the truth"):
        components = _explain(network, plan, training, held_out)
    with console.status("Timing the networks side by side"):
        speeds = compare(plan)
    with console.status("Drawing"):
        notice = f"\n{NOTICE}" if data is None else ""
        _draw(out, network, plan, held_out, scores, components, notice)

    report = {
        "task": task.name,
        "data": NOTICE if data is None else str(data),
        "synthetic": data is None,
        "dice": _dice_summary(scores, plan.classes),
        "dice_per_case": {
            name: {"mean": _number(values.nanmean()), **_named(values, plan.classes)}
            for name, values in scores.items()
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
        "loss": {"first": trainer.losses[0], "last": trainer.losses[-1]},
        "split": {"training": plan.training, "held_out": plan.held_out},
        "settings": asdict(plan),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
    }
    with atomic(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    screen.conclude(console, report, out)
    return report


def _prepare_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"out: {out} is a file; it must be a folder, or not exist yet")
    try:
        (out / "predictions").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DataError(f"out: {out} cannot be written to ({error})") from error


def _check(console: Console, task: Task) -> dict[str, Geometry]:
    geometries = {}
    with screen.progress(console) as progress:
        for case in progress.track(task.cases, description="Checking volumes"):
            geometries[case.name] = check_case(task, case)
    return geometries


def _resume(trainer: Trainer, path: Path) -> None:
    """Take up the checkpoint at `path`, provided that it is one of the same plan."""
    plan, state = read_checkpoint(path)
    for field in fields(Plan):
        was, now = getattr(plan, field.name), getattr(trainer.plan, field.name)
        if was != now:
            raise DataError(
                f"out: {path} belongs to a run with {field.name} = {was!r}, this one has {now!r}; "
                "give another folder, or delete that file to start anew"
            )
    trainer.load(state)


def _expected_seconds(plan: Plan, steps_done: int, held_out: Sequence[Geometry]) -> float:
    """Of training and segmenting, from three steps and forwards of a throw-away network."""

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return median(times)

    trial = Trainer(plan, build_network(**plan.network, seed=plan.seed))
    image = torch.randn(plan.batch_size, len(plan.modalities), *plan.crop)
    label = torch.zeros(plan.batch_size, 1, *plan.crop)
    step = seconds(lambda: trial.update(image, label))
    with torch.no_grad():
        forward = seconds(lambda: trial.network.eval()(image)) / plan.batch_size
    windows = 0
    for geometry in held_out:
        length = np.array(geometry.shape) * geometry.spacing / plan.spacing
        size = np.maximum(np.rint(length).astype(int), plan.crop)
        windows += len(dense_patch_slices(size, plan.crop, [c // 2 for c in plan.crop]))
    return step * (plan.steps - steps_done) + forward * windows


def _train(
    console: Console,
    trainer: Trainer,
    cases: Sequence[Case],
    geometries: Sequence[Geometry],
    path: Path,
) -> None:
    plan = trainer.plan
    with console.status(f"Loading {len(cases)} volumes"):
        volumes = training_volumes(
            cases, geometries, len(plan.modalities), plan.spacing, list(plan.labels), plan.crop
        )
    augment = augmentation(plan.crop, len(plan.labels), plan.sided)
    crops = Crops(volumes, augment, plan.batch_size, plan.seed)
    with screen.progress(console) as progress:
        bar = progress.add_task("Training", total=plan.steps, completed=trainer.step)

        def advance(step: int) -> None:
            recent = trainer.losses[-20:]
            loss = sum(recent) / len(recent)
            progress.update(bar, completed=step, description=f"Training, loss {loss:.3f}")

        trainer.run(crops, path, advance)


def _segment(
    console: Console, network: nn.Module, plan: Plan, cases: Sequence[Case], folder: Path
) -> dict[str, Tensor]:
    """Segment the cases into `folder`; returns the Dice of each class, on the cases' own grids."""
    scores = {}
    with screen.progress(console) as progress:
        for case in progress.track(cases, description="Segmenting"):
            labels = segment(network, plan, case.image)
            write_segmentation(labels, case.image, folder / f"{case.name}.nii.gz")
            truth = np.asarray(nib.load(case.label).dataobj)  # type: ignore[attr-defined]
            scores[case.name] = dice(labels, truth, list(plan.labels))
    return scores


def _explain(
    network: nn.Module, plan: Plan, training: Sequence[Case], held_out: Sequence[Case]
) -> dict[str, Any]:
    """How well single components tell the classes apart, in a shallow and a deep layer.

    The map that stands for a class is chosen on training cases and measured on held-out ones, so
    that the choice is no part of the measurement.
    """
    layers = shallow_and_deep(network, plan)
    names = list(layers.values())
    chosen_on = component_agreement(network, plan, names, training[:EXPLAINED])
    measured_on = component_agreement(network, plan, names, held_out[:EXPLAINED])
    report = {}
    for depth, layer in layers.items():
        best = chosen_on[layer].nan_to_num(nan=-1).argmax(1).tolist()
        report[depth] = {
            "layer": layer,
            "maps": chosen_on[layer].shape[1],
            "best": {
                name: {"map": m, "auc": _number(measured_on[layer][k, m])}
                for k, (name, m) in enumerate(zip(plan.classes, best, strict=True))
            },
        }
    return report


def _draw(
    out: Path,
    network: nn.Module,
    plan: Plan,
    held_out: Sequence[Case],
    scores: dict[str, Tensor],
    components: dict[str, Any],
    notice: str,
) -> None:
    by_dice = sorted(held_out, key=lambda case: -float(scores[case.name].nanmean()))
    places = sorted({0, len(by_dice) // 2, len(by_dice) - 1})
    pictures = []
    for case in (by_dice[place] for place in places):
        values = zip(plan.classes, scores[case.name].tolist(), strict=True)
        known = [f"{name} {value:.2f}" for name, value in values if not math.isnan(value)]
        caption = textwrap.fill("Dice " + ", ".join(known), 40)
        path = out / "predictions" / f"{case.name}.nii.gz"
        pictures.append(picture(plan, case, path, caption))
    draw_segmentations(
        out / "segmentation.png",
        pictures,
        plan.modalities,
        plan.classes,
        f"{plan.task}: held-out cases, best, median and worst of {len(held_out)}{notice}",
    )

    middle = by_dice[len(by_dice) // 2]
    names = [record["layer"] for record in components.values()]
    maps, _ = case_components(network, plan, names, middle)
    rows = []
    for depth, record in components.items():
        captions: dict[int, list[str]] = {}
        for name, best in record["best"].items():
            if best["auc"] is not None and best["auc"] > 0.5:  # better than chance
                captions.setdefault(best["map"], []).append(f"{name}: AUC {best['auc']:.2f}")
        volumes = maps[record["layer"]]
        # The maps that stand for a class come first, then those with most in them.
        by_content = volumes.flatten(1).mean(1).argsort(descending=True).tolist()
        shown = [*captions, *(m for m in by_content if m not in captions)][:MAPS_SHOWN]
        texts = ["\n".join([f"component {m}", *captions.get(m, [])]) for m in shown]
        rows.append((f"{depth} layer", volumes[shown].numpy(), texts))
    draw_components(
        out / "components.png",
        pictures[places.index(len(by_dice) // 2)],
        rows,
        plan.classes,
        f"{plan.task}: NMF components of a held-out case, {middle.name}; bright: much of it{notice}",
    )


def _dice_summary(scores: dict[str, Tensor], classes: Sequence[str]) -> dict[str, float | None]:
    """Means over the cases that have the class, and the mean of these over the classes."""
    per_class = torch.stack(list(scores.values())).nanmean(0)
    return {"mean": _number(per_class.nanmean()), **_named(per_class, classes)}


def _named(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values, strict=True)}


def _number(value: Tensor) -> float | None:
    """For JSON, which has no NaN: None says that there was nothing to measure."""
    return None if value.isnan() else round(float(value), 4)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
