"""Triton kernels of ``swin_nmf``: windows are read from the map, and no window is ever written.

Forward with one copy: one kernel reads x and writes y. With several: one kernel reads x and writes every
window's factors; ``gather_kernel`` then writes y once, the mean over the shifts of UVᵀ at each voxel.
Backward: one launch for each copy; within a copy every voxel lies in one window, so the first launch
writes its share of dx and the later ones add to it, in a fixed order and without atomics.
"""

from functools import lru_cache
from math import gcd, prod
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.triton.operators import backward, forward
from factorizer_kernels.ops.nmf.triton.problem import Problem, problem_of
from factorizer_kernels.ops.windows.address import window_at
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.triton import blocks
from factorizer_kernels.shared.launches import cdiv, launch, too_many
from factorizer_kernels.shared.maps import empty_map, spatial_3d
from factorizer_kernels.shared.registry import kernel

# Voxels of a run: a store of 16 bytes of float32.
MAX_RUN = 4


@triton.jit
def gather_kernel(
    u, v, sizes, batch_heads, y,
    M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, RANK: tl.constexpr,
    M_BLOCK: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """A block of channels and voxels of the contiguous map y: the mean over the shifts of UVᵀ.

    u (windows, RANK, M) and v (windows, RANK, N), windows ordered as (copy, batch and head, cell). Voxels
    come in runs, neighbours along the last axis that no copy's windows part: so a run has one address in u.
    """
    row_blocks: tl.constexpr = (M + M_BLOCK - 1) // M_BLOCK
    N: tl.constexpr = PATCH[0] * PATCH[1] * PATCH[2]
    voxels = sizes[0] * sizes[1] * sizes[2]
    run_blocks = tl.cdiv(voxels, RUNS * RUN)
    item = tl.program_id(0) // row_blocks
    batch_head = item // run_blocks
    start = (item % run_blocks * RUNS + tl.arange(0, RUNS)) * RUN
    step = tl.arange(0, RUN)
    m = tl.program_id(0) % row_blocks * M_BLOCK + tl.arange(0, M_BLOCK)
    seen = start < voxels
    mask = (m < M)[:, None] & seen[None, :]
    cells = voxels // N
    total = tl.zeros([M_BLOCK, RUNS, RUN], u.dtype.element_ty)
    for copy in tl.static_range(len(SHIFTS)):
        cell, n = window_at(copy, start, sizes, PATCH, SHIFTS)
        window = (copy * batch_heads + batch_head).to(tl.int64) * cells + cell
        for r in range(RANK):
            at = window * RANK + r
            v_runs = tl.load(v + (at * N + n)[:, None] + step[None, :], mask=seen[:, None], other=0.0)
            u_block = tl.load(u + (at * M)[None, :] + m[:, None], mask=mask, other=0.0)
            total += u_block[:, :, None] * v_runs[None, :, :]
    rows = (batch_head * M + m).to(tl.int64) * voxels
    at_y = y + rows[:, None, None] + start[None, :, None] + step[None, None, :]
    tl.store(at_y, total * (1.0 / len(SHIFTS)), mask=mask[:, :, None])


class _Plan(NamedTuple):
    """All that follows from sizes and options.

    Attributes:
        batch_shape: of the matrices.
        factors: size and strides of u and v, (windows, M, R) and (windows, N, R), in memory rank first.
        programs, sizes, batch_heads, constants: of ``gather_kernel``.
    """

    problem: Problem
    batch_shape: tuple[int, int]
    factors: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    programs: int
    sizes: tuple[int, ...]
    batch_heads: int
    constants: dict[str, Any]


@lru_cache(maxsize=256)  # a network asks for the same few again and again
def _plan(windows: Windows, rank: int, relu: bool, options: Options) -> _Plan:
    problem = problem_of(windows, rank, relu, options)
    m_block, n_block = blocks(problem.rows)
    run = _run(problem)
    batch_heads, voxels = windows.size[0] * windows.heads, prod(windows.size_3d)
    matrices = prod(windows.batch_shape)
    factors = tuple(
        ((matrices, extent, rank), (rank * extent, 1, extent)) for extent in (problem.rows, problem.columns)
    )
    return _Plan(
        problem, windows.batch_shape, factors,
        batch_heads * cdiv(voxels, n_block) * cdiv(problem.rows, m_block), windows.size_3d, batch_heads,
        {
            "M": problem.rows, "PATCH": problem.patch, "SHIFTS": problem.shifts, "RANK": problem.rank,
            "M_BLOCK": m_block, "RUNS": n_block // run, "RUN": run,
        },
    )  # fmt: skip


def _run(problem: Problem) -> int:
    """The voxels of a run: a power of two that divides every stretch between two windows' borders."""
    cut = gcd(problem.patch[-1], *(shift[-1] for shift in problem.shifts))
    return min(cut & -cut, MAX_RUN)


def _planned(x: Tensor, u0: Tensor, head_dim, patch_size, shifts, relu, options) -> _Plan:
    windows = Windows(x.shape, head_dim, tuple(patch_size), tuple(shifts))
    return _plan(windows, u0.shape[-1], relu, Options(*options))


@kernel("swin_nmf", "triton", lambda x, _: too_many(prod(x.shape[2:])))
def swin_nmf(x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts, relu, *options) -> Tensor:
    plan = _planned(x, u0, head_dim, patch_size, shifts, relu, options)
    problem, batch_shape = plan.problem, plan.batch_shape
    y = empty_map(x)
    x = spatial_3d(x)
    if problem.num_shifts == 1:
        forward(problem, x, u0, v0, batch_shape, spatial_3d(y))
        return y
    u, v = (u0.new_empty_strided(size, stride) for size, stride in plan.factors)
    forward(problem, x, u0, v0, batch_shape, (u, v))
    launch(gather_kernel, plan.programs, x, u, v, plan.sizes, plan.batch_heads, y, **plan.constants)
    return y


@kernel("swin_nmf_backward", "triton")
def swin_nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads, head_dim, patch_size, shifts, relu, *options
) -> tuple[Tensor, Tensor, Tensor]:
    plan = _planned(x, u0, head_dim, patch_size, shifts, relu, options)
    dy = dy.contiguous()  # of y.sum() it has strides of 0, and would be read element by element
    dx = empty_map(x)
    du0, dv0 = backward(
        plan.problem, factor_grads, spatial_3d(x), u0, v0, plan.batch_shape, spatial_3d(dy), spatial_3d(dx)
    )
    return dx, du0, dv0
