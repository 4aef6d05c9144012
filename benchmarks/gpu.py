"""Everything there is to know of a card, by one command: ``python -m benchmarks.gpu [FOLDER]``.

At most 8 minutes, without a network. Writes <card>.md, and the run as <card>.json, into the folder,
docs/benchmarks unless told otherwise: first what contradicts the predictions of docs/performance.md; the
tests on the card, with compute-sanitizer where it is; the demo's training; then a copy's bandwidth, relu,
the reference eager and compiled, attention in windows, and both GPU backends, forward and backward, at
ranks 1 to 8; whole networks, eager and compiled, beside MONAI's; the bounds of numbers.py. What fails is a
line of the report, and the rest goes on. How it is measured is README.md's.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

import factorizer_kernels as fk
from factorizer.segmentation.measure import versions

from . import test_networks, test_numbers
from .harness import (
    DEVICE,
    EFFORTS,
    Case,
    Contender,
    Effort,
    Measurement,
    Under,
    cases,
    extent,
    matmul_precision,
    race,
    ratio,
)
from .operators import COMPILED, COPY, REFERENCE, RELU, WINDOW_ATTENTION, Windows
from .report import FOLDER, _replace, number_lines, page, summary_lines, table

COMMAND = "python -m benchmarks.gpu"
MOST_SECONDS = 400  # after that no other group begins
ROOT = Path(__file__).parents[1]
EFFORT = replace(EFFORTS["default"], name="gpu", seconds=0.5, fewest_rounds=5, most_rounds=51)


# Multiples of relu on the same card. CUDA's were measured on an H100; Triton's are predicted for its kernels,
# without the host's time (docs/performance.md).
PREDICTED = {
    ("swin_nmf, 128x128x128, rank 1, forward", "cuda"): 1.9,
    ("swin_nmf, 128x128x128, rank 1, forward+backward", "cuda"): 3.1,
    ("swin_nmf, 128x128x128, rank 1, forward", "triton"): 1.5,
    ("swin_nmf, 128x128x128, rank 1, forward+backward", "triton"): 2.1,
}
PREDICTED_WITHIN = 1.3


class Part(NamedTuple):
    """A command of its own process: its name in the report, its words, and the seconds that it may take."""

    name: str
    words: tuple[str, ...]
    seconds: float


# Of the tests those that compile little: all of them take Triton minutes, in several processes too.
TESTS = (
    "test_swin_nmf_rank1 or test_special_maps or test_graph or test_a_training_step or test_choice "
    "or test_forked or test_sanitizer or test_float32 or test_half_types"
)
PROCESSES = "8"
# Before the races: what is wrong need not be timed.
PARTS = (
    Part(
        "tests on the card",
        ("-m", "pytest", "-v", "-n", PROCESSES, "tests/factorizer_kernels/gpu", "-k", TESTS),
        120,
    ),
    Part("the demo's training", ("-m", "factorizer", "demo", "--steps", "30", "--out", "{scratch}/demo"), 60),
)


def failed_tests(output: str) -> list[str]:
    """What failed, as pytest says it while its tests run: of one that was stopped there is no summary."""
    found = re.findall(r"^\[gw\d+\] \[ *\d+%\] ((?:FAILED|ERROR) \S.*?)\s*$", output, re.MULTILINE)
    return list(dict.fromkeys(found))


def ran(part: Part, scratch: Path) -> tuple[bool, str]:
    """Whether it went well, and a line on it: seconds, its last words, and the tests that failed."""
    words = [sys.executable, *(word.format(scratch=scratch) for word in part.words)]
    start = time.monotonic()
    try:
        running = subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return False, f"{part.name}: {error}"
    state = ""
    try:
        output = running.communicate(timeout=part.seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)  # with its workers, which hold the card
        output = running.communicate()[0]
        state = f"stopped after {part.seconds:g} s, "
    except BaseException:  # it has a terminal's Ctrl-C to itself
        os.killpg(running.pid, signal.SIGKILL)
        raise
    if running.returncode and not state:
        state = f"exit status {running.returncode}, "
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = "; ".join([lines[-1] if lines else "no output", *failed_tests(output)])
    return running.returncode == 0, f"{part.name}: {state}{time.monotonic() - start:.0f} s; {last}"


def contradictions(records: list[dict[str, Any]]) -> list[str]:
    """A line for each time that is further from its prediction than that claims to be near."""
    lines = []
    for record in records:
        predicted = PREDICTED.get((record["group"], record["name"]))
        measured = record["extra_info"].get("x_relu")
        if predicted is None or measured is None:
            continue
        if not predicted / PREDICTED_WITHIN <= measured <= predicted * PREDICTED_WITHIN:
            where = f"{record['group']}, {record['name']}"
            lines.append(f"{where}: {measured:.2f} times relu, predicted {predicted:.1f}")
    return lines


def on(backend: str) -> Contender:
    """The operator on one backend, by its name."""
    return Contender(backend, lambda problem, effort: Under(backend, problem.function()), backend)


class InBfloat16(torch.nn.Module):
    """A network under autocast."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return self.network(x)


