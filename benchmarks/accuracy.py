"""Networks trained by one recipe on one split: ``python -m benchmarks.accuracy DATA [--out FOLDER]``.

Every network is trained on the same cases of a Decathlon folder, with the plan that `factorizer train`
makes for it: the same crops in the same order, loss, optimiser and number of steps. It segments the same
held-out cases. Runs go side by side, each on one thread, which the cores do more with than with one run
on all of them. A stopped command goes on where its runs were. At the end it times the networks side by
side, on all threads, and writes accuracy.json, accuracy.md (the tables of docs/accuracy.md) and
accuracy.png into the folder, for whatever runs are finished there. A folder is of one data set and recipe.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import nibabel as nib
import torch
import typer
from matplotlib.figure import Figure
from monai.networks.nets import DynUNet, SegResNet, SwinUNETR, UNet
from rich.console import Console
from rich.progress import TaskID
from torch import nn

from factorizer.layers.resize import Padded
from factorizer.models.build import build_network, parameter_count
from factorizer.segmentation.cases import Case, Task, read_decathlon, split_cases
from factorizer.segmentation.checkpoint import load_network
from factorizer.segmentation.evaluation import Score, score_labels, summarise
from factorizer.segmentation.explanation import best_components
from factorizer.segmentation.files import atomic, read_json
from factorizer.segmentation.inference import Predictor
from factorizer.segmentation.measure import side_by_side
from factorizer.segmentation.plan import Plan, plan_run
from factorizer.segmentation.recipe import RECIPE
from factorizer.segmentation.screen import log_lines, progress
from factorizer.segmentation.survey import Geometry, check_cases
from factorizer.segmentation.training import Trainer
from factorizer.segmentation.transforms import CropBatches, PreparedCase, training_volumes
from factorizer.segmentation.volumes import check_label, read_grid

from .report import table

SPLIT_SEED = 0
EXPLAINED = 8  # cases of each part that components are chosen and measured on
SWIN_UNETR_DIVISOR, UNET_DIVISOR = 32, 4


# What stands in place of arguments of the plan's network: the parts that the paper has not are left out.
PUBLISHED: dict[str, Any] = {"local": None, "num_deep_supr": 0}
FACTORIZERS: dict[str, dict[str, Any]] = {
    "Swin Factorizer, local filter": {},
    **{
        f"{name} Factorizer, rank {rank}": {**PUBLISHED, "rank": rank, **reshape}
        for name, reshape in (
            ("Swin", {}),
            ("Local", {"reshape": ("Matricize", {"head_dim": 8, "patch_size": 4})}),
            ("Global", {"reshape": ("Matricize", {"head_dim": 8, "grid_size": 1})}),
        )
        for rank in (1, 4)
    },
}
# Of MONAI, with three stages as the Factorizer has, and the widths that bring their parameters nearest to
# its. SwinUNETR has five stages whatever it is told, and no narrower ones than these.
OTHERS: dict[str, Callable[[int, int], nn.Module]] = {
    "SegResNet": lambda i, o: Padded(
        SegResNet(3, 16, i, o, blocks_down=(1, 1, 1), blocks_up=(1, 1)), UNET_DIVISOR
    ),
    "UNet": lambda i, o: Padded(UNet(3, i, o, (16, 32, 64), (2, 2), num_res_units=2), UNET_DIVISOR),
    "SwinUNETR": lambda i, o: Padded(SwinUNETR(i, o, feature_size=12, depths=(1,) * 4), SWIN_UNETR_DIVISOR),
    "DynUNet": lambda i, o: Padded(
        DynUNet(3, i, o, (3, 3, 3), (1, 2, 2), (2, 2), filters=(16, 32, 64), res_block=True), UNET_DIVISOR
    ),
}
NETWORKS = (*FACTORIZERS, *OTHERS)


@dataclass(frozen=True)
class Run:
    """One network trained from one seed of weights and crops."""

    network: str
    seed: int
    steps: int
    learning_rate: float

    @property
    def folder(self) -> str:
        name = self.network.lower().replace(",", "").replace(" ", "-")
        return f"{name}_{self.steps}-steps_rate-{self.learning_rate:g}_seed-{self.seed}"

    def plan(self, plan: Plan) -> Plan:
        if self.network in FACTORIZERS:
            network = {**plan.network, **FACTORIZERS[self.network]}
        else:
            network = {key: plan.network[key] for key in ("in_channels", "out_channels")}
        return replace(
            plan, network=network, seed=self.seed, steps=self.steps, learning_rate=self.learning_rate
        )

    def build(self, plan: Plan) -> nn.Module:
        """Freshly initialised, for a plan of this run."""
        if self.network in FACTORIZERS:
            return build_network(plan.network, self.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return OTHERS[self.network](plan.network["in_channels"], plan.network["out_channels"])


@dataclass(frozen=True)
class Data:
    """The task, its split, and the plan that all runs start from."""

    task: Task
    geometries: dict[str, Geometry]
    training: Sequence[Case]
    held_out: Sequence[Case]
    plan: Plan


def read_data(console: Console, folder: Path) -> Data:
    task = read_decathlon(folder)
    geometries = check_cases(console, task)
    training, held_out = split_cases(task.cases, SPLIT_SEED)
    return Data(task, geometries, training, held_out, plan_run(task, geometries, training, held_out))


def bind(known: Path, task: Task, records: Iterable[Path]) -> None:
    """Writes into the file `known` which data and recipe the records beside it are of, or checks that.

    Raises typer.BadParameter for records of others, or of which that is not known.
    """
    names = sorted(case.name for case in task.cases)
    now = json.loads(json.dumps({"task": task.name, "cases": names, "recipe": asdict(RECIPE)}))
    before = read_json(known) if known.exists() else None
    if before != now and (before is not None or any(records)):
        raise typer.BadParameter(
            f"out: {known.parent} holds records of other data or another recipe, or does not say of which; "
            "give another folder"
        )
    known.parent.mkdir(parents=True, exist_ok=True)
    with atomic(known) as temporary:
        temporary.write_text(json.dumps(now, indent=1), encoding="utf-8")


# --- one run, in a process of its own ------------------------------------------------------------


_progress: Any = None  # the queue that a worker tells its progress on, as (run, what it does, how far)


def _begin(queue: Any) -> None:
    global _progress
    _progress = queue
    torch.set_num_threads(1)


def execute(run: Run, data: Data, out: Path) -> None:
    """Train, segment and score, into out/<run>/; scores.json, which comes last, says that it is done."""
    folder, plan = out / run.folder, run.plan(data.plan)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    trainer = Trainer(plan, run.build(plan))
    if checkpoint.exists():
        trainer.resume(checkpoint)
    if not trainer.finished:
        volumes = training_volumes(plan, data.training, data.geometries)
        batches = CropBatches(plan, volumes)
        trainer.run(batches, checkpoint, lambda step: _progress.put((run, "training", step)))
    predictor, scores = Predictor([(trainer.result, plan)]), []
    for number, case in enumerate(data.held_out, 1):
        truth = check_label(case, list(plan.labels))
        spacing = nib.affines.voxel_sizes(read_grid(case.image)[0]).tolist()  # along the file's axes
        scores += score_labels(predictor.segment(case), truth, plan.targets, spacing, case.name)
        _progress.put((run, "segmenting", number))
    record = {**asdict(run), "scores": [asdict(score) for score in scores]}
    with atomic(folder / "scores.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def execute_all(console: Console, runs: Sequence[Run], data: Data, out: Path, jobs: int) -> None:
    """All the runs, `jobs` at a time."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come; torch is loaded here already
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with ProcessPoolExecutor(jobs, context, _begin, (queue,)) as pool, progress(console) as bars:
        pending = {pool.submit(execute, run, data, out) for run in runs}
        everything = bars.add_task("Runs", total=len(runs))
        shown: dict[Run, TaskID] = {}
        tell = log_lines(console)
        try:
            while pending:
                done, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    bars.advance(everything)
                while not queue.empty():
                    run, what, number = queue.get()
                    if run not in shown:
                        shown[run] = bars.add_task("")
                    total = run.steps if what == "training" else len(data.held_out)
                    text = f"{run.network}, seed {run.seed}: {what}"
                    bars.update(shown[run], description=text, completed=number, total=total)
                    tell(f"{text} {number} of {total}; {len(pending)} of {len(runs)} runs to go")
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # a run is worth no more than its last checkpoint
            raise


