"""The compiled module's CUDA code: whether it is there, on which device and stream it runs."""

import warnings
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.dynamo import constant_while_compiling

native: Any = cpu.native if hasattr(cpu.native, "cuda_architectures") else None
missing: str | None = None
if native is None:
    missing = cpu.missing or (
        "the module was compiled without them, for want of nvcc or of a card: reinstall with nvcc on PATH "
        "and FACTORIZER_KERNELS_CUDA=1"
    )


@constant_while_compiling  # Dynamo cannot trace into the compiled module
def why_no_code(device: int) -> str | None:
    """Why no kernel runs on the device of this index, or None where they do."""
    return _why_no_code(device)


@constant_while_compiling
def warn_once(reason: str) -> None:
    """Say once a process that the compiled kernels are passed over: others take their place silently."""
    _warn(reason)


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"the CUDA kernels of factorizer_kernels are not used: {reason}", stacklevel=3)


@cache
def _why_no_code(device: int) -> str | None:
    driver, runtime = native.cuda_versions()
    outdated = (
        f"the driver knows CUDA up to {driver // 1000}.{driver % 1000 // 10}, and the kernels were "
        f"compiled with {runtime // 1000}.{runtime % 1000 // 10}: update the driver, or reinstall with "
        "an older nvcc"
    )
    if driver // 1000 < runtime // 1000:
        return outdated
    major, minor = torch.cuda.get_device_capability(device)
    text = native.cuda_architectures()
    architectures = [int(word) for word in text.rstrip("+").split(",")]
    if any(a // 10 == major and a % 10 <= minor for a in architectures):
        return None
    if text.endswith("+") and 10 * major + minor >= min(architectures):
        # From the PTX of the lowest, which the driver compiles unless it is older than the PTX.
        return None if driver >= runtime else outdated
    return (
        f"the kernels were compiled for the compute capabilities {text}, and "
        f"{torch.cuda.get_device_name(device)} has {major}.{minor}: reinstall with "
        f"FACTORIZER_KERNELS_CUDA_ARCHS={major}{minor}"
    )


def current(x: Tensor) -> AbstractContextManager:
    """Makes x's device the current one; torch goes back to the other without creating a context there."""
    return torch.cuda.device(x.device.index)


def target(x: Tensor) -> tuple[int, int]:
    """(device index, handle of its current stream): where a launch for x belongs, on the current device."""
    index = x.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)  # torch.cuda's own makes an object of it


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count
