"""What a measurement needs: times of things side by side, the peak of memory, the versions."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch

# What results and their speed may depend on.
PACKAGES = ("factorizer-kernels", "torch", "numpy", "triton", "monai", "nibabel", "scipy", "tensorboard")


def side_by_side(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    wait: Callable[[], object] = lambda: None,
    enough: float = math.inf,
) -> dict[str, float]:
    """Median milliseconds of each call, every round making each call in turn.

    So whatever else the machine does slows all alike. A first round, which warms caches and
    allocators, is not counted.

    Args:
        runs: the calls by their names.
        rounds: how often each is made and timed.
        wait: called before and after each, for a device that computes behind the program's back.
        enough: seconds after which one timed round must do.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for round_ in range(rounds + 1):
        if round_ > 1 and time.perf_counter() - begin > enough:
            break
        for name, call in runs.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(1e3 * median(times), 2) for name, times in seconds.items()}


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, on a CUDA GPU or in main memory; None where the system does
    not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(*more: str) -> dict[str, str | None]:
    """The versions of `PACKAGES` and of more of them; None for one that is not installed."""
    return {package: _version(package) for package in (*PACKAGES, *more)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