def changed(contender: Contender, name: str, change: Callable[[torch.nn.Module], Any]) -> Contender:
    """A network run otherwise; its results are not compared with those in float64."""
    return Contender(
        f"{contender.name}, {name}",
        lambda problem, effort: change(contender.build(problem, effort)),
        modes=contender.modes,
    )


def all_cases() -> Iterable[Case]:
    """The most telling first."""
    yield from test_numbers.cases_of("default")
    backends = (on("cuda"), on("triton"), RELU, COPY)
    for side in (64, 128):
        size = (1, 32, side, side, side)
        others = (REFERENCE, COMPILED, WINDOW_ATTENTION) if side == 64 else (WINDOW_ATTENTION,)
        yield from cases("swin_nmf", [(f"{extent(side)}, rank 1", Windows(size))], (*backends, *others))
    names = ("ours", "SegResNet", "DynUNet", "SwinUNETR")
    networks = [c for c in test_networks.CONTENDERS if c.name in names]
    compiled = [changed(c, "compiled", torch.compile) for c in networks[:2]]  # each takes a minute or so
    in_bfloat16 = [changed(c, "bfloat16", InBfloat16) for c in networks]
    for side, contenders in ((64, networks), (128, [*networks, *in_bfloat16, *compiled])):
        volume = [(extent(side), test_networks.Volume(side))]
        yield from cases("network", volume, contenders, ("forward", "training step"))
    half = Windows((1, 32, 128, 128, 128), dtype=torch.bfloat16)
    yield from cases("swin_nmf", [("128x128x128, rank 1, bfloat16", half)], backends)
    for rank in (2, 4, 8):
        for side in (64, 128):
            problem = Windows((1, 32, side, side, side), rank=rank)
            yield from cases("swin_nmf", [(f"{extent(side)}, rank {rank}", problem)], backends)


def volumes_moved(problem: Windows, mode: str, backend: str) -> float | None:
    """What a call must move, in volumes of x; docs/cuda.md and docs/triton.md count it. None: not counted."""
    copies, matrix = len(problem.shifts), problem.head_dim * problem.columns
    factors = copies * problem.rank * (problem.head_dim + problem.columns) / matrix
    factors *= 4 / problem.dtype.itemsize  # they are float32
    forward = 2 + (2 * factors if copies > 1 else 0)
    if mode == "forward":
        return forward
    if backend == "cuda" and problem.rank == 1 and problem.solver == "hals":
        coefficients = copies * (88 + problem.columns) / matrix * 4 / problem.dtype.itemsize
        return forward + (4 + 2 * coefficients if copies > 1 else 3)
    return forward + 3 * copies + (copies - 1) if problem.dtype == torch.float32 else None


def measured(case: Case, effort: Effort) -> tuple[list[dict[str, Any]], list[str]]:
    """The group's records, as pytest-benchmark stores them, and a line for each contender that has none."""
    # Products of a network's float32 as its convolutions have them by default: of TF32.
    with matmul_precision("high" if case.family == "network" else "highest"):
        results = race(case, effort)
    records, missing = [], []
    for name, result in results.items():
        if isinstance(result, BaseException):
            why = (str(result).strip() or repr(result)).splitlines()[0]
            missing.append(f"{case.group}, {name}: {why}")
            continue
        info = {"family": case.family, "label": case.label, **result.info}
        for yardstick in ("relu", "ours"):
            if isinstance(other := results.get(yardstick), Measurement):
                info[f"x_{yardstick}"] = ratio(result, other)
        if isinstance(case.problem, Windows) and name in ("cuda", "triton"):
            info["volumes_moved"] = volumes_moved(case.problem, case.mode, name)
        first, _, third = quantiles(result.seconds, n=4)
        stats = {"median": median(result.seconds), "iqr": third - first, "rounds": len(result.seconds)}
        records.append({"name": name, "group": case.group, "stats": stats, "extra_info": info})
    return records, missing


