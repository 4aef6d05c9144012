"""The dtypes that the operators take, and those that they compute in."""

import torch
from torch import Tensor

from factorizer_kernels.shared.registry import compute_dtype, without_autocast

autocast_disabled = without_autocast
__all__ = ["autocast_disabled", "autocast_dtype", "compute_dtype"]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that autocast, where it is on, computes a convolution of x in; else that of x."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
