"""What all the launches share: the problem, the device, the launch itself."""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton reads the variable when a kernel is decorated, so this is final once this module is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")

SPATIAL_AXES = 3
# The identity's backward keeps a row of M numbers of each in registers; past a block's largest size it would
# not compile.
MAX_IDENTITY_ITERS = 256


class Problem(NamedTuple):
    """Windows of a feature map and how to factorise them; the kernels' compile-time constants come from here.

    Attributes:
        rows, patch, shifts: head_dim, patch size (3 axes) and the rolls, row-major flattened (copies, 3).
        rank, hals, eps, relu: the factorisation.
        num_iters: iterations.
    """

    rows: int
    patch: tuple[int, ...]
    shifts: tuple[int, ...]
    rank: int
    hals: bool
    eps: float
    relu: bool
    num_iters: int

    @property
    def columns(self) -> int:
        return prod(self.patch)

    @property
    def copies(self) -> int:
        return len(self.shifts) // SPATIAL_AXES

    @property
    def identity(self) -> bool:
        """Whether the rank-1 identity holds (x >= 0 for certain, HALS' projections never act), and serves."""
        return self.rank == 1 and self.hals and self.relu and 0 < self.num_iters <= MAX_IDENTITY_ITERS

    def map_windows(self, x: Tensor) -> int:
        """Windows of one copy of the (B, C, S1, S2, S3) map x."""
        return x.numel() // (self.rows * self.columns)


def padded(extent: int) -> int:
    """The block that holds ``extent`` elements: Triton's blocks are powers of two."""
    return triton.next_power_of_2(max(extent, 1))


def compute_type(x: Tensor) -> Any:
    """Triton's name for the dtype of the arithmetic on x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def spatial_3d(x: Tensor) -> Tensor:
    """(B, C, S1..Sp) as (B, C, S1, S2, S3), without a copy: missing axes come first, of size 1."""
    for _ in range(SPATIAL_AXES + 2 - x.dim()):
        x = x.unsqueeze(2)
    return x


def axes_3d(values: Sequence[int], axes: int, fill: int) -> tuple[int, ...]:
    """Rows of ``axes`` values each, every row filled up in front to 3 axes."""
    rows = [tuple(values[i : i + axes]) for i in range(0, len(values), axes)]
    return tuple(int(value) for row in rows for value in (fill,) * (SPATIAL_AXES - axes) + row)


def per_window(factor: Tensor, batch: Sequence[int]) -> Tensor:
    """A factor (..., L, R), broadcast to the leading dimensions ``batch``, as (batch, grid, L, R).

    A view wherever there is one.
    """
    full = factor.expand(*batch, *factor.shape[-2:])
    inner = batch[-1] if len(batch) > 1 else 1
    return full.reshape(prod(batch) // max(inner, 1), inner, *factor.shape[-2:])


def strides(x: Tensor, axes: int) -> tuple[int, ...]:
    """The strides of x, or as many zeros where it is an empty stand-in for a tensor that is not used."""
    return x.stride() if x.numel() else (0,) * axes


def launch(kernel: Any, programs: int | tuple[int, ...], x: Tensor, *args: Any, **constants: Any) -> None:
    """Start a kernel on x's device and that device's current stream."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if not all(grid):
        return
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        # Fused multiply-adds are named so that the bits do not depend on Triton's default.
        kernel[grid](*args, **constants, enable_fp_fusion=True)


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device; a few for the interpreter, so that its programs loop as on a device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
