"""What is usable here, what is chosen, and why."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from factorizer_kernels import _native_cpu, _ops


class Backend(NamedTuple):
    """One backend: its name, whether it can be used here, and the reason in a sentence."""

    name: str
    available: bool
    reason: str


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
    """The backend that runs ``operator`` on x: the one of :func:`use_backend`, else the first that serves it."""
    name = getattr(_choice, "name", None)
    if name is None:
        return next((b for b in _DEVICES if _serves(b, operator, x)), "reference")
    if name != "reference" and not _serves(name, operator, x):
        raise ValueError(f"backend {name!r} has no {operator} for x on {x.device}: leave the choice open, or take 'reference'")
    return name


def _serves(backend: str, operator: str, x: Tensor) -> bool:
    return x.device.type == _DEVICES[backend] and _ops.has_kernel(operator, backend)


def _cpu() -> Backend:
    if _native_cpu.missing is not None:
        reason = f"the compiled module is missing ({_native_cpu.missing}): reinstall with a C++17 compiler"
        return Backend("cpu", False, reason)
    return Backend("cpu", True, f"C++ kernels for {_native_cpu.native.isa()}")


def _triton() -> Backend:
    return Backend("triton", False, "no Triton kernels in this version")


def _cuda() -> Backend:
    return Backend("cuda", False, "no CUDA kernels in this version")
