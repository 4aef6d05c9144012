"""Checks of what users pass in, and the errors that tell them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import index
from typing import SupportsIndex

from torch import Tensor

from factorizer_kernels.shared.dtypes import autocasts


def check_count(name: str, value: int, minimum: int = 1) -> int:
    """Returns `value` as an int if it is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if index(value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return index(value)


def check_counts(name: str, values: Sequence[int], lengths: Collection[int]) -> tuple[int, ...]:
    """Returns `values` as a tuple if they are positive ints, as many as one of `lengths`."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {values!r}")
    if len(values) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise ValueError(f"{name} must have {wanted} entries, got {tuple(values)}")
    return tuple(check_count(f"{name}[{i}]", v) for i, v in enumerate(values))


def check_spatial_size(name: str, size: Sequence[int]) -> tuple[int, ...]:
    """Returns `size` as a tuple of one to three positive ints, one for each spatial axis."""
    return check_counts(name, size, (1, 2, 3))


def check_spatial_dims(value: int) -> int:
    """Returns `value` if there are layers for so many spatial axes: 1, 2 or 3."""
    if value not in (1, 2, 3):
        raise ValueError(f"spatial_dims must be 1, 2 or 3, got {value!r}")
    return value


def check_probability(name: str, value: float) -> float:
    """Returns `value` if it lies in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")
    return float(value)


def check_features(layer: str, x: Tensor, channels: int, spatial_dims: int | None = None) -> None:
    """Checks that `x` is a real floating-point tensor (B, channels, S1..Sp), p = `spatial_dims`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{layer}: x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{layer}: x must be of a floating-point dtype, got {x.dtype}")
    axes = "one or more" if spatial_dims is None else str(spatial_dims)
    if x.ndim < 3 or (spatial_dims is not None and x.ndim != spatial_dims + 2):
        raise ValueError(
            f"{layer}: x must be (batch, channels, spatial...) with {axes} spatial axes, "
            f"got shape {tuple(x.shape)}"
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"{layer}: spatial axes of x must not be empty, got {tuple(x.shape)}")
    if x.shape[1] != channels:
        raise ValueError(
            f"{layer}: x must have {channels} channels on axis 1, got {x.shape[1]} (shape {tuple(x.shape)})"
        )


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Checks that x is of the dtype of a layer's weight, or that autocast sees to that."""
    if x.dtype != weight.dtype and not autocasts(x.device.type):
        raise TypeError(f"x must be {weight.dtype}, as the weights are, got {x.dtype}")


def plain_tensor(x: Tensor) -> Tensor:
    """x as a plain tensor, where it is of a subclass that only adds to the data.

    MONAI's MetaTensor would copy its metadata with every slice of it. Subclasses with a dispatch of
    their own, as those of a tracer, stay what they are.
    """
    plain = type(x) is Tensor or type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return x if plain else x.as_subclass(Tensor)
