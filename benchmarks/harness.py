"""How a group of contenders is checked, raced and measured.

A :class:`Case` is one group: one problem, one mode, several contenders. :func:`race` builds them all,
checks those that claim to compute our operator against float64, warms them up, and then lets them run in
turn, round after round, so that whatever else the machine does slows all alike. A contender that is wrong,
unavailable or hopeless here ends as the exception that says so.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import factorizer_kernels as fk

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FUSED = "fused"  # stands for the backends with kernels for that device, as the choice takes them
SHORTEST_SAMPLE = 2e-3  # seconds: briefer calls are repeated within one sample
SLOW = 1.0  # seconds: the first of such calls is taken as it is
GRAPH_BELOW = 1e-3  # seconds: on a GPU, briefer calls are replayed from a CUDA graph

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Effort:
    """How large and how long: the meaning of ``--size``."""

    name: str
    seconds: float  # a contender's share of its group's time
    fewest_rounds: int
    most_rounds: int
    operations: float  # a contender that would need more in one forward is left out,
    longest: float  # and so is one whose call takes more seconds


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("tiny", 0.0, 2, 2, 1e9, 60),
        Effort("default", 0.5, 3, 41, 2e11 if DEVICE.type == "cpu" else 2e13, 8),
        Effort("paper", 5.0, 5, 101, 5e12 if DEVICE.type == "cpu" else 5e14, 300),
    )
}


def affordable(effort: Effort, operations: float) -> None:
    """Skips a contender that would need too many in one call."""
    if operations > effort.operations:
        pytest.skip(f"{operations:.0e} operations a call: too many for --size {effort.name}")


class Problem(Protocol):
    """What all the contenders of a group are given."""

    def input(self) -> Tensor:
        """The same x for every contender."""

    def check(self, function: Function, mode: str) -> None:
        """Raises AssertionError where the function's result is not the float64 reference's."""

    def describe(self, function: Function) -> dict[str, Any]:
        """Facts beside time and memory."""


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    ``build(problem, effort)`` returns a function of x, or skips with a reason. ``backend`` names the
    backend that it must run on; such a contender computes our operator, and its result is checked.
    ``options`` replace fields of the group's problem.
    """

    name: str
    build: Callable[[Any, Effort], Function]
    backend: str | None = None
    modes: tuple[str, ...] = ("forward", "forward+backward", "training step")
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One group: the table of pytest-benchmark that its contenders share."""

    family: str
    label: str
    mode: str
    problem: Problem
    contenders: tuple[Contender, ...]

    @property
    def group(self) -> str:
        return f"{self.family}, {self.label}, {self.mode}"


@dataclass
class Measurement:
    """One contender's samples, in seconds per call, and what else was seen."""

    call: Callable[[], Any]
    loops: int
    info: dict[str, Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def spent(self) -> float:
        return sum(self.seconds) * self.loops

    def sample(self) -> None:
        self.seconds.append(timed(self.call, self.loops))


def cases(
    family: str,
    problems: Iterable[tuple[str, Problem]],
    contenders: Iterable[Contender],
    modes: Iterable[str] = ("forward", "forward+backward"),
) -> list[Case]:
    """A group for every labelled problem and mode, with the contenders that have the mode."""
    contenders = tuple(contenders)
    return [
        Case(family, label, mode, problem, tuple(c for c in contenders if mode in c.modes))
        for label, problem in problems
        for mode in modes
    ]


def extent(side: int, axes: int = 3) -> str:
    return "x".join([str(side)] * axes)


# --- the race ------------------------------------------------------------------------------------


def race(case: Case, effort: Effort) -> dict[str, Measurement | BaseException]:
    """Every contender's measurement, or the failure or skip that it ended with."""
    results = {contender.name: _enter(case, contender, effort) for contender in case.contenders}
    running = {name: r for name, r in results.items() if isinstance(r, Measurement)}
    gc.collect()
    for round_ in range(effort.most_rounds):
        for name, measurement in list(running.items()):
            # Two samples at least, and the fewest rounds unless those would take three shares.
            shares = measurement.spent / effort.seconds if effort.seconds else 0.0
            if round_ < 2 or shares < (3 if round_ < effort.fewest_rounds else 1):
                try:
                    measurement.sample()
                except Exception as error:  # it ends here, the others go on
                    results[name] = error.with_traceback(None)
                    running.pop(name).call = _nothing
    for measurement in running.values():
        measurement.call = _nothing  # and with it the contender's memory
    return results


def _nothing() -> None: ...


def _enter(case: Case, contender: Contender, effort: Effort) -> Measurement | BaseException:
    """The contender, checked, warmed up and ready to run."""
    try:
        problem = replace(case.problem, **contender.options)
        x = problem.input()
        if case.mode != "forward":  # which takes about three times as many
            effort = replace(effort, operations=effort.operations / 3)
        function = contender.build(problem, effort)
        seconds, peak = first(MODES[case.mode](function, x))
        if seconds > effort.longest:
            pytest.skip(f"one call takes {seconds:.0f} s: too long for --size {effort.name}")
        info: dict[str, Any] = {"mode": case.mode, "device": DEVICE.type}
        if contender.backend is not None:
            info["backend"] = assert_backend(function, x, contender.backend)
            problem.check(function, case.mode)
        info |= problem.describe(function)
        if case.mode == "forward+backward":
            info["kept_bytes"] = kept_bytes(function, x)
        call = MODES[case.mode](function, x)  # the check may have changed a module's mode
        if seconds < SLOW:  # what the first call alone prepares counts for little in a slow one
            seconds, peak = first(call)
        info["peak_bytes"] = peak
        if DEVICE.type == "cuda" and seconds < GRAPH_BELOW:
            call = graphed(call)
            info["cuda_graph"] = True
            seconds = timed(call, 10)
        return Measurement(call, max(1, round(SHORTEST_SAMPLE / seconds)), info)
    except ImportError as error:
        return pytest.skip.Exception(f"{error}: pip install '.[bench]'")
    except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:
        return error.with_traceback(None)  # its frames hold tensors


def ratio(of: Measurement, to: Measurement) -> float:
    """Of the medians."""
    return median(of.seconds) / median(to.seconds)


# --- modes: what one call does -------------------------------------------------------------------


def forward(function: Function, x: Tensor) -> Callable[[], Any]:
    if isinstance(function, nn.Module):
        function.eval()

    def call() -> Tensor:
        with torch.no_grad():
            return function(x)

    return call


def forward_backward(function: Function, x: Tensor) -> Callable[[], Any]:
    """y, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    leaves = [x, *parameters(function)]
    dy = None

    def call() -> tuple[Tensor, ...]:
        nonlocal dy
        y = function(x)
        dy = cotangent(y) if dy is None else dy
        return y, *torch.autograd.grad(y, leaves, dy, allow_unused=True)

    return call


def training_step(function: Function, x: Tensor) -> Callable[[], Any]:
    """Forward, Dice and cross-entropy, backward, AdamW: the paper's recipe."""
    assert isinstance(function, nn.Module)
    function.train()
    optimizer = torch.optim.AdamW(function.parameters(), lr=1e-4, weight_decay=1e-2)
    loss = DiceCELoss(sigmoid=True, squared_pred=True)
    label = None

    def call() -> None:
        nonlocal label
        optimizer.zero_grad(set_to_none=True)
        logits = function(x)
        label = (cotangent(logits) > 0).to(x.dtype) if label is None else label
        loss(logits, label).backward()
        optimizer.step()

    return call


MODES = {"forward": forward, "forward+backward": forward_backward, "training step": training_step}


def parameters(function: Function) -> list[nn.Parameter]:
    return list(function.parameters()) if isinstance(function, nn.Module) else []


def cotangent(y: Tensor) -> Tensor:
    """The same gradient of the loss for every result of a shape."""
    generator = torch.Generator(y.device).manual_seed(1)
    return torch.randn(y.shape, generator=generator, device=y.device).to(y)


# --- truth ---------------------------------------------------------------------------------------


def assert_close(result: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Relative L2 distance; a NaN is never close."""
    error = ((result.double() - expected).norm() / expected.norm()).item()
    if not error <= tolerance:
        pytest.fail(
            f"wrong, so not timed: the {what} is {error:.1e} off float64's, allowed is {tolerance:.0e}"
        )


class Under(nn.Module):
    """A function, or a module, that runs its operators on a named backend."""

    def __init__(self, backend: str, function: Function) -> None:
        super().__init__()
        _allowed(backend)
        self.backend, self.function = backend, function

    def forward(self, x: Tensor) -> Tensor:
        with nullcontext() if self.backend == FUSED else fk.use_backend(self.backend):
            return self.function(x)


class _BackendsSeen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "factorizer_kernels":
            self.names.add(args[-1])
        return func(*args, **(kwargs or {}))


def assert_backend(function: Function, x: Tensor, backend: str) -> str:
    """The backend that the operators' calls really went to; the reference calls no operator."""
    with _BackendsSeen() as seen, torch.no_grad():
        function(x)
    names = seen.names or {"reference"}
    used = "+".join(sorted(names))
    if not names <= _allowed(backend):
        pytest.fail(f"ran on the backend {used!r}, not on {' or '.join(sorted(_allowed(backend)))!r}")
    return used


def _allowed(backend: str) -> set[str]:
    """The names that FUSED stands for; any other stands for itself."""
    if backend != FUSED:
        return {backend}
    serves = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}[DEVICE.type]
    candidates = [b for b in fk.backends() if b.name in serves]
    if available := {b.name for b in candidates if b.available}:
        return available | ({"torch"} if DEVICE.type == "cuda" else set())  # what is wide for a tile
    reasons = "; ".join(f"{b.name}: {b.reason}" for b in candidates)
    pytest.fail(f"no backend with kernels serves {DEVICE.type} tensors here ({reasons})")


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- time and memory -----------------------------------------------------------------------------


def timed(call: Callable[[], Any], loops: int) -> float:
    """Seconds per call: by the clock, or on a GPU by events on its current stream."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(loops):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / loops
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def first(call: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds and peak memory of one call."""
    seconds: list[float] = []
    peak = peak_bytes(lambda: seconds.append(timed(call, 1)))
    return seconds[0], peak


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call's launches, captured once: what is then timed is the card and not Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(held: Callable[[], Any] = call) -> None:  # ``held`` are the tensors that the graph reads
        graph.replay()

    return replay


def peak_bytes(call: Callable[[], Any]) -> int | None:
    """What the call takes at most beside what was there before.

    On a GPU what torch's allocator handed out; on Linux resident memory, which the kernel itself keeps the
    peak of; elsewhere None.
    """
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call would be served from what others left behind
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is there
        before = _resident_peak()
    except (OSError, AttributeError):
        return None
    call()
    return max(_resident_peak() - before, 0)


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def kept_bytes(function: Function, x: Tensor) -> int:
    """What autograd keeps for the backward, beside x itself and the parameters."""
    leaf = x.detach().requires_grad_()
    theirs = {t.untyped_storage().data_ptr() for t in (leaf, *parameters(function))}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(leaf)
    del y
    return sum(kept.values())
