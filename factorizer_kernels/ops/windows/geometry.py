"""How a feature map is cut into (shifted) windows: the options' meaning, checked and resolved once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

MAX_INT = 2**63 - 1  # what an operator's argument holds

Shift = int | Sequence[int] | None


class Windows(NamedTuple):
    """A resolved cut of (B, C, S1..Sp): windows of ``patch_size`` voxels and ``head_dim`` channels.

    Attributes:
        head_dim: channels of one window, the rows M of its matrix; C = heads · head_dim, head_dim fastest.
        patch_size: voxels of one window along each spatial axis; their product is the columns N.
        shifts: cyclic roll of every spatial axis before the cut, for each copy, row-major flattened
            (num_shifts, num_axes); any integers.
    """

    head_dim: int
    patch_size: tuple[int, ...]
    shifts: tuple[int, ...]

    @property
    def num_shifts(self) -> int:
        return len(self.shifts) // len(self.patch_size)

    def shift(self, copy: int) -> tuple[int, ...]:
        """The roll of each spatial axis in one copy."""
        axes = len(self.patch_size)
        return self.shifts[copy * axes : (copy + 1) * axes]


def product(values) -> int:
    """The product of integers, symbolic ones (under torch.compile) included."""
    result = 1
    for value in values:
        result = result * value
    return result


def matricized_shape(size, head_dim, patch_size, num_flat_shifts) -> tuple[int, int, int, int]:
    """(S·B·H, G1···Gp, head_dim, P1···Pp) for x of ``size`` (B, C, S1..Sp)."""
    batch, channels, *spatial = size
    copies = num_flat_shifts // len(patch_size)
    grid = product([s // p for s, p in zip(spatial, patch_size, strict=True)])
    return (copies * batch * (channels // head_dim), grid, head_dim, product(patch_size))


def rolls(shifts, spatial) -> list[int]:
    """The flattened shifts modulo the spatial size, as kernels take them.

    They stay as given until a kernel runs: a traced graph then holds for every size.
    """
    return [shift % spatial[i % len(spatial)] for i, shift in enumerate(shifts)]


def resolve(
    size: Sequence[int],
    *,
    num_heads: int | None,
    head_dim: int | None,
    grid_size: int | Sequence[int] | None,
    patch_size: int | Sequence[int] | None,
    shifts: Sequence[Shift] | None,
) -> Windows:
    """Turn the public options for a tensor of ``size`` (B, C, S1..Sp) into :class:`Windows`.

    Exactly one of num_heads and head_dim, and exactly one of grid_size and patch_size, are given.

    Raises:
        TypeError: an option is not an integer, or not a sequence of them.
        ValueError: an option contradicts another or does not divide the size.
    """
    _, channels, *spatial = size
    axes = len(spatial)
    if not 1 <= axes <= 3:
        raise ValueError(f"x must be (B, C, S1..Sp) with p = 1, 2 or 3 spatial axes, got shape {tuple(size)}")

    heads_name, heads = _exactly_one("num_heads", num_heads, "head_dim", head_dim)
    _positive(heads_name, heads)
    if channels % heads:
        raise ValueError(f"{heads_name}={heads} must divide the {channels} channels of x")
    head_dim = heads if heads_name == "head_dim" else channels // heads

    cut_name, cut = _exactly_one("grid_size", grid_size, "patch_size", patch_size)
    cuts = _per_axis(cut_name, cut, axes)
    for axis, (extent, part) in enumerate(zip(spatial, cuts, strict=True)):
        _positive(cut_name, part)
        if extent % part:
            raise ValueError(
                f"{cut_name}={cut} must divide the spatial size of x: axis {axis} has {extent}, "
                f"which is no multiple of {part}"
            )
    patch = cuts if cut_name == "patch_size" else tuple(s // g for s, g in zip(spatial, cuts, strict=True))

    flat: list[int] = []
    for shift in _shift_list(shifts):
        per_axis = (0,) * axes if shift is None else _per_axis("shifts", shift, axes)
        if any(abs(step) > MAX_INT for step in per_axis if isinstance(step, int)):
            raise ValueError(f"shifts must fit in 64 bits, got {shift}")
        flat += per_axis
    return Windows(head_dim, patch, tuple(flat))


def _exactly_one(first_name, first, second_name, second):
    if (first is None) == (second is None):
        state = "neither" if first is None else "both"
        raise ValueError(f"exactly one of {first_name} and {second_name} must be given, got {state}")
    return (first_name, first) if second is None else (second_name, second)


def is_integer(value) -> bool:
    """Whether value is an integer, symbolic ones (under torch.compile) included; True is not."""
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def _positive(name, value):
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _per_axis(name, value, axes) -> tuple[int, ...]:
    if is_integer(value):
        return (value,) * axes
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(map(is_integer, value)):
        raise TypeError(f"{name} must be an integer or one integer per spatial axis, got {value!r}")
    if len(value) != axes:
        raise ValueError(f"{name} must have one entry per spatial axis ({axes}), got {tuple(value)}")
    return tuple(value)


def _shift_list(shifts) -> Sequence[Shift]:
    if shifts is None:
        return (None,)
    if isinstance(shifts, str) or not isinstance(shifts, Sequence):
        raise TypeError(f"shifts must be None or a sequence of None, int or ints, got {shifts!r}")
    if not shifts:
        raise ValueError(
            "shifts must name at least one copy (None is the unshifted one), got an empty sequence"
        )
    return shifts
