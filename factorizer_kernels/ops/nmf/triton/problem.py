"""What the kernels are asked to do, and the constants that they are compiled for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared.launches import padded

# Elements of a window, padded, that one program holds.
MAX_ELEMENTS = 8192
# The identity's backward keeps M numbers of each iteration in registers; past a block's largest size it
# would not compile.
MAX_CLOSED_FORM_ITERS = 256
# Of 16 rows G = XXᵀ has 136 different numbers, more than half of a lane's registers.
MAX_CLOSED_FORM_ROWS = 16


@dataclass(frozen=True, eq=False)
class Problem:
    """Windows of a feature map and how to factorise them; the kernels' compile-time constants come from here.

    ``problem_of`` makes each once, so that what follows from one is found by its identity.

    Attributes:
        rows: head_dim.
        patch, shifts: the windows' patch (3,) and shifts (num_shifts, 3), three spatial axes.
        rank, hals, eps, relu, num_iters, grad_steps: the factorisation.
    """

    rows: int
    patch: tuple[int, ...]
    shifts: tuple[tuple[int, ...], ...]
    rank: int
    hals: bool
    eps: float
    relu: bool
    num_iters: int
    grad_steps: int

    @cached_property
    def columns(self) -> int:
        return prod(self.patch)

    @property
    def num_shifts(self) -> int:
        return len(self.shifts)

    @property
    def flat_shifts(self) -> tuple[int, ...]:
        return tuple(step for shift in self.shifts for step in shift)

    @property
    def on_chip(self) -> bool:
        """Whether one program holds a window."""
        return padded(self.rows) * padded(self.columns) <= MAX_ELEMENTS

    @cached_property
    def rank1_closed_form(self) -> bool:
        """Whether the rank-1 identity (``rank1``) holds, and is faster.

        It holds where x >= 0 for certain: HALS' projections never act. It pays where G, with which each
        iteration multiplies, is no larger than a row: windows of 12 x 64 are predicted to be faster iterated,
        of 16 x 512 slower (docs/triton.md).
        """
        return (
            self.rank == 1
            and self.hals
            and self.relu
            and self.rows <= MAX_CLOSED_FORM_ROWS
            and self.rows**2 <= self.columns
            and 0 < self.num_iters <= MAX_CLOSED_FORM_ITERS
        )

    def map_windows(self, x: Tensor) -> int:
        """Windows of one shift of the (B, C, S1, S2, S3) map x."""
        return x.numel() // (self.rows * self.columns)


@lru_cache(maxsize=256)  # a network asks for the same few again and again
def problem_of(windows: Windows, rank: int, relu: bool, options: Options) -> Problem:
    """The problem of factorising the windows, whose fields are tuples, with first factors of that rank."""
    return Problem(
        windows.rows, windows.patch_3d, windows.shifts_3d,
        rank, options.hals, options.eps, relu, options.num_iters, options.grad_steps,
    )  # fmt: skip


def shares_of(problem: Problem, dx: Tensor, u0: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(copy, before, out) of each shift's launch, which writes ``out``: its share of dx, and ``before``.

    (The first has nothing before it.) The shares are summed in the arithmetic's precision, and the last
    launch writes dx: a dx of half precision is rounded once, and written once.
    """
    before = dx if problem.num_shifts == 1 or dx.dtype == u0.dtype else u0.new_empty(dx.shape)
    for copy in range(problem.num_shifts):
        yield copy, before, dx if copy == problem.num_shifts - 1 else before


def per_window(factor: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """A factor (..., L, R), broadcast to the leading dimensions ``batch_shape``, as (batch, grid, L, R).

    A view wherever there is one.
    """
    inner = grid_of(batch_shape)
    full = factor.expand(*batch_shape, *factor.shape[-2:])
    return full.reshape(prod(batch_shape) // max(inner, 1), inner, *factor.shape[-2:])


def grid_of(batch_shape: Sequence[int]) -> int:
    """The last of several leading dimensions, which kernels count apart."""
    return batch_shape[-1] if len(batch_shape) > 1 else 1


def strided(factor: Tensor, batch_shape: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The memory of ``per_window`` and its strides, without a view of a factor that all windows share."""
    if factor.dim() == 2:
        return factor, (0, 0, *factor.stride())
    full = per_window(factor, batch_shape)
    return full, full.stride()


def map_or_factors(tensors: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return (tensors, None, None) if isinstance(tensors, Tensor) else (None, *tensors)


def given(tensor: Tensor | None, x: Tensor, axes: int) -> tuple[Tensor, tuple[int, ...]]:
    """A tensor and its strides; in place of one that is absent x, which no kernel reads there."""
    return (x, (0,) * axes) if tensor is None else (tensor, tensor.stride())


@lru_cache(maxsize=256)  # a network asks for the same few again and again
def map_numbers(problem: Problem, size: torch.Size) -> tuple[tuple[int, ...], int, int]:
    """sizes, heads and map_windows of a map (B, C, S1, S2, S3)."""
    return tuple(size[2:]), size[1] // problem.rows, size.numel() // (problem.rows * problem.columns)