# --- what came of it -----------------------------------------------------------------------------


def finished(out: Path) -> list[dict[str, Any]]:
    """The records of the runs in the folder, in the order of NETWORKS, then by steps, rate and seed."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*/scores.json")]

    def place(record: dict[str, Any]) -> tuple[Any, ...]:
        place = NETWORKS.index(record["network"])
        return record["steps"], place, -record["learning_rate"], record["seed"]

    return sorted(records, key=place)


def times(console: Console, names: Iterable[str], data: Data) -> dict[str, dict[str, float]]:
    """Of each network its parameters, and the medians of a training step and of the sliding window over one
    held-out case, in milliseconds, all networks in turn."""
    trainers = {}
    for name in names:
        run = Run(name, 0, 1, 1e-3)
        plan = run.plan(data.plan)
        trainers[name] = Trainer(plan, run.build(plan))
    plan, case = data.plan, data.held_out[0]
    image = PreparedCase(plan, case).image
    crops = torch.randn(plan.batch_size, len(plan.modalities), *plan.crop)
    label = torch.randint(len(plan.labels), (plan.batch_size, 1, *plan.crop)).float()

    def segment(trainer: Trainer) -> None:
        predictor = Predictor([(trainer.network, trainer.plan)])
        predictor.run(trainer.network, trainer.plan, image)

    with console.status("Timing the networks side by side"):
        steps = side_by_side({n: partial(t.update, crops, label) for n, t in trainers.items()}, 7)  # type: ignore[misc]
        cases = side_by_side({n: partial(segment, t) for n, t in trainers.items()}, 7)
    return {
        name: {
            "parameters": parameter_count(trainer.network),
            "training_step_ms": steps[name],
            "case_ms": cases[name],
        }
        for name, trainer in trainers.items()
    }


def components(console: Console, records: Sequence[dict[str, Any]], data: Data, out: Path) -> dict[str, Any]:
    """Of each Factorizer's first run: the AUC of the component that stands for each target, by layer."""
    found = {}
    with progress(console) as bar:
        first = [r for r in records if r["network"] in FACTORIZERS and r["seed"] == 0]
        for record in bar.track(first, description="Looking at components"):
            run = Run(**{key: record[key] for key in ("network", "seed", "steps", "learning_rate")})
            predictor = Predictor([load_network(out / run.folder / "checkpoint.pt")])
            best = best_components(predictor, data.training[:EXPLAINED], data.held_out[:EXPLAINED])
            found[run.folder] = {
                "network": run.network,
                "steps": run.steps,
                "layers": {depth: {"maps": b.maps, "targets": b.targets} for depth, b in best.items()},
            }
    return found


