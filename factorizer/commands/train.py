"""factorizer train: a network for a Decathlon folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from factorizer.data import (
    DataError,
    Geometry,
    Task,
    atomic,
    check_case,
    prepare_folder,
    read_decathlon,
    split_cases,
)
from factorizer.evaluation import MeanDice
from factorizer.planning import build_network, plan_run
from factorizer.processes import pick_device, place, process_group
from factorizer.screen import duration, progress, table
from factorizer.training import Trainer
from factorizer.transforms import Crops, augmentation, training_volumes

LINE_SECONDS = 60.0  # between two lines of a log file, where a bar would be seen at its end alone


def train(
    console: Console,
    data: Path,
    out: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    fold: int | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> Path:
    """Trains on the Decathlon folder `data` into `out`, or continues the run that is there.

    Writes plan.json, checkpoint.pt, TensorBoard's files under log/ and, where it validates, best.pt.
    Returns the checkpoint. Raises DataError before training for data or an `out` that cannot be used.
    """
    check_counts(steps=(steps, 1), patience=(patience, 1), workers=(workers, 0))
    if patience is not None and not validate_every:
        raise DataError("patience: counts validations, so it needs validate-every")
    where = pick_device(device)
    task = read_decathlon(data)
    prepare_folder("out", out)
    geometries = check_cases(console, task)
    training, held_out = split_cases(task.cases, seed, fold)
    plan = plan_run(task, geometries, training, held_out, steps=steps, seed=seed)
    checkpoint = out / "checkpoint.pt"
    with process_group():
        trainer = Trainer(
            plan,
            build_network(plan.network, plan.seed),
            device=where,
            log=out / "log",
            validate=MeanDice(plan, held_out, where) if validate_every else None,
            validate_every=validate_every or plan.steps,
            patience=patience,
            workers=(4 if where.type == "cuda" else 0) if workers is None else workers,
        )
        if checkpoint.exists():
            trainer.resume(checkpoint)
        if place()[0] == 0:
            with atomic(out / "plan.json") as temporary:
                temporary.write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")
        _announce(console, trainer, out)
        if not trainer.finished:
            with console.status(f"Loading {len(training)} volumes"):
                volumes = training_volumes(plan, training, geometries)
            crops = Crops(
                volumes, augmentation(plan), plan.batch_size, plan.seed, trainer.part, trainer.parts
            )
            fit(console, trainer, crops, checkpoint)
    losses = trainer.losses[-20:]
    console.print(
        f"{trainer.step} steps in {duration(trainer.seconds)}; loss {sum(losses) / len(losses):.3f}; "
        f"network in {checkpoint}"
    )
    if trainer.scores:
        step, best = max(trainer.scores, key=lambda pair: pair[1])
        console.print(f"best mean Dice of the held-out cases: {best:.3f} after step {step}, in best.pt")
    return checkpoint


def check_counts(**options: tuple[int | None, int]) -> None:
    """Raises DataError for an option, given as its value and the least it may be, that is too small."""
    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise DataError(f"{name}: got {value}; it must be at least {least}")


def check_cases(console: Console, task: Task) -> dict[str, Geometry]:
    """The geometry of each case of a task. Raises DataError for the first that cannot be used."""
    geometries = {}
    with progress(console) as bar:
        for case in bar.track(task.cases, description="Checking volumes"):
            geometries[case.name] = check_case(task, case)
    return geometries


def fit(console: Console, trainer: Trainer, crops: Crops, path: Path) -> None:
    """Trains to the end with a bar, or lines in a log, from the checkpoint at `path` if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if trainer.step == 0 and path.exists():
        trainer.resume(path)
    with progress(console) as bar:
        task = bar.add_task("Training", total=trainer.plan.steps, completed=trainer.step)

        told = time.perf_counter()

        def advance(step: int) -> None:
            nonlocal told
            recent = trainer.losses[-20:]
            loss = sum(recent) / len(recent)
            score = f", Dice {trainer.scores[-1][1]:.3f}" if trainer.scores else ""
            bar.update(task, completed=step, description=f"Training, loss {loss:.3f}{score}")
            if not console.is_terminal and time.perf_counter() - told >= LINE_SECONDS:
                console.print(f"step {step} of {trainer.plan.steps}, loss {loss:.3f}{score}")
                told = time.perf_counter()

        trainer.run(crops, path, advance)


def _announce(console: Console, trainer: Trainer, out: Path) -> None:
    plan = trainer.plan
    size = " x ".join(str(length) for length in plan.crop)
    spacing = " x ".join(f"{length:.3g}" for length in plan.spacing)
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    rows = table(f"factorizer train: {plan.task}", "", "")
    rows.columns[1].justify = "left"
    rows.show_header = False
    rows.add_row("modalities", ", ".join(plan.modalities))
    rows.add_row("classes", ", ".join(plan.classes))
    rows.add_row("cases", f"{len(plan.training)} to train on, {len(plan.held_out)} held out")
    rows.add_row("spacing, crop", f"{spacing} mm, {size} voxels")
    rows.add_row("network", f"{parameters:,} parameters")
    rows.add_row("training", f"{plan.steps} steps of {plan.batch_size} crops")
    if trainer.step:
        rows.add_row("resumes", f"{trainer.step} steps are done")
    threads = torch.get_num_threads()
    rows.add_row("device", f"{trainer.device}; processes: {trainer.parts}, threads of each: {threads}")
    rows.add_row("results in", str(out))
    console.print(rows)
