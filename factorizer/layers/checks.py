"""What layers check beside `factorizer_kernels.shared.checks`, which is the vocabulary of both packages."""

from __future__ import annotations

from torch import Tensor

from factorizer_kernels.shared.checks import feature_map, number
from factorizer_kernels.shared.dtypes import autocasts


def check_probability(name: str, value: float) -> float:
    """Returns `value` if it lies in [0, 1)."""
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return float(value)


def check_features(layer: str, x: Tensor, channels: int, spatial_dims: int | None = None) -> None:
    """Checks that `x` is a floating-point tensor (B, channels, S1..Sp), p = `spatial_dims`, Si > 0."""
    feature_map(f"{layer}: x", x, channels, spatial_dims)
    if 0 in x.shape[2:]:
        raise ValueError(f"{layer}: spatial axes of x must not be empty, got {tuple(x.shape)}")


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Checks that x is of the dtype of a layer's weight, or that autocast sees to that."""
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"x must be {weight.dtype}, as the weights are, got {x.dtype}")
