"""Which backends there are, which one runs a call, and why not another."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from factorizer_kernels.shared import cuda, native, registry, triton
from factorizer_kernels.shared.checks import dispatches_itself
from factorizer_kernels.shared.dynamo import constant_while_compiling


class Backend(NamedTuple):
    """One backend: its name, whether it can be used here, and the reason in a sentence."""

    name: str
    available: bool
    reason: str


class _Record(NamedTuple):
    """All that there is to say of a backend, but for its kernels: ``ops/<family>/<name>.py``.

    Attributes:
        devices: types of the devices whose tensors it runs on; None: any.
        missing: why its kernels cannot be imported, or None where they can.
        probe: returns whether it can be used here, and the reason in a sentence.
        devices_by_name: more devices, for tests: only where ``use_backend`` names it.
    """

    name: str
    devices: tuple[str, ...] | None
    missing: str | None
    probe: Callable[[], tuple[bool, str]]
    devices_by_name: tuple[str, ...] = ()

    def serves(self, device: str, by_name: bool) -> bool:
        """Whether it runs on that type of device."""
        return self.devices is None or device in self.devices or (by_name and device in self.devices_by_name)


def _probe_cpu() -> tuple[bool, str]:
    if native.missing is not None:
        return False, native.missing
    return True, f"C++ kernels for {native.native.isa()}"


def _probe_triton() -> tuple[bool, str]:
    if triton.missing is not None:
        return False, triton.missing
    if triton.INTERPRETED:
        return True, "interpreted, on CPU tensors and only by choice (TRITON_INTERPRET=1): for tests"
    if (reason := _why_no_device()) is not None:
        return False, reason
    return True, f"Triton {version('triton')}, compiled at the first launch"


def _probe_cuda() -> tuple[bool, str]:
    if (reason := cuda.missing or _why_no_device()) is not None:
        return False, reason
    if (reason := cuda.why_no_code(torch.cuda.current_device())) is not None:
        return False, reason
    return True, f"C++ kernels for the compute capabilities {cuda.native.cuda_architectures()}"


def _probe_torch() -> tuple[bool, str]:
    return True, "plain PyTorch in blocks, on any device: it keeps less in memory than the reference"


def _probe_reference() -> tuple[bool, str]:
    return True, "plain PyTorch, on any device"


def _why_no_device() -> str | None:
    """Why there is no CUDA device here, or None where there is one."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        torch.cuda.current_device()
    except RuntimeError as error:  # in a process forked off one that uses the GPU, for example
        return f"CUDA does not start ({error})"
    return None


# In the order of preference. The reference, last, runs everything everywhere.
_RECORDS = {
    record.name: record
    for record in (
        _Record("cuda", ("cuda",), cuda.missing, _probe_cuda),
        _Record("triton", ("cuda",), triton.missing, _probe_triton, ("cpu",) if triton.INTERPRETED else ()),
        _Record("cpu", ("cpu",), native.missing, _probe_cpu),
        _Record("torch", None, None, _probe_torch),
        _Record("reference", None, None, _probe_reference),
    )
}

_choice = threading.local()


def backends() -> tuple[Backend, ...]:
    """Every backend of this installation, usable or not, with the reason."""
    return tuple(Backend(record.name, *record.probe()) for record in _RECORDS.values())


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators that this thread calls inside on the backend ``name``, and on no other.

    Args:
        name: "reference", "torch", "cpu", "triton" or "cuda".

    Raises:
        TypeError: name is not a string.
        ValueError: there is no backend of that name, or it cannot be used here (the message says why).
            An operator called inside raises ValueError where the backend does not serve its tensors.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name not in _RECORDS:
        raise ValueError(f"name must be one of {tuple(_RECORDS)}, got {name!r}")
    available, reason = _RECORDS[name].probe()  # and no other: to ask for the CPU touches no GPU
    if not available:
        raise ValueError(f"backend {name!r} cannot be used here: {reason}")
    previous = getattr(_choice, "name", None)
    _choice.name = name
    try:
        yield
    finally:
        _choice.name = previous


def choose(operator: str, x: Tensor, sizes: Any = None) -> str:
    """The backend that runs ``operator`` on x: that of `use_backend`, else the first that can and does
    not yield to those after it.

    On an empty x there is nothing to launch: plain PyTorch gives the empty result. So it does, where no
    backend is named, for a subclass of Tensor with a dispatch of its own: that need not know the kernels.

    Args:
        sizes: what the operator's kernels are asked about, see ``registry.kernel``.

    Raises:
        ValueError: the backend of `use_backend` does not run this call; the message says why.
    """
    name = getattr(_choice, "name", None)
    if name not in (None, "reference") and (reason := _why_not(_RECORDS[name], operator, x, sizes, name)):
        others = [r.name for r in _RECORDS.values() if _why_not(r, operator, x, sizes, name) is None]
        raise ValueError(
            f"backend {name!r} does not run {operator} here: {reason}; "
            f"leave the choice open, or take one of {tuple(others)}"
        )
    if torch.compiler.is_compiling() and _transformed():
        # Dynamo does not tell a Function that it is inside of torch.func.grad or jvp, so that its operator
        # would be a constant there.
        if name not in (None, "reference"):
            raise ValueError(
                f"backend {name!r} does not run {operator} in a compiled transform of torch.func; leave the "
                "choice open, or compile what is inside of the transform"
            )
        return "reference"
    if x.numel() == 0:
        return "reference"
    if name is not None:
        return name
    if dispatches_itself(x):
        return "reference"
    if native.missing is not None and x.device.type == "cpu":
        native.warn_once()
    device = x.device.type
    for record in _RECORDS.values():
        # Asked first, as a reason takes long to write.
        if record.serves(device, by_name=False) and _why_not(record, operator, x, sizes, None) is None:
            return record.name
    raise AssertionError("the reference runs everything")


@constant_while_compiling
def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _why_not(record: _Record, operator: str, x: Tensor, sizes: Any, named: str | None) -> str | None:
    """Why the backend does not run the operator on x, or None where it does; ``named``: the one asked for."""
    if record.name == "reference":
        return None
    by_name = record.name == named
    if not record.serves(x.device.type, by_name):
        return f"x is on {x.device}"
    if (kernel := registry.find(operator, record.name)) is None:
        return f"it has no {operator}"
    reason = _why_no_kernel(by_name) or kernel.limit(x, sizes)
    return reason if reason or by_name else kernel.yields(x, sizes)


def _why_no_kernel(by_name: bool) -> str | None:
    """Why a graph that is being recorded can hold no kernel, or None where it can, or none is recorded."""
    tracing = torch.jit.is_tracing()
    if not tracing and not torch.compiler.is_exporting():
        return None
    if _onnx_export():
        return "an ONNX file holds no kernel"
    if tracing and not by_name:  # so that the traced file needs torch alone
        return "torch.jit.trace records a kernel only where its backend is named"
    return None


@constant_while_compiling
def _onnx_export() -> bool:
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def load_kernels(family: str) -> None:
    """Import a family's kernels: the module ``<family>.<backend>`` for every backend that has one.

    Args:
        family: the name of the family's package.
    """
    for record in _RECORDS.values():
        module = f"{family}.{record.name}"
        if record.name != "reference" and record.missing is None and find_spec(module):
            import_module(module)
