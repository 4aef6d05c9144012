"""What the parts of a network are worth: ``python -m benchmarks.study DATA [--out FOLDER]``.

Each change of the default network, and networks of MONAI beside it, is trained by the default recipe on an
inner fold of the training cases: the held-out cases of `factorizer train` are never looked at. Each change
of a Factorizer is trained twice, the second time with the factorisation left out (the rectified matrices
stand in its place), and each from every seed. A run validates as it goes, so that its record has Dice
against steps and against seconds of its processor, and is one JSON file; a stopped study goes on where its
runs were. Runs go side by side, each on one thread.

``--steps`` gives all runs as many steps; ``--minutes`` gives each the steps that its processor makes in that
time, by steps measured first, so that networks are compared at equal time. ``--change``, ``--seeds``,
``--rate``, ``--cases`` (training cases) and ``--noise`` (standard deviation of what is added to every volume)
select. study.md in the folder has a table of whatever is finished there, study.png its Dice against minutes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

import factorizer_kernels as fk
from factorizer.models.build import build_network, parameter_count
from factorizer.segmentation.cases import read_decathlon, split_cases
from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.files import atomic
from factorizer.segmentation.inference import FinestHead
from factorizer.segmentation.plan import Plan, plan_run
from factorizer.segmentation.recipe import LEARNING_RATE
from factorizer.segmentation.survey import check_cases
from factorizer.segmentation.training import REHEARSED, Trainer
from factorizer.segmentation.transforms import CropBatches, training_volumes

from .accuracy import OTHERS, PUBLISHED, SPLIT_SEED, bind
from .report import table

INNER_SEED = 1
VALIDATIONS = 5  # of a run, evenly spread, the last after the last step

_SHIFTS = ("SWMatricize", {"head_dim": 8, "patch_size": 4, "shifts": (None, 1, 2, 3)})
_NARROW = ("SWMatricize", {"head_dim": 4, "patch_size": 4, "shifts": (None, 2)})
_LARGE = ("SWMatricize", {"head_dim": 8, "patch_size": 8, "shifts": (None, 4)})
# In place of arguments of the default network.
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "published parts": PUBLISHED,
    "no local filter": {"local": None},
    "local filter of 5": {"local": 5},
    "one head": {"num_deep_supr": 0},
    "four shifts": {"reshape": _SHIFTS},
    "windows of 8": {"reshape": _LARGE},
    "heads of 4 channels": {"reshape": _NARROW},
    "rank 2": {"rank": 2},
    "rank 4": {"rank": 4},
    "10 iterations": {"num_iters": 10},
    "2 iterations": {"num_iters": 2},
    "multiplicative updates": {"solver": "mu"},
    "MLP ratio 4": {"mlp_ratio": 4},
    "InstanceNorm": {"norm": "InstanceNorm3d"},
    "half the grid": {"stem_stride": 2},  # what `factorizer train --budget quick` takes on a CPU
    "half the grid, widths 32, 64, 128": {"stem_stride": 2, "encoder_width": (32, 64, 128)},
    "two blocks a level": {"encoder_depth": (2, 2, 2), "decoder_depth": (2, 2)},
    "widths 16, 32, 64": {"encoder_width": (16, 32, 64)},
    "widths 16, 32, 64, 128": {
        "encoder_width": (16, 32, 64, 128),
        "encoder_depth": (1, 1, 1, 1),
        "strides": (1, 2, 2, 2),
        "decoder_depth": (1, 1, 1),
    },
}


@dataclass(frozen=True)
class Run:
    """One network, trained once.

    Attributes:
        factorised: False where the factorisation is left out.
        steps, minutes: how long; one of them is None.
    """

    change: str
    factorised: bool
    seed: int
    steps: int | None
    minutes: float | None
    learning_rate: float
    cases: int
    noise: float

    @property
    def file(self) -> str:
        kind = "" if self.factorised else "_without-factorisation"
        name = self.change.replace(", ", "-").replace(" ", "-")
        length = f"{self.steps}-steps" if self.minutes is None else f"{self.minutes:g}-minutes"
        setting = f"{length}_rate-{self.learning_rate:g}_{self.cases}-cases_noise-{self.noise:g}"
        return f"{name}{kind}_{setting}_seed-{self.seed}"

    def plan(self, plan: Plan) -> Plan:
        """The task's plan with this run's network and setting."""
        network = {**plan.network, **CHANGES.get(self.change, {})}
        if not self.factorised:
            network["factorize"] = "Identity"
        return replace(plan, network=network, seed=self.seed, learning_rate=self.learning_rate)

    def build(self, plan: Plan) -> nn.Module:
        if self.change in CHANGES:
            return build_network(plan.network, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return OTHERS[self.change](plan.network["in_channels"], plan.network["out_channels"])


def execute(run: Run, data: Path, out: Path) -> None:
    """Trains and validates, into out/<run>.json, which comes last; out/<run>/ is where it goes on from."""
    torch.set_num_threads(1)
    fk.keep_freed_memory()  # as the command line does
    console = Console(quiet=True)
    task = read_decathlon(data)
    geometries = check_cases(console, task)
    training, inner = split_cases(split_cases(task.cases, SPLIT_SEED)[0], INNER_SEED)
    training = training[: run.cases]
    plan = run.plan(plan_run(task, geometries, training, inner))
    volumes = _noisy(training_volumes(plan, training, geometries), run.noise)
    held_out = _noisy(training_volumes(plan, inner, geometries), run.noise)
    checkpoint = out / run.file / "checkpoint.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    seconds = _step_seconds(Trainer(plan, run.build(plan)), CropBatches(plan, volumes))
    steps = run.steps or max(1, int(60 * (run.minutes or 0) / seconds))
    if checkpoint.exists():  # a run that goes on keeps its number
        steps = read_checkpoint(checkpoint)[0].steps
    plan = replace(plan, steps=steps)
    trainer = Trainer(
        plan,
        run.build(plan),
        validate=lambda network: _mean_dice(network, held_out, plan),
        validate_every=max(1, steps // VALIDATIONS),
    )
    if checkpoint.exists():
        trainer.resume(checkpoint)
    trainer.run(CropBatches(plan, volumes), checkpoint, lambda step: None)
    record = {
        **asdict(run),
        "steps": steps,
        "parameters": parameter_count(trainer.network),
        "step_seconds": seconds,
        "dice": trainer.scores,
        "loss": mean(trainer.losses[-20:]),
    }
    with atomic(out / f"{run.file}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    shutil.rmtree(checkpoint.parent)


def _step_seconds(trial: Trainer, batches: CropBatches) -> float:
    """Median seconds of the processor, so that what else the machine does counts little, of a step and its
    crops. The first step is not counted."""
    seconds = []
    for index in range(REHEARSED + 1):
        start = time.thread_time()
        trial.update(*batches[index])
        seconds.append(time.thread_time() - start)
    return median(seconds[1:])


def _noisy(volumes: Sequence[dict[str, Any]], deviation: float) -> Sequence[dict[str, Any]]:
    if not deviation:
        return volumes
    generator = torch.Generator().manual_seed(0)
    return [
        {**volume, "image": image + deviation * torch.randn(image.shape, generator=generator)}
        for volume in volumes
        for image in [volume["image"]]
    ]


@torch.no_grad()
def _mean_dice(network: nn.Module, volumes: Sequence[dict[str, Any]], plan: Plan) -> float:
    """Over volumes and targets, each volume at once, on the grid of the network."""
    finest, values = FinestHead(network), []
    for volume in volumes:
        decided = plan.decide(finest(volume["image"][None])[0])
        for mask, united in zip(plan.masks(volume["label"][None])[0], plan.targets.values(), strict=True):
            found = torch.isin(decided, torch.tensor(united, dtype=torch.uint8))
            both = float(found.sum() + mask.sum())
            values.append(2 * float((found * mask).sum()) / both if both else 1.0)
    return mean(values)


def tabulate(records: Sequence[dict[str, Any]]) -> list[str]:
    """In Markdown: of each setting the mean Dice with and without factorisation, over the seeds."""

    def setting(record: dict[str, Any]) -> tuple[Any, ...]:
        return (_length(record), *(record[name] for name in ("cases", "noise", "change", "learning_rate")))

    rows = []
    for (length, cases, noise, change, rate), members in groupby(sorted(records, key=setting), setting):
        runs = list(members)
        by_kind = {kind: [r for r in runs if r["factorised"] == kind] for kind in (True, False)}
        last = {kind: [r["dice"][-1][1] for r in found] for kind, found in by_kind.items()}
        first = runs[0]
        rows.append(
            (
                change,
                length,
                f"{first['steps']}",
                f"{rate:g}",
                f"{cases}",
                f"{noise:g}",
                f"{first['parameters']:,}",
                f"{first['step_seconds']:.2f}",
                *(" ".join(f"{d:.4f}" for d in last[kind]) or "-" for kind in (True, False)),
                f"{mean(last[True]) - mean(last[False]):+.4f}" if last[True] and last[False] else "-",
            )
        )
    head = ("network", "length", "steps", "rate", "cases", "noise", "parameters", "s a step")
    return table((*head, "Dice, each seed", "without factorisation", "worth"), rows)


def _length(record: dict[str, Any]) -> str:
    minutes = record["minutes"]
    return f"{record['steps']} steps" if minutes is None else f"{minutes:g} minutes"


def draw(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """The Dice of each validation against the processor's minutes until then: a colour for each network."""

    def network(record: dict[str, Any]) -> tuple[str, bool]:
        return record["change"], not record["factorised"]

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for colour, ((change, without), members) in enumerate(groupby(sorted(records, key=network), network)):
        label = f"{change}, without factorisation" if without else change
        for index, record in enumerate(members):
            steps, dice = zip(*record["dice"], strict=True)
            minutes = [step * record["step_seconds"] / 60 for step in steps]
            axes.plot(minutes, dice, "o-", color=f"C{colour}", label=label if index == 0 else None)
    axes.set(xlabel="minutes of one thread", ylabel="mean Dice of the inner cases")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=140)


