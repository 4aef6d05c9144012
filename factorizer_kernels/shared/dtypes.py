"""The dtypes that the operators take, and those that they compute in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# Asked for once: torch.compile of torch 2.11 and earlier does not trace the question.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "mps", "xpu", "hpu", "mtia", "maia", "xla")
    if torch.amp.is_autocast_available(device)
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(device: str) -> bool:
    """Whether autocast is on for that type of device."""
    return device in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast_disabled(x: Tensor) -> AbstractContextManager:
    """A context in which plain PyTorch on x's device computes in the dtypes that it is given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an operator that follows autocast takes x: x's own for float64, or without it."""
    device = x.device.type
    if x.dtype == torch.float64 or not autocasts(device):
        return x.dtype
    return torch.get_autocast_dtype(device)
