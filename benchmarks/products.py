"""Products of a small matrix with long columns, raced against torch's: ``python -m benchmarks.products``.

The CPU kernels stand on three contractions of contiguous columns: W X, Wᵀ X (the same, with W's strides
swapped) and A Bᵀ. Each runs as a whole on torch's threads, in turn with ``torch.mm`` into memory that is
there, from 4 x 4 to 1024 x 1024. A result is compared with float64's before it is timed. The columns are a
power of two, as a volume's voxels often are: rows then fall into few sets of the cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from factorizer_kernels.shared import native as cpu

SIZES = (4, 8, 16, 32, 64, 128, 256, 512, 1024)
TOLERANCE = 2e-6  # relative L2 distance from float64, of sums of up to 2**20 products of either sign
SAMPLE = 5e-3  # seconds


def multiply(w: Tensor, x: Tensor, y: Tensor) -> None:
    """y (M, N) = w (M, K) x (K, N); w has any strides, the rows of x and y are contiguous."""
    sizes = (1, *w.shape, x.shape[1])
    cpu.native.multiply(
        cpu.DTYPE_CODES[x.dtype], sizes, cpu.memory(w), w.stride(), cpu.memory(x), (0, x.stride(0)),
        cpu.memory(y), (0, y.stride(0)), cpu.threads(),
    )  # fmt: skip


def multiply_by_transpose(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (M, K) = a (M, N) b (K, N)ᵀ; the rows of a and b are contiguous, and out is."""
    sizes = (1, len(a), len(b), a.shape[1])
    cpu.native.multiply_by_transpose(
        cpu.DTYPE_CODES[a.dtype], sizes, cpu.memory(a), (0, a.stride(0)), cpu.memory(b), (0, b.stride(0)),
        cpu.memory(out), cpu.threads(),
    )  # fmt: skip


Call = Callable[[], object]


def problems(size: int, columns: int) -> dict[str, tuple[Call, Call, Tensor]]:
    """By name: our call, torch's, and what ours writes."""
    generator = torch.Generator().manual_seed(size)
    w, x, dy = (torch.randn(size, n, generator=generator) for n in (size, columns, columns))
    y, y_torch = torch.empty(size, columns), torch.empty(size, columns)
    dw, dw_torch = torch.empty(size, size), torch.empty(size, size)
    return {
        "W X": (lambda: multiply(w, x, y), lambda: torch.mm(w, x, out=y_torch), y),
        "Wᵀ X": (lambda: multiply(w.T, x, y), lambda: torch.mm(w.T, x, out=y_torch), y),
        "A Bᵀ": (
            lambda: multiply_by_transpose(dy, x, dw), lambda: torch.mm(dy, x.T, out=dw_torch), dw
        ),
    }  # fmt: skip


def check(size: int, name: str, columns: int, result: Tensor) -> None:
    generator = torch.Generator().manual_seed(size)
    w, x, dy = (torch.randn(size, n, generator=generator).double() for n in (size, columns, columns))
    expected = {"W X": lambda: w @ x, "Wᵀ X": lambda: w.T @ x, "A Bᵀ": lambda: dy @ x.T}[name]()
    error = ((result.double() - expected).norm() / expected.norm()).item()
    if not error <= TOLERANCE:
        raise SystemExit(f"wrong, so not timed: {name} of {size} x {size} is {error:.1e} off float64's")


def seconds(call: Call, loops: int) -> float:
    start = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - start) / loops


def main(
    threads: Annotated[int, typer.Option(min=1, help="Of torch and of the kernels.")] = 1,
    operations: Annotated[
        float, typer.Option(help="Multiply-adds of a product: this sets its columns.")
    ] = 5e7,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each, in turn.")] = 9,
) -> None:
    torch.set_num_threads(threads)
    print(f"{threads} threads; GFLOP/s of ours, and torch's time over ours\n")
    for size in SIZES:
        columns = max(256, min(2**20, 2 ** round(torch.tensor(operations / size**2).log2().item())))
        line = [f"{size:5} x {size:4} x {columns:8}"]
        for name, (ours, theirs, result) in problems(size, columns).items():
            ours()
            check(size, name, columns, result)
            theirs()
            loops = max(1, round(SAMPLE / max(seconds(ours, 1), 1e-7)))
            samples = [(seconds(ours, loops), seconds(theirs, loops)) for _ in range(rounds)]
            best = min(our for our, _ in samples)
            speed = 2e-9 * size * size * columns / best
            line.append(f"{name}: {speed:6.1f} {median(their / our for our, their in samples):5.2f}")
        print("   ".join(line), flush=True)


if __name__ == "__main__":
    typer.run(main)
