"""What is usable here, what is chosen, and why."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

from factorizer_kernels import _native_cpu, _ops


class Backend(NamedTuple):
    """One backend: its name, whether it can be used here, and the reason in a sentence."""

    name: str
    available: bool
    reason: str


# Triton is optional. Its kernels are registered here and compiled, one by one, at their first launch.
try:
    from factorizer_kernels._triton.launch import INTERPRETED as _TRITON_INTERPRETED
    from factorizer_kernels.swin_nmf import triton as _  # noqa: F401  (registers, as do its imports)
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
    return (_cuda(), _triton(), _cpu(), Backend("reference", True, "plain PyTorch, on any device"))


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
    by_name = {backend.name: backend for backend in backends()}
    if name not in by_name:
        raise ValueError(f"name must be one of {tuple(by_name)}, got {name!r}")
    if not by_name[name].available:
        raise ValueError(f"backend {name!r} cannot be used here: {by_name[name].reason}")
    previous = getattr(_choice, "name", None)
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = previous


def choose(operator: str, x: Tensor) -> str:
    """The backend that runs ``operator`` on x.

    That of :func:`use_backend`, else the first that serves x's device. On an empty x there is nothing
    to launch: plain PyTorch gives the empty result.
    """
    name = getattr(_choice, "name", None)
    interpreted = name == "triton" and _TRITON_INTERPRETED and x.device.type == "cpu"
    if name not in (None, "reference") and not (interpreted or _serves(name, operator, x)):
        raise ValueError(
            f"backend {name!r} has no {operator} for x on {x.device}: "
            "leave the choice open, or take 'reference'"
        )
    if x.numel() == 0:
        return "reference"
    return name or next((b for b in _DEVICES if _serves(b, operator, x)), "reference")


def _serves(backend: str, operator: str, x: Tensor) -> bool:
    return x.device.type == _DEVICES[backend] and _ops.has_kernel(operator, backend)


def _cpu() -> Backend:
    if _native_cpu.missing is not None:
        reason = f"the compiled module is missing ({_native_cpu.missing}): reinstall with a C++17 compiler"
        return Backend("cpu", False, reason)
    return Backend("cpu", True, f"C++ kernels for {_native_cpu.native.isa()}")


def _triton() -> Backend:
    if _TRITON_MISSING is not None:
        return Backend("triton", False, f"Triton is missing ({_TRITON_MISSING}): pip install triton")
    if _TRITON_INTERPRETED:
        reason = "interpreted, on CPU tensors and only by choice (TRITON_INTERPRET=1): for tests"
        return Backend("triton", True, reason)
    if not torch.cuda.is_available():
        return Backend("triton", False, "no CUDA device")
    return Backend("triton", True, f"Triton {version('triton')}, compiled at the first launch")


def _cuda() -> Backend:
    return Backend("cuda", False, "no CUDA kernels in this version")
