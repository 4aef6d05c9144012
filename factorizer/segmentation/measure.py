"""What a measurement needs: times of things side by side, the peak of memory, the versions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from statistics import median

import torch


def side_by_side(runs: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, every round making each call in turn.

    So whatever else the machine does slows all alike. A first round, which warms caches and
    allocators, is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(1e3 * median(times), 2) for name, times in seconds.items()}


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: on the GPU, or in main memory for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed version of each package, or "not installed"."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
