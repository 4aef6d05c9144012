"""How a feature map is cut into shifted windows: the options' meaning, checked and resolved once."""

from collections.abc import Sequence
from typing import NamedTuple

from factorizer_kernels.shared.checks import MAX_INT, integer, integers, is_integer
from factorizer_kernels.shared.maps import three_axes

Shift = int | Sequence[int] | None


class Windows(NamedTuple):
    """How a feature map (B, C, S1..Sp) is cut into windows, once for each shift.

    A window of one head is a matrix: ``rows`` channels by ``columns`` voxels.

    Attributes:
        size: (B, C, S1..Sp).
        head_dim: channels of one window; C = heads · head_dim, head_dim fastest.
        patch_size: voxels of one window along each spatial axis.
        shifts: the cyclic roll of every spatial axis before the cut, for each shift, row-major flattened
            (num_shifts, p); any integers. They stay as given until a kernel runs: a traced graph then holds
            for every size.
    """

    size: tuple[int, ...]
    head_dim: int
    patch_size: tuple[int, ...]
    shifts: tuple[int, ...]

    @property
    def options(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """head_dim, patch_size and shifts, as the operators take them."""
        return self.head_dim, self.patch_size, self.shifts

    @property
    def rows(self) -> int:
        return self.head_dim

    @property
    def columns(self) -> int:
        return product(self.patch_size)

    @property
    def heads(self) -> int:
        return self.size[1] // self.head_dim

    @property
    def num_shifts(self) -> int:
        return len(self.shifts) // len(self.patch_size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Windows along each spatial axis."""
        return tuple(s // p for s, p in zip(self.size[2:], self.patch_size, strict=True))

    @property
    def batch_shape(self) -> tuple[int, int]:
        """The matrices' leading dimensions (S·B·H, G1···Gp): shifts outermost, then batch, then heads."""
        return self.num_shifts * self.size[0] * self.heads, product(self.grid)

    @property
    def matrices_shape(self) -> tuple[int, int, int, int]:
        """(S·B·H, G1···Gp, head_dim, P1···Pp)"""
        return *self.batch_shape, self.rows, self.columns

    def shift(self, index: int) -> tuple[int, ...]:
        """The roll of each spatial axis for one of the shifts."""
        axes = len(self.patch_size)
        return self.shifts[index * axes : (index + 1) * axes]

    # As kernels take them: three spatial axes, and shifts in [0, size).

    @property
    def size_3d(self) -> tuple[int, ...]:
        return three_axes(self.size[2:], 1)

    @property
    def patch_3d(self) -> tuple[int, ...]:
        return three_axes(self.patch_size, 1)

    @property
    def shifts_3d(self) -> tuple[tuple[int, ...], ...]:
        """(num_shifts, 3)"""
        size = self.size[2:]
        shifts = (self.shift(index) for index in range(self.num_shifts))
        return tuple(
            three_axes([step % s for step, s in zip(shift, size, strict=True)], 0) for shift in shifts
        )


def whole_matrices(shape: Sequence[int]) -> Windows:
    """A batch of matrices (..., M, N) as a 1-D feature map (B, M, N), each item of which is one window.

    So the kernels of windows are those of plain matrices.
    """
    *batch, rows, columns = shape
    return Windows((product(batch), rows, columns), rows, (columns,), (0,))


def product(values: Sequence[int]) -> int:
    """The product of integers, symbolic ones (under torch.compile) included."""
    result = 1
    for value in values:
        result = result * value
    return result


def map_size(name: str, value: object) -> tuple[int, ...]:
    """``value`` as the full size (B, C, S1..Sp) of a feature map."""
    return integers(name, value, 0, (3, 4, 5))


def resolve(
    size: Sequence[int],
    *,
    num_heads: int | None,
    head_dim: int | None,
    grid_size: int | Sequence[int] | None,
    patch_size: int | Sequence[int] | None,
    shifts: Sequence[Shift] | None,
) -> Windows:
    """Turn the public options for a tensor of ``size`` (B, C, S1..Sp) into `Windows`.

    Exactly one of num_heads and head_dim, and exactly one of grid_size and patch_size, are given.

    Raises:
        TypeError: an option is not an integer, or not a sequence of them.
        ValueError: an option contradicts another or does not divide the size.
    """
    _, channels, *spatial = size
    axes = len(spatial)

    heads_name, heads = _exactly_one("num_heads", num_heads, "head_dim", head_dim)
    heads = integer(heads_name, heads, 1)
    if channels % heads:
        raise ValueError(f"{heads_name}={heads} must divide the {channels} channels of x")
    head_dim = heads if heads_name == "head_dim" else channels // heads

    cut_name, cut = _exactly_one("grid_size", grid_size, "patch_size", patch_size)
    cuts = _per_axis(cut_name, cut, axes)
    for axis, (extent, part) in enumerate(zip(spatial, cuts, strict=True)):
        integer(cut_name, part, 1)
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
    return Windows(tuple(size), head_dim, patch, tuple(flat))


def _exactly_one(first_name, first, second_name, second):
    if (first is None) == (second is None):
        state = "neither" if first is None else "both"
        raise ValueError(f"exactly one of {first_name} and {second_name} must be given, got {state}")
    return (first_name, first) if second is None else (second_name, second)


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