def bandwidth_lines(records: list[dict[str, Any]]) -> list[str]:
    """Bytes that must move over time, against a copy of as many on the same card."""
    copies = {r["extra_info"]["x_bytes"]: r for r in records if r["name"] == "copy"}
    rows = []
    for record in records:
        info = record["extra_info"]
        volumes, copy = info.get("volumes_moved"), copies.get(info.get("x_bytes"))
        if volumes is None or copy is None:
            continue
        speed = volumes * info["x_bytes"] / record["stats"]["median"]
        of_copy = speed / (2 * info["x_bytes"] / copy["stats"]["median"])
        rows.append(
            (record["group"], record["name"], f"{volumes:.2f}", f"{speed / 1e9:.0f}", f"{of_copy:.2f}")
        )
    head = ("group", "backend", "volumes moved", "GB/s", "of the copy's")
    return table(head, rows) if rows else []


def machine_info() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "size": EFFORT.name,
        "backends": {b.name: b.reason for b in fk.backends() if b.available},
        "versions": versions(),
        "python_version": platform.python_version(),
    }


def commit_info() -> dict[str, Any]:
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], capture_output=True, text=True, check=False).stdout.strip()
        except OSError:  # no git
            return ""

    return {"id": git("rev-parse", "HEAD") or "unknown", "dirty": bool(git("status", "--porcelain"))}


def write(run: dict[str, Any], parts: list[str], missing: list[str], folder: Path) -> Path:
    """The page and the run; returns the page's path."""
    records = run["benchmarks"]
    against = contradictions(records) or ["nothing that was measured"]
    lines = ["## Contradicts the predictions\n", *(f"- {line}" for line in against), ""]
    if parts:
        lines += ["## Tests and training\n", *(f"- {line}" for line in parts), ""]
    title, _, body = page(run, (), f"`{COMMAND}`").partition("\n")
    lines = [title, "", *lines, body]
    if rows := bandwidth_lines(records):
        lines += ["## Bandwidth\n", *rows, ""]
    if missing:
        lines += ["## Not measured\n", *(f"- {line}" for line in missing), ""]
    name = re.sub(r"[^a-z0-9]+", "-", run["machine_info"]["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / f"{name}.json", lambda path: path.write_text(json.dumps(run, indent=1)))
    _replace(folder / f"{name}.md", lambda path: path.write_text("\n".join(lines)))
    return folder / f"{name}.md"


def main(groups: Iterable[Case], effort: Effort, folder: Path, parts: Iterable[Part] = ()) -> Path:
    """Run the parts, race the groups, print as they come, write the page.

    The page is written anew after each group, so that one that never ends leaves what came before it.
    """
    start = time.monotonic()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            lines.append(ran(part, Path(scratch))[1])
            print(lines[-1], flush=True)
    run: dict[str, Any] = {
        "datetime": datetime.now(timezone.utc).isoformat(), "machine_info": machine_info(),
        "commit_info": commit_info(), "benchmarks": [],
    }  # fmt: skip
    missing = []
    for case in groups:
        if time.monotonic() - start > MOST_SECONDS:
            missing.append(f"{case.group}: no time was left")
            continue
        try:
            records, without = measured(case, effort)
        except Exception as error:  # a group that cannot even be set up hides no other
            records, without = [], [f"{case.group}: {str(error).strip() or repr(error)}".splitlines()[0]]
        run["benchmarks"] += records
        missing += without
        for line in (*summary_lines(records), *without):
            print(line, flush=True)
        write(run, lines, missing, folder)
    print("Contradicts the predictions:", *(contradictions(run["benchmarks"]) or ["nothing"]), sep="\n  ")
    if run["benchmarks"]:
        for line in (*number_lines(run["benchmarks"]), *bandwidth_lines(run["benchmarks"])):
            print(line)
    path = write(run, lines, missing, folder)
    print(path)
    return path


if __name__ == "__main__":
    if DEVICE.type != "cuda":
        built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
        sys.exit(f"benchmarks.gpu needs a CUDA device, and torch sees none ({built})")
    main(all_cases(), EFFORT, Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER, PARTS)
