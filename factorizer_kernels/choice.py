"""What is usable here, what is chosen, and why."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from factorizer_kernels.shared import cuda, native, registry


class Backend(NamedTuple):
    """One backend: its name, whether it can be used here, and the reason in a sentence."""

    name: str
    available: bool
    reason: str


# Triton is optional. Its kernels are registered here and compiled, one by one, at their first launch.
try:
    from factorizer_kernels.ops.swin_nmf import triton as _  # noqa: F401  (registers, as do its imports)
    from factorizer_kernels.shared.triton import INTERPRETED as _TRITON_INTERPRETED
except ImportError as _error:
    _TRITON_MISSING: str | None = str(_error)
    _TRITON_INTERPRETED = False
else:
    _TRITON_MISSING = None

# In the order of preference for the tensors that they serve.
_DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}

_choice = threading.local()


def backends() -> tuple[Backend, ...]:
    """Every backend of this installation, usable or not, with the reason."""
    return tuple(probe() for probe in _PROBES.values())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators that this thread calls inside on the backend ``name``, and on no other.

    Args:
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        TypeError: name is not a string.
        ValueError: there is no backend of that name, or it cannot be used here (the message says why).
            An operator called inside raises ValueError where the backend does not serve its tensors.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name not in _PROBES:
        raise ValueError(f"name must be one of {tuple(_PROBES)}, got {name!r}")
    backend = _PROBES[name]()  # and no other: to ask for the CPU touches no GPU
    if not backend.available:
        raise ValueError(f"backend {name!r} cannot be used here: {backend.reason}")
    previous = getattr(_choice, "name", None)
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = previous


def choose(operator: str, x: Tensor, matrices: registry.Matrices | None = None) -> str:
    """The backend that runs ``operator`` on x, cut into ``matrices`` to be factorised.

    That of :func:`use_backend`, else the first that serves x. On an empty x there is nothing to launch:
    plain PyTorch gives the empty result.
    """
    name = getattr(_choice, "name", None)
    if name not in (None, "reference") and (obstacle := _obstacle(name, operator, x, matrices)):
        others = [b for b in _DEVICES if _obstacle(b, operator, x, matrices) is None]
        raise ValueError(
            f"backend {name!r} does not run {operator} here: {obstacle}; "
            f"leave the choice open, or take one of {(*others, 'reference')}"
        )
    if x.numel() == 0:
        return "reference"
    return name or next((b for b in _DEVICES if _obstacle(b, operator, x, matrices) is None), "reference")


def _obstacle(backend: str, operator: str, x: Tensor, matrices: registry.Matrices | None) -> str | None:
    """Why the backend does not run the operator on x; None where it does."""
    chosen = getattr(_choice, "name", None) == backend
    interpreted = backend == "triton" and chosen and _TRITON_INTERPRETED and x.device.type == "cpu"
    if x.device.type != _DEVICES[backend] and not interpreted:
        return f"x is on {x.device}"
    return registry.not_served(operator, backend, x, matrices)


def _cpu() -> Backend:
    if native.missing is not None:
        reason = f"the compiled module is missing ({native.missing}): reinstall with a C++17 compiler"
        return Backend("cpu", False, reason)
    return Backend("cpu", True, f"C++ kernels for {native.native.isa()}")


def _triton() -> Backend:
    if _TRITON_MISSING is not None:
        return Backend("triton", False, f"Triton is missing ({_TRITON_MISSING}): pip install triton")
    if _TRITON_INTERPRETED:
        words = "interpreted, on CPU tensors and only by choice (TRITON_INTERPRET=1): for tests"
        return Backend("triton", True, words)
    if (reason := _without_device()) is not None:
        return Backend("triton", False, reason)
    return Backend("triton", True, f"Triton {version('triton')}, compiled at the first launch")


def _cuda() -> Backend:
    if (reason := cuda.missing) is not None:
        return Backend("cuda", False, reason)
    if (reason := _without_device()) is not None:
        return Backend("cuda", False, reason)
    if (reason := cuda.without_code(torch.cuda.current_device())) is not None:
        return Backend("cuda", False, reason)
    architectures = cuda.native.cuda_architectures()
    return Backend("cuda", True, f"C++ kernels for the compute capabilities {architectures}")


def _without_device() -> str | None:
    """Why there is no CUDA device here, or None where there is one."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.cuda.current_device()
    except RuntimeError as error:  # in a process forked off one that uses the GPU, for example
        return f"CUDA does not start ({error})"
    return None


def _reference() -> Backend:
    return Backend("reference", True, "plain PyTorch, on any device")


_PROBES = {"cuda": _cuda, "triton": _triton, "cpu": _cpu, "reference": _reference}