def main(
    data: Annotated[Path, typer.Argument(help="Folder in the Decathlon's layout.")],
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("runs/study"),
    change: Annotated[list[str] | None, typer.Option(help="Of the table; may be given again.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each, from seeds 0, 1, ...")] = 2,
    steps: Annotated[int | None, typer.Option(help="Of each run. Default: 500.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Of the processor, for each run, in place of --steps.")
    ] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Learning rates. Default: the recipe's.")] = None,
    cases: Annotated[list[int] | None, typer.Option(help="Training cases. Default: 120.")] = None,
    noise: Annotated[list[float] | None, typer.Option(help="Added to volumes. Default: none.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = os.cpu_count() or 1,
) -> None:
    """Train the changes of the default network, each with and without the factorisation."""
    if unknown := set(change or ()).difference(CHANGES, OTHERS):
        known = ", ".join((*CHANGES, *OTHERS))
        raise typer.BadParameter(f"change: got {', '.join(unknown)}; there are {known}")
    if minutes is not None and (steps is not None or not minutes > 0):
        raise typer.BadParameter(f"minutes: got {minutes:g}; it must be above 0, and --steps not given")
    if minutes is None and steps is None:
        steps = 500
    runs = [
        Run(name, factorised, seed, steps, minutes, r, n, deviation)
        for name in change or (*CHANGES, *OTHERS)
        for factorised in ((True, False) if name in CHANGES else (True,))
        for r in rate or (LEARNING_RATE,)
        for n in cases or (120,)
        for deviation in noise or (0.0,)
        for seed in range(seeds)
    ]
    bind(out / "study.of", read_decathlon(data), out.glob("*.json"))
    os.environ["OMP_NUM_THREADS"] = "1"
    left = [run for run in runs if not (out / f"{run.file}.json").exists()]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for run, future in [(run, pool.submit(execute, run, data, out)) for run in left]:
            future.result()
            print(run.file, flush=True)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    draw(out / "study.png", records)
    with atomic(out / "study.md") as temporary:
        temporary.write_text("\n".join(tabulate(records)) + "\n", encoding="utf-8")
    print("\n".join(tabulate(records)))


if __name__ == "__main__":
    typer.run(main)