def tables(
    records: Sequence[dict[str, Any]], timings: dict[str, dict[str, float]], explained: dict[str, Any]
) -> list[str]:
    """In Markdown: Dice and HD95 of each network, what it costs, and what its components find."""
    targets = list(dict.fromkeys(score["target"] for score in records[0]["scores"]))
    rows = []
    for (steps, name, rate), members in groupby(records, _setting):
        runs = [summarise(Score(**score) for score in member["scores"]) for member in members]
        row = [name, f"{steps}", f"{rate:g}", f"{len(runs)}"]
        for target in targets:
            row.append(_with_spread([s.dice for run in runs for s in run if s.target == target], 3))
        row.append(f"**{_with_spread([mean(s.dice for s in run) for run in runs], 3)}**")
        row.append(_with_spread([mean(s.hd95 for s in run) for run in runs], 2))
        row.append(f"{sum(s.infinite for run in runs for s in run)}")
        rows.append(row)
    head = ("network", "steps", "learning rate", "seeds", *(f"Dice, {t}" for t in targets))
    lines = table((*head, "mean Dice", "HD95, mm", "without HD95"), rows)
    first = next(iter(timings.values()))
    costs = [
        (
            name,
            f"{t['parameters']:,}",
            f"{t['training_step_ms']:.0f} ms",
            f"{t['training_step_ms'] / first['training_step_ms']:.2f}",
            f"{t['case_ms']:.0f} ms",
            f"{t['case_ms'] / first['case_ms']:.2f}",
        )
        for name, t in timings.items()
    ]
    head = ("network", "parameters", "training step", "ratio", "segmenting a case", "ratio")
    lines += ["", *table(head, costs)]
    areas = [
        (
            e["network"],
            f"{e['steps']}",
            f"{depth}, of {layer['maps']}",
            *(f"{auc:.3f}, {marks}" for _, marks, auc in layer["targets"].values()),
        )
        for e in explained.values()
        for depth, layer in e["layers"].items()
    ]
    if areas:
        lines += ["", *table(("network", "steps", "layer, maps", *(f"AUC, {t}" for t in targets)), areas)]
    return lines


