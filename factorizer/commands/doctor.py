"""factorizer doctor: what is installed here, what runs, whether it is right, and how fast it is."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

import factorizer_kernels as fk
from factorizer.segmentation.measure import side_by_side, versions
from factorizer.segmentation.screen import facts, table

ROUNDS, ENOUGH = 5, 2.0  # calls that are timed, and seconds after which fewer must do
# Float32 sums over a window's 512 voxels, and the gradient of five iterations that amplifies their
# errors: far above what a right kernel shows (about 1e-6), far below what a wrong one does.
TOLERANCE = 1e-4


def doctor(console: Console) -> bool:
    """Prints versions, devices and backends, and checks each usable backend against the reference in
    float64, value and gradient, and its time against a ReLU. Returns whether all of them are right."""
    about = {"python": f"{platform.python_version()} on {platform.platform()}"}
    about |= {package: version or "not installed" for package, version in versions().items()}
    about["processors"] = f"{os.cpu_count()}, of which torch uses {torch.get_num_threads()}"
    about["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "not set")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        about[f"cuda:{index}"] = f"{properties.name}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
    if not torch.cuda.is_available():
        about["cuda"] = "torch sees no CUDA device"
    console.print(facts("Installed", about))

    usable = table("Backends", "name", "usable", "why", texts=3)
    for backend in fk.backends():
        usable.add_row(backend.name, "yes" if backend.available else "no", backend.reason)
    console.print(usable)

    rows = table("Right, and how fast", "backend", "value", "gradient", "forward", "a ReLU")
    right = True
    for backend in fk.backends():
        device = _device_of(backend.name)
        if not backend.available or device is None:
            continue
        try:
            value, gradient = _errors(backend.name, device)
            milliseconds, relu = _times(backend.name, device)
        except Exception as error:  # any exception here is a result of the test
            right = False
            rows.add_row(backend.name, f"FAILS: {type(error).__name__}: {error}")
            continue
        # Not the larger of both: what is not a number is not the larger one.
        right = right and value < TOLERANCE and gradient < TOLERANCE
        errors = [f"{error:.0e}{'' if error < TOLERANCE else ' WRONG'}" for error in (value, gradient)]
        rows.add_row(backend.name, *errors, f"{milliseconds:.1f} ms", f"{relu:.1f} ms")
    console.print(rows)
    console.print(
        "value, gradient: relative error of swin_nmf in float32, against the reference in float64; of torch, "
        "which has none, of linear_norm_mlp.\n"
        "forward: median time for x (1, 32, 64, 64, 64).\n"
        "a ReLU: the same for relu(x), in turn with it; slower into fresh memory."
    )
    told = ("All usable backends are right.", "green") if right else ("A backend is wrong.", "red")
    console.print(Text(*told))
    return right


def _device_of(backend: str) -> str | None:
    """Where a backend can be tried here; None for Triton's interpreter, which is too slow for it."""
    if backend in ("cpu", "reference"):
        return "cpu"
    if backend == "torch" or torch.cuda.is_available():
        return "cuda" if torch.cuda.is_available() else "cpu"
    return None


def _swin_nmf(x: Tensor, u0: Tensor, v0: Tensor) -> Tensor:
    return fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8, shifts=[None, 4])


def _linear_norm_mlp(x: Tensor, *weights: Tensor) -> Tensor:
    return fk.linear_norm_mlp(x, x, *weights)


def _problem(backend: str, device: str, size: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """What a backend is tried with, x and what belongs to it: swin_nmf, or what "torch" has in its place."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, size, size, size, generator=generator)
    if backend == "torch":
        function: Callable[..., Tensor] = _linear_norm_mlp
        shapes = ((32, 32), (32,), (32,), (32,), (64, 32), (64,), (32, 64), (32,))
        others = [torch.randn(shape, generator=generator) / 8 for shape in shapes]
    else:
        function = _swin_nmf
        others = [torch.rand(n, 1, generator=generator) for n in (8, 512)]
    return function, [t.to(device) for t in (x, *others)]


def _errors(backend: str, device: str) -> tuple[float, float]:
    """Relative errors of value and gradient of a small case."""
    results = []
    function, tensors = _problem(backend, device, 16)
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        x, *others = (t.to(dtype) for t in tensors)
        x = x.detach().requires_grad_()
        with fk.use_backend(name):
            y = function(x, *others)
            (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach().double(), gradient.double()))
    (value, exact_value), (gradient, exact_gradient) = zip(*results, strict=True)
    return (
        float((value - exact_value).norm() / exact_value.norm()),
        float((gradient - exact_gradient).norm() / exact_gradient.norm()),
    )


def _times(backend: str, device: str) -> tuple[float, float]:
    """Median milliseconds of the operator and of relu, each round one call of each."""
    function, tensors = _problem(backend, device, 64)

    def ours() -> None:
        with fk.use_backend(backend):
            function(*tensors)

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = side_by_side(
        {"ours": ours, "relu": lambda: torch.relu(tensors[0])}, ROUNDS, wait=wait, enough=ENOUGH
    )
    return times["ours"], times["relu"]
