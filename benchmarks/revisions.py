"""Two revisions of this project side by side: ``python -m benchmarks.revisions OLD [NEW]``.

Each revision is checked out and installed into build/revisions/COMMIT, which is kept; NEW may be left out for
the files as they are. Each has a process, and the two run every case in turn, call by call, so that whatever
else the machine does slows both. Prints the old time over the new one, the median of the rounds and that of
the fewest milliseconds. What one of them cannot run, or where their results differ, is told in words and gets
no number.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
HOME = ROOT / "build" / "revisions"
SAME = 1e-3  # relative difference of results that are called the same; single precision
# What is compared, without the backward and with it.
RESULTS = {False: ("the results",), True: ("the gradients of x", "the gradients of the parameters")}
HERE = "."  # the files as they are
RUN = "import runpy, sys; runpy.run_path(sys.argv[1])['work'](int(sys.argv[2]))"


# --- the cases, which run on either revision ---------------------------------------------------


def _swin_nmf(**options: Any) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    import factorizer_kernels as fk

    rank = options.pop("rank", 1)
    options = {"head_dim": 8, "patch_size": 8, "shifts": (None, 4), **options}
    factors = torch.rand(8, rank), torch.rand(512, rank)
    return lambda x: fk.swin_nmf(x, *factors, **options), [torch.randn(1, 32, 64, 64, 64)]


def _nmf(rows: int, columns: int, rank: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    import factorizer_kernels as fk

    factors = torch.rand(rows, rank), torch.rand(columns, rank)
    return lambda x: fk.nmf(x, *factors, num_iters=6, solver="mu"), [torch.rand(1, rows, columns)]


def _block(channels: int, size: int) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    from factorizer import FactorizerBlock, SWMatricize

    windows = (SWMatricize, {"head_dim": 8, "patch_size": 8})
    block = FactorizerBlock(channels, (size,) * 3, reshape=windows)
    return block, [torch.randn(1, channels, size, size, size), *block.parameters()]


def _network(name: str, size: int, batch: int = 1) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    from factorizer import preset

    network = preset(name)
    return network, [torch.randn(batch, 4, size, size, size), *network.parameters()]


CASES: dict[str, Callable[[], tuple[Callable[..., Any], list[torch.Tensor]]]] = {
    "swin_nmf, 32 x 64^3, rank 1": lambda: _swin_nmf(),
    "swin_nmf, 32 x 64^3, rank 4": lambda: _swin_nmf(rank=4),
    "nmf, 512 x 4096, rank 64": lambda: _nmf(512, 4096, 64),
    "nmf, 256 x 4096, rank 16": lambda: _nmf(256, 4096, 16),
    "FactorizerBlock, 32 x 64^3": lambda: _block(32, 64),
    "FactorizerBlock, 128 x 16^3": lambda: _block(128, 16),
    "swin-brats, 64^3": lambda: _network("swin-brats", 64),
    "swin-brats, 64^3, batch 2": lambda: _network("swin-brats", 64, 2),
}


def work(threads: int) -> None:
    """Answers lines of (case, backward) with lines of (seconds, two sums of each result), or the error."""
    torch.set_num_threads(threads)
    prepared: dict[str, Any] = {}
    for line in sys.stdin:
        name, backward = json.loads(line)
        try:
            if name not in prepared:
                prepared.clear()
                torch.manual_seed(0)
                prepared[name] = CASES[name]()
            call, (x, *parameters) = prepared[name]
            answer: Any = _timed(call, x, parameters, backward)
        except Exception as error:  # an old revision may lack what the case needs, in any way
            answer = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), flush=True)


def _timed(
    call: Callable[..., Any], x: torch.Tensor, parameters: list[torch.Tensor], backward: bool
) -> list[Any]:
    """Seconds, and two sums of each of RESULTS: the parameters' gradients count as one."""
    start = time.perf_counter()
    if backward:
        x.requires_grad_()
        own, *others = torch.autograd.grad(call(x).square().mean(), [x, *parameters])
        results = [[own], others] if others else [[own]]
    else:
        with torch.no_grad():
            results = [[call(x.detach())]]
    seconds = time.perf_counter() - start
    return [seconds, *map(_sums, results)]


