"""factorizer speed: what a trained network loses, and gains in time, with fewer iterations or other ranks."""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from torch import nn

from factorizer.layers import MatrixFactorization, set_num_iters, set_rank
from factorizer.segmentation.cases import Case, find_cases
from factorizer.segmentation.errors import DataError, check_counts
from factorizer.segmentation.evaluation import dice
from factorizer.segmentation.figures import no_mathematics
from factorizer.segmentation.files import atomic, check_own, first_line, prepare_folder
from factorizer.segmentation.inference import Predictor, keep_largest, load_predictor
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.screen import count, each_case, table, tell_warning
from factorizer.segmentation.transforms import PreparedCase
from factorizer.segmentation.volumes import check_image, check_label

COLUMNS = ("varies", "num_iters", "rank", "mean_dice")  # those that a table for any classes begins with


@dataclass(frozen=True)
class Setting:
    """One way to run the network: `varies` names the number that is not the trained one's."""

    varies: str
    num_iters: int
    rank: int
    network: nn.Module

    @property
    def value(self) -> int:
        return self.num_iters if self.varies == "num_iters" else self.rank


@dataclass(frozen=True)
class Result:
    """What a setting gives: mean Dice over cases and targets, and the median seconds of a case."""

    setting: Setting
    dice: float
    per_target: dict[str, float]
    seconds: float


def speed(
    console: Console,
    checkpoint: Path,
    inputs: Sequence[str | Path],
    out: Path,
    *,
    num_iters: Sequence[int],
    ranks: Sequence[int],
    max_cases: int,
    section: str | None = None,
    whole: bool = False,
    device: str | None = None,
) -> tuple[list[Result], int]:
    """Dice and time of a trained network for several numbers of iterations and several ranks.

    Runs on cases with labels: of those that `inputs` name the ones that training held out, where
    there are any, and the first `max_cases` of them. Every case is run in all settings in turn, so what
    else the machine does slows all alike; the time is that of the network alone, without reading.

    Writes out/speed.csv and out/speed.png. Returns the results, and how many cases failed. Raises
    DataError for what cannot be used at all.
    """
    check_counts(
        num_iters=(min(num_iters, default=None), 0), ranks=(min(ranks, default=None), 1), cases=(max_cases, 1)
    )
    if not num_iters and not ranks:
        raise DataError("num-iters, ranks: give numbers for one of them at least")
    predictor = load_predictor([checkpoint], device=device, whole=whole)
    network, plan = predictor.models[0]
    if len(predictor.models) > 1:
        tell_warning(console, f"of the {len(predictor.models)} networks of {checkpoint} the first one is run")
    cases = find_cases(inputs, section, labelled=True)
    cases = (tuple(case for case in cases if case.name in plan.held_out) or cases)[:max_cases]
    if seen := [case.name for case in cases if case.name in plan.training]:
        tell_warning(console, f"the network was trained on cases of these names: {', '.join(seen)}")
    prepare_folder("output", out, (path for case in cases for path in case.files))
    lines, plot = out / "speed.csv", out / "speed.png"
    check_own("output", lines, _is_table, "table of speed")
    # A picture does not tell whose it is: the table, which is written before it, does.
    check_own("output", plot, lambda path: lines.is_file() and _is_table(lines), "picture of speed")
    settings = _settings(network, plan, num_iters, ranks)
    warmed = False

    def work(case: Case) -> list[tuple[list[float], float]]:
        nonlocal warmed
        result = _run_case(predictor, settings, case, warmed)
        warmed = True
        return result

    outcomes = each_case(console, cases, f"{len(settings)} settings", work)
    runs = [outcome.result for outcome in outcomes if outcome.result is not None]
    failed = len(outcomes) - len(runs)
    if not runs:
        return [], failed
    results = []
    for setting, of_cases in zip(settings, zip(*runs, strict=True), strict=True):
        scores, seconds = zip(*of_cases, strict=True)
        means = np.mean(scores, axis=0).tolist()
        per_target = dict(zip(plan.targets, means, strict=True))
        results.append(Result(setting, float(np.mean(means)), per_target, median(seconds)))
    _write(lines, results)
    trained = {"num_iters": plan.network.get("num_iters", 5), "rank": _rank(network)}
    title = f"{plan.task}: {count(len(runs), 'case')}"
    _draw(plot, results, trained, title)
    shown = table(title, "varies", "value", "mean Dice", "seconds a case")
    for result in results:
        setting = result.setting
        shown.add_row(setting.varies, str(setting.value), f"{result.dice:.4f}", f"{result.seconds:.3f}")
    console.print(shown)
    was = ", ".join(f"{name} {value}" for name, value in trained.items())
    console.print(f"trained with {was}; results in {out}", soft_wrap=True)
    return results, failed


