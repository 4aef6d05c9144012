"""factorizer train: a network for a Decathlon folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from factorizer.models.build import build_network, parameter_count
from factorizer.segmentation.cases import on_one_grid, read_decathlon, read_split, split_cases
from factorizer.segmentation.errors import DataError, check_counts
from factorizer.segmentation.evaluation import MeanDice
from factorizer.segmentation.files import atomic, prepare_folder
from factorizer.segmentation.plan import AS_PLANNED, Wishes, plan_run
from factorizer.segmentation.processes import pick_device, process_group
from factorizer.segmentation.screen import duration, facts
from factorizer.segmentation.training import Trainer, fit
from factorizer.segmentation.transforms import CropBatches, training_volumes
from factorizer.segmentation.volumes import check_cases


def train(
    console: Console,
    data: Path,
    out: Path,
    wishes: Wishes = AS_PLANNED,
    *,
    resample: str = "",
    split: Path | None = None,
    seed: int = 0,
    fold: int | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> Path:
    """Trains on the Decathlon or nnU-Net folder `data` into `out`, or continues the run that is there.

    `wishes` stand in place of what the data would decide, a `split` file (`read_split`) in place of a drawn
    one; with `resample` modalities on other grids are brought to that of "first", or of the one named.

    Writes plan.json, checkpoint.pt, TensorBoard's files under log/ and, where it validates, best.pt.
    Returns the checkpoint. Raises DataError before training for data or an `out` that cannot be used.
    """
    check_counts(validate_every=(validate_every, 1), patience=(patience, 1), workers=(workers, 0))
    if patience is not None and not validate_every:
        raise DataError("patience: counts validations, so it needs validate-every")
    place = pick_device(device)
    task = on_one_grid(read_decathlon(data), resample)
    if split is None:
        training, held_out = split_cases(task.cases, seed, fold)
    else:
        training, held_out = read_split(split, task.cases, fold)
        task = replace(task, cases=(*training, *held_out))
    prepare_folder("out", out)
    geometries = check_cases(console, task)
    plan = plan_run(task, geometries, training, held_out, wishes, seed=seed, resample=resample)
    checkpoint = out / "checkpoint.pt"
    with process_group():
        trainer = Trainer(
            plan,
            build_network(plan.network, plan.seed),
            device=place,
            log=out / "log",
            validate=MeanDice(plan, held_out, place) if validate_every else None,
            validate_every=validate_every or plan.steps,
            patience=patience,
            workers=(4 if place.type == "cuda" else 0) if workers is None else workers,
        )
        if checkpoint.exists():
            trainer.resume(checkpoint)
        announce(console, trainer, out)
        if not trainer.finished:
            with console.status(f"Loading {len(training)} volumes"):
                volumes = training_volumes(plan, training, geometries)
            fit(console, trainer, CropBatches(plan, volumes), checkpoint)
    losses = trainer.losses[-20:]
    console.print(
        f"{trainer.step} steps in {duration(trainer.seconds)}; loss {sum(losses) / len(losses):.3f}; "
        f"network in {checkpoint}"
    )
    if trainer.scores:
        step, best = max(trainer.scores, key=lambda pair: pair[1])
        console.print(f"best mean Dice of the held-out cases: {best:.3f} after step {step}, in best.pt")
    return checkpoint


def announce(console: Console, trainer: Trainer, out: Path) -> None:
    """Writes out/plan.json, and shows what the plan decided."""
    plan = trainer.plan
    if trainer.process_index == 0:
        with atomic(out / "plan.json") as temporary:
            temporary.write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")
    size = " x ".join(str(length) for length in plan.crop)
    spacing = " x ".join(f"{length:.3g}" for length in plan.spacing)
    network = plan.network
    windows = network.get("reshape", ("", {}))
    axes = [("left-right", "front-back", "bottom-top")[axis] for axis in plan.flips]
    rows = {
        "modalities": ", ".join(
            f"{name} ({'z-scores' if window is None else f'clipped to {window[0]:.4g} … {window[1]:.4g}'})"
            for name, window in zip(plan.modalities, plan.window, strict=True)
        ),
        "classes": ", ".join(plan.classes),
        "cases": f"{len(plan.training)} to train on, {len(plan.held_out)} held out",
        "spacing, crop": f"{spacing} mm, {size} voxels",
        "network": f"{parameter_count(trainer.network):,} parameters; width {network.get('encoder_width')}, "
        f"strides {network.get('strides')}, rank {network.get('rank', 1)}, {_kind(windows)}",
        "training": f"{plan.steps} steps of {plan.batch_size} crops, learning rate {plan.learning_rate:g}",
        "mirror images": ", ".join(axes) or "none",
    }
    if plan.regions:
        rows["regions"] = ", ".join(f"{name} {list(values)}" for name, values in plan.regions.items())
    if plan.resample:
        rows["grid"] = f"modalities are brought to that of {plan.resample}"
    if plan.notes:
        rows["decided"] = "\n".join(plan.notes)
    if trainer.step:
        rows["resumes"] = f"{trainer.step} steps are done"
    processes, threads = trainer.process_count, torch.get_num_threads()
    rows["device"] = f"{trainer.device}; processes: {processes}, threads of each: {threads}"
    console.print(facts(f"factorizer train: {plan.task}", rows | {"results in": str(out)}))


def _kind(reshape: Any) -> str:
    """A network by how its layers cut a volume into windows."""
    name, options = reshape
    size = options.get("patch_size")
    if size is None:
        return "global"
    cut = " x ".join(map(str, size if isinstance(size, tuple) else (size,) * 3))
    return f"{'swin' if name == 'SWMatricize' else 'local'}, windows of {cut}"