def _sums(tensors: Sequence[torch.Tensor]) -> list[float]:
    flat = [tensor.flatten().double() for tensor in tensors]
    return [
        sum(float(f.square().sum()) for f in flat) ** 0.5,
        sum(float(f @ torch.linspace(-1, 1, len(f), dtype=f.dtype)) for f in flat),
    ]


# --- the race ----------------------------------------------------------------------------------


def install(revision: str, console: Console) -> tuple[str, Path]:
    """The name of a revision, and the folder that its packages are in."""
    if revision == HERE:
        return "the files as they are", ROOT
    commit = _git("rev-parse", "--short", f"{revision}^{{commit}}")
    folder, source = HOME / commit / "packages", HOME / commit / "source"
    if not folder.exists():
        console.print(f"installing {commit} ...")
        if not source.exists():
            _git("worktree", "add", "--detach", str(source), commit)
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{folder}.part"]
        subprocess.run(
            [*command, str(source)], check=True, env={**os.environ, "FACTORIZER_KERNELS_NATIVE": "1"}
        )
        Path(f"{folder}.part").rename(folder)
    return commit, folder


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


class Worker:
    """A process that runs the cases on the packages of a folder."""

    def __init__(self, packages: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            # Not as a script, whose folder has a numbers.py that would stand before Python's.
            [sys.executable, "-c", RUN, __file__, str(threads)],
            cwd=HOME,  # which has no package of that name
            env={**os.environ, "PYTHONPATH": str(packages)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, backward: bool) -> Any:
        """Seconds and two sums of each result, or what went wrong."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([name, backward]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else f"the process ended with exit code {self._process.wait()}"

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def compare(workers: tuple[Worker, Worker], name: str, backward: bool, rounds: int) -> list[str]:
    """The cells of a row: milliseconds of the old one and of the new, and the ratio; or why there is none."""
    warm = [worker.ask(name, backward) for worker in workers]
    for which, answer in zip(("old", "new"), warm, strict=True):
        if isinstance(answer, str):
            return ["", "", f"{which}: {answer.splitlines()[0][:60]}"]
    # Each on a scale of its own: x's gradient is small beside the parameters'.
    for what, *pair in zip(RESULTS[backward], warm[0][1:], warm[1][1:], strict=False):
        scale = max(abs(value) for sums in pair for value in sums)
        for old, new in zip(*pair, strict=True):
            if not abs(old - new) <= SAME * scale:
                return ["", "", f"{what} differ: {old:.6g}, {new:.6g}"]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for k in (0, 1) if number % 2 else (1, 0):
            seconds[k].append(workers[k].ask(name, backward)[0])
    ratio = median(old / new for old, new in zip(*seconds, strict=True))
    low, high = (1e3 * min(s) for s in seconds)
    return [f"{low:.1f}", f"{high:.1f}", f"{ratio:.2f} ({low / high:.2f})"]


def main(
    old: Annotated[str, typer.Argument(help="Revision, such as a tag or a commit.")],
    new: Annotated[str, typer.Argument(help="Another one, or . for the files as they are.")] = HERE,
    rounds: Annotated[int, typer.Option(help="How often each case is timed.")] = 7,
    threads: Annotated[int, typer.Option(help="Threads of each of the two processes, which take turns.")] = 1,
    only: Annotated[str, typer.Option(help="Part of the names of the cases that are run.")] = "",
) -> None:
    """The old time over the new one, for the kernels, a block and whole networks."""
    console = Console()
    HOME.mkdir(parents=True, exist_ok=True)
    (old_name, old_folder), (new_name, new_folder) = (install(r, console) for r in (old, new))
    workers = Worker(old_folder, threads), Worker(new_folder, threads)
    table = Table(title=f"{old_name} over {new_name}; {threads} threads, medians of {rounds}")
    for heading in ("case", "old, ms", "new, ms", "ratio (of the fewest ms)"):
        table.add_column(heading)
    for name in CASES:
        for backward in (False, True) if only in name else ():
            title = f"{name}, {'forward+backward' if backward else 'forward'}"
            cells = compare(workers, name, backward, rounds)
            console.print(title, *cells, soft_wrap=True)
            table.add_row(title, *cells)
    console.print(table)
    for worker in workers:
        worker.close()


if __name__ == "__main__":
    typer.run(main)