def _setting(record: dict[str, Any]) -> tuple[int, str, float]:
    return record["steps"], record["network"], record["learning_rate"]


def _with_spread(values: Sequence[float], digits: int) -> str:
    """The mean, and half of what lies between the least and the largest."""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def draw(path: Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """The mean Dice of every held-out case and run, as boxes."""
    labels, values = [], []
    for (steps, name, rate), members in groupby(records, _setting):
        labels.append(f"{name}\n{steps} steps, rate {rate:g}")
        values.append([mean(s["dice"] for s in scores) for member in members for scores in _by_case(member)])
    figure = Figure(figsize=(9, 0.5 * len(labels) + 1), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(values[::-1], orientation="horizontal", widths=0.6, medianprops={"color": "black"})
    axes.set_yticks(range(1, len(labels) + 1), labels[::-1], fontsize=8)
    axes.set(xlabel="Dice of a held-out case, mean of the classes", title=title)
    axes.grid(axis="x", alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=140)


def _by_case(record: dict[str, Any]) -> Iterable[list[dict[str, Any]]]:
    return (list(scores) for _, scores in groupby(record["scores"], lambda score: score["case"]))


def report(console: Console, data: Data, out: Path) -> None:
    if not (records := finished(out)):
        raise typer.BadParameter(f"there is no finished run in {out}", param_hint="--seeds 0")
    names = [name for name in NETWORKS if any(record["network"] == name for record in records)]
    timings = times(console, names, data)
    threads = torch.get_num_threads()
    explained = components(console, records, data, out)
    content = {
        "task": data.task.name,
        "threads": threads,
        "times": timings,
        "components": explained,
        "runs": records,
    }
    text = "\n".join(tables(records, timings, explained))
    for name, written in (("accuracy.json", json.dumps(content, indent=1)), ("accuracy.md", f"{text}\n")):
        with atomic(out / name) as temporary:
            temporary.write_text(written, encoding="utf-8")
    cases = f"{len(data.training)} cases to train on, {len(data.held_out)} held out"
    draw(out / "accuracy.png", records, f"{data.task.name}: {cases}")
    console.print(text, soft_wrap=True, markup=False)
    console.print(f"times on {threads} threads; accuracy.json, accuracy.md and accuracy.png are in {out}")


def main(
    data: Annotated[Path, typer.Argument(help="A folder in the layout of the Decathlon.")],
    out: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/accuracy"),
    network: Annotated[list[str] | None, typer.Option(help="One of these alone; may be repeated.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate.")] = Plan.learning_rate,
    seeds: Annotated[int, typer.Option(min=0, help="Runs of each network; 0: only the report.")] = 2,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = os.cpu_count() or 1,
) -> None:
    names = network or NETWORKS
    for name in names:
        if name not in NETWORKS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(NETWORKS)}", param_hint="--network")
    console = Console()
    studied = read_data(console, data)
    bind(out / "accuracy.of", studied.task, out.glob("*/scores.json"))
    runs = [Run(name, seed, steps, rate) for seed in range(seeds) for name in names]
    left = [run for run in runs if not (out / run.folder / "scores.json").exists()]
    console.print(
        f"{studied.task.name}: {len(studied.training)} cases to train on, {len(studied.held_out)} held out; "
        f"{len(runs)} runs of {steps} steps, {len(left)} of them to do, {jobs} at a time, into {out}"
    )
    if left:
        execute_all(console, left, studied, out, min(jobs, os.cpu_count() or 1))
    report(console, studied, out)


if __name__ == "__main__":
    typer.run(main)
