"""factorizer train: a network for a Decathlon folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from factorizer.models.build import build_network
from factorizer.segmentation.cases import read_decathlon, split_cases
from factorizer.segmentation.errors import DataError, check_counts
from factorizer.segmentation.evaluation import MeanDice
from factorizer.segmentation.files import atomic, prepare_folder
from factorizer.segmentation.plan import plan_run
from factorizer.segmentation.processes import pick_device, place, process_group
from factorizer.segmentation.screen import duration, table
from factorizer.segmentation.training import Trainer, fit
from factorizer.segmentation.transforms import Crops, augmentation, training_volumes
from factorizer.segmentation.volumes import check_cases


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
