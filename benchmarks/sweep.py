"""Where the NMF kernels lose to plain PyTorch: ``python -m benchmarks.sweep``.

Walks a grid of batch, M, N, rank, solver, iterations, shared and own factors, forward and backward: first the
named points, then the rest of the grid in an order drawn from the seed, as far as the time goes. At every
point the kernels' result is checked against float64; then they and the reference run in turn in one process.
Prints a line for every point at which the reference over ours is below `--show`, a summary by rank, and how
many of the points below 1 the open choice leaves to the kernels all the same.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console

from factorizer_kernels.choice import choose
from factorizer_kernels.ops.nmf.spec import MatrixSizes

from .harness import EFFORTS, Case, Contender, Measurement, Under, race, ratio
from .operators import REFERENCE, Matrices

EFFORT = replace(EFFORTS["default"], name="sweep", seconds=0.1, fewest_rounds=5, most_rounds=21, longest=4)
MOST_OPERATIONS = 1e11  # of a point's forward
MOST_BYTES = 2**29  # of x; the reference's backward keeps some dozen times as much
CPU = Contender("cpu", lambda problem, effort: Under("cpu", problem.function()), "cpu")

GRID = {
    "batch": (1, 2, 16, 256),
    "rows": (1, 8, 64, 256, 1024),
    "columns": (32, 256, 1024, 4096, 65536, 2**20),
    "rank": (1, 2, 4, 8, 16, 64, 128),
    "solver": ("mu", "hals"),
    "num_iters": (1, 6),
    "own_factors": (False, True),
    "mode": ("forward", "forward+backward"),
}


@dataclass(frozen=True)
class Point:
    """One problem and one mode of it."""

    batch: int
    rows: int
    columns: int
    rank: int
    solver: str = "mu"
    num_iters: int = 6
    own_factors: bool = False
    mode: str = "forward"

    def __str__(self) -> str:
        factors = "own" if self.own_factors else "shared"
        return (
            f"{self.batch:4} x {self.rows:4} x {self.columns:7}, rank {self.rank:3}, {self.solver:4}, "
            f"{self.num_iters} iterations, {factors:6} factors, {self.mode}"
        )

    def affordable(self) -> bool:
        """Whether both contenders can run it within seconds, and within some GiB."""
        size = self.batch * self.rows * self.columns
        sides = self.batch * (self.rows + self.columns)
        updates = 4 * size * self.rank + 4 * sides * self.rank**2
        if self.solver == "hals":  # the reference goes through its columns one by one, a call for each pair
            updates += 100 * sides * self.rank**2
        operations = self.num_iters * updates * (1 if self.mode == "forward" else 4)
        kept = 4 * (size + 10 * self.num_iters * sides * self.rank)
        return operations <= MOST_OPERATIONS and kept <= MOST_BYTES

    def chosen(self) -> str:
        """The backend that runs it where none is named."""
        x = torch.empty(self.rows, self.columns, requires_grad=self.mode != "forward")
        return choose(
            "nmf", x, MatrixSizes(self.rows, self.columns, self.rank, 1, self.num_iters, self.solver)
        )

    def race(self) -> float:
        """The reference's time over ours; raises what either of them ended with."""
        problem = Matrices(
            (self.batch, self.rows, self.columns), self.rank, self.num_iters, self.solver, torch.float32,
            self.own_factors,
        )  # fmt: skip
        case = Case("nmf", str(self), self.mode, problem, (CPU, REFERENCE))
        ours, reference = race(case, EFFORT).values()
        for result in (ours, reference):
            if not isinstance(result, Measurement):
                raise result
        return ratio(reference, ours)


NAMED = tuple(
    Point(1, rows, columns, rank, "mu", 6, own, mode)
    for (rows, columns), rank, own, mode in product(
        ((512, 4096), (256, 4096), (256, 1024)), (16, 64), (False, True), GRID["mode"]
    )
)


def grid(seed: int) -> list[Point]:
    points = [Point(*values) for values in product(*GRID.values())]
    random.Random(seed).shuffle(points)
    return [point for point in points if not (point.batch == 1 and point.own_factors)]


def walk(seed: int, seconds: float) -> Iterator[tuple[Point, float | BaseException]]:
    end = time.monotonic() + seconds
    for point in (*NAMED, *grid(seed)):
        if time.monotonic() > end:
            return
        if point.affordable():
            try:
                yield point, point.race()
            except BaseException as error:  # pytest's outcomes are none of Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                yield point, error


def main(
    seconds: Annotated[float, typer.Option(help="How long to walk.")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="Of torch and of the kernels.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the order of the grid's points.")] = 0,
    show: Annotated[float, typer.Option(help="Print the points whose ratio is below.")] = 1.0,
) -> None:
    torch.set_num_threads(threads)
    console = Console(soft_wrap=True, highlight=False)
    ratios: dict[tuple[int, str], list[float]] = defaultdict(list)
    failed = lost = 0
    for point, result in walk(seed, seconds):
        if isinstance(result, BaseException):
            failed += 1
            console.print(f"failed  {point}: {(str(result).strip() or repr(result)).splitlines()[0]}")
            continue
        ratios[point.rank, point.mode].append(result)
        chosen = point.chosen()
        lost += result < 1 and chosen != "reference"
        if result < show or point in NAMED:
            console.print(f"{result:6.2f}  {point}, chosen: {chosen}")
    console.print(f"\nreference over ours, {threads} threads: rank, mode: points, below 1, least, median")
    for (rank, mode), values in sorted(ratios.items()):
        below = sum(value < 1 for value in values)
        console.print(
            f"{rank:4} {mode:17} {len(values):4} {below:4} {min(values):6.2f} {median(values):6.2f}"
        )
    console.print(f"{lost} points below 1 at which the choice is not the reference")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
