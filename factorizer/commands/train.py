"""factorizer train: a network for a Decathlon folder."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from factorizer.models.build import build_network, parameter_count
from factorizer.segmentation.cases import on_one_grid, read_decathlon, read_split, split_cases
from factorizer.segmentation.checkpoint import read_first
from factorizer.segmentation.errors import DataError, check_counts
from factorizer.segmentation.evaluation import MeanDice
from factorizer.segmentation.files import atomic, check_own, digest_of, prepare_folder, read_json
from factorizer.segmentation.plan import AS_PLANNED, Plan, Wishes, plan_run
from factorizer.segmentation.processes import pick_device, process_group
from factorizer.segmentation.recipe import BUDGETS
from factorizer.segmentation.screen import duration, facts
from factorizer.segmentation.survey import check_cases
from factorizer.segmentation.training import (
    BEST,
    Trainer,
    check_best,
    fit,
    prepare,
    rehearse,
    start_from,
)

PLAN = "plan.json"
# The keys that every plan has, of whatever version.
REQUIRED = {f.name for f in fields(Plan) if f.default is MISSING and f.default_factory is MISSING}


def train(
    console: Console,
    data: Path,
    out: Path,
    wishes: Wishes = AS_PLANNED,
    *,
    resample: str = "",
    split: Path | None = None,
    budget: str = "standard",
    init: Path | None = None,
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

    Where the wishes name no steps they are as many as the `budget`, a name of `recipe.BUDGETS`, is enough for
    by a step with its crops, which is measured first; a run that is continued keeps its number. `init` is a
    checkpoint or a model file of one network: the run's network is of its kind, and starts from its weights
    where they fit.

    Writes plan.json, checkpoint.pt, TensorBoard's files under log/ and, where it validates, best.pt.
    Returns the checkpoint. Raises DataError before training for data or an `out` that cannot be used.
    """
    check_counts(
        validate_every=(validate_every, 1), patience=(patience, 1), workers=(workers, 0), seed=(seed, 0)
    )
    if budget not in BUDGETS:
        raise DataError(f"budget: got {budget!r}; it must be one of {', '.join(BUDGETS)}")
    if patience is not None and not validate_every:
        raise DataError("patience: counts validations, so it needs validate-every")
    if init is not None:
        for name, wish in wishes.of_the_network().items():
            if wish is not None:
                raise DataError(
                    f"{name}: got {wish}, and --init, whose network decides it; leave one of them out"
                )
        try:
            start = read_first(init)[0]
        except FileNotFoundError as error:
            raise DataError(f"init: there is no {init}") from error
    place = pick_device(device)
    task = on_one_grid(read_decathlon(data), resample)
    if split is None:
        training, held_out = split_cases(task.cases, seed, fold)
    else:
        training, held_out = read_split(split, task.cases, fold)
        task = replace(task, cases=(*training, *held_out))
    prepare_folder("out", out)
    check_plan(out)
    geometries = check_cases(console, task, training)
    wishes = wishes if init else wishes.within(budget, place)
    plan = plan_run(task, geometries, training, held_out, wishes, seed=seed, resample=resample)
    checkpoint = out / "checkpoint.pt"
    if init is not None:
        plan = _like(plan, start, init)
    if workers is None:
        workers = 4 if place.type == "cuda" else 0
    with process_group():
        network = build_network(plan.network, plan.seed)
        if init is not None:
            copied, others = start_from(network, init)
            console.print(f"{init}: {copied} tensors start from it, {others} at random", soft_wrap=True)
        if not checkpoint.exists():
            check_best(out / BEST, plan)

        def make_trainer(plan: Plan) -> Trainer:
            return Trainer(
                plan,
                network,
                device=place,
                log=out / "log",
                validate=MeanDice(plan, held_out, place) if validate_every else None,
                validate_every=validate_every or plan.steps,
                patience=patience,
                workers=workers,
            )

        trainer, crops, seconds = prepare(
            plan,
            checkpoint,
            make_trainer,
            partial(rehearse, console, plan, training, geometries, place, workers),
            budget if wishes.steps is None else None,
        )
        if trainer.step == 0 and trainer.process_index == 0:
            (out / BEST).unlink(missing_ok=True)  # of this very run, killed before its first checkpoint
        announce(console, trainer, out, seconds)
        if crops is not None:
            fit(console, trainer, crops, checkpoint)
    losses = trainer.losses[-20:]
    console.print(
        f"{trainer.step} steps in {duration(trainer.seconds)}; loss {sum(losses) / len(losses):.3f}; "
        f"network in {checkpoint}"
    )
    if trainer.scores:
        step, best = max(trainer.scores, key=lambda pair: (pair[1], pair[0]))  # of equals the last is kept
        console.print(f"best mean Dice of the held-out cases: {best:.3f} after step {step}, in {BEST}")
    return checkpoint


def _like(plan: Plan, other: Plan, init: Path) -> Plan:
    """The plan with the network of another, which the file `init` has, for the plan's channels and size."""
    own = {name: plan.network[name] for name in ("in_channels", "out_channels", "spatial_size")}
    # By its content too: other weights of the same name are another start.
    return replace(plan, network={**other.network, **own}, init=f"{init} (SHA-256 {digest_of(init)[:16]})")


def check_plan(out: Path) -> None:
    """Raises DataError where out/plan.json, which `announce` writes, is there and no plan."""

    def own(path: Path) -> bool:
        try:
            content = read_json(path)
        except DataError:
            return False
        return isinstance(content, dict) and content.keys() >= REQUIRED

    check_own("out", out / PLAN, own, "plan of a training")


def announce(console: Console, trainer: Trainer, out: Path, seconds: float | None = None) -> None:
    """Writes out/plan.json, and shows what the plan decided; `seconds`: of a step, where it was measured."""
    plan = trainer.plan
    if trainer.process_index == 0:
        with atomic(out / PLAN) as temporary:
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
        + (f"half the grid, stem stride {network['stem_stride']}, " if "stem_stride" in network else "")
        + f"strides {network.get('strides')}, rank {network.get('rank', 1)}, {_kind(windows)}",
        "training": f"{plan.steps} steps of {plan.batch_size} crops, learning rate {plan.learning_rate:g}",
        "mirror images": ", ".join(axes) or "none",
    }
    if plan.regions:
        rows["regions"] = ", ".join(f"{name} {list(values)}" for name, values in plan.regions.items())
    if plan.resample:
        rows["grid"] = f"modalities are brought to that of {plan.resample}"
    if plan.notes:
        rows["decided"] = "\n".join(plan.notes)
    if seconds is not None:
        left = (plan.steps - trainer.step) * seconds
        rows["expected"] = f"{duration(left)}, from {seconds:.2f} s for a step"
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