def _settings(
    network: nn.Module, plan: Plan, num_iters: Sequence[int], ranks: Sequence[int]
) -> list[Setting]:
    settings = []
    trained = plan.network.get("num_iters", 5)
    for iterations in num_iters:
        changed = copy.deepcopy(network)
        set_num_iters(changed, iterations)
        settings.append(Setting("num_iters", iterations, _rank(network), changed))
    for rank in ranks:
        changed = copy.deepcopy(network)
        set_rank(changed, rank)
        settings.append(Setting("rank", trained, rank, changed))
    return settings


def _rank(network: nn.Module) -> int:
    """The rank of the network's first factorisation."""
    return next(part.rank for part in network.modules() if isinstance(part, MatrixFactorization))


def _run_case(
    predictor: Predictor, settings: Sequence[Setting], case: Case, warm: bool
) -> list[tuple[list[float], float]]:
    """For each setting, in turn, the Dice of each target and the seconds of the network."""
    plan = predictor.plan
    check_image(case, plan.modalities)
    truth = check_label(case, list(plan.labels))
    prepared = PreparedCase(plan, case)
    if not warm:  # the first run warms caches, and is not timed
        predictor.run(settings[0].network, plan, prepared.image)
    results = []
    for setting in settings:
        start = time.perf_counter()
        logits = predictor.run(setting.network, plan, prepared.image)
        seconds = time.perf_counter() - start
        labels = plan.decide(prepared.to_own_grid(logits)).numpy()
        labels = keep_largest(labels, plan, predictor.largest_component)
        scores = [dice(np.isin(labels, v), np.isin(truth, v)) for v in plan.targets.values()]
        results.append((scores, seconds))
    return results


def _is_table(path: Path) -> bool:
    return first_line(path).startswith(",".join((*COLUMNS, "")))


def _write(path: Path, results: Sequence[Result]) -> None:
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        targets = list(results[0].per_target)
        lines.writerow((*COLUMNS, *(f"dice {t}" for t in targets), "seconds"))
        for r in results:
            values = (f"{r.dice:.6f}", *(f"{r.per_target[t]:.6f}" for t in targets), f"{r.seconds:.6f}")
            lines.writerow((r.setting.varies, r.setting.num_iters, r.setting.rank, *values))


def _draw(path: Path, results: Sequence[Result], trained: dict[str, int], title: str) -> None:
    """Dice (left axis) and seconds (right axis) against iterations and against rank."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    groups = [[r for r in results if r.setting.varies == varies] for varies in trained]
    groups = [group for group in groups if group]
    axes = figure.subplots(1, len(groups), squeeze=False)[0]
    for ax, group in zip(axes, groups, strict=True):
        varies = group[0].setting.varies
        places = [r.setting.value for r in group]
        for target in group[0].per_target:
            ax.plot(places, [r.per_target[target] for r in group], "o-", label=target)
        ax.axvline(trained[varies], color="grey", linewidth=1, linestyle=":")
        ax.set(xlabel=f"{varies} (dotted: in training)", ylabel="mean Dice", ylim=(0, 1))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        times = ax.twinx()
        times.plot(places, [r.seconds for r in group], "s--", color="black", label="seconds", alpha=0.6)
        times.set(ylabel="seconds a case (dashed)", ylim=(0, 1.2 * max(r.seconds for r in group)))
    axes[0].legend(loc="lower right", frameon=False)
    figure.suptitle(title)
    no_mathematics(figure)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=140)
