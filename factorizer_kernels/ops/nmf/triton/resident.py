"""One window in one program: read once, all the iterations on chip, written once.

A window is an (M, N) block in registers (``Problem.on_chip``), its factors columns beside it. The backward
runs the iterations again and keeps their factors in a tape, one slot for each program, that stays in the L2
cache because the programs go on to the next window with the same slot.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.triton.problem import (
    Problem,
    given,
    grid_of,
    map_numbers,
    map_or_factors,
    shares_of,
    strided,
)
from factorizer_kernels.ops.nmf.triton.updates import (
    add,
    add_symmetric,
    converted,
    gram,
    load_columns,
    load_factor,
    outer,
    relu,
    store_columns,
    times_columns,
    times_rows,
    update,
    update_backward,
)
from factorizer_kernels.ops.windows.address import load_map, store_map, window_of
from factorizer_kernels.shared.launches import launch, padded, processors

MAX_RANK = 8


@triton.jit(do_not_specialize=["map_windows", "num_iters"])
def forward_kernel(
    x, x_strides, sizes, heads, map_windows, grid_windows,
    u0, u0_strides, v0, v0_strides, num_iters,
    y, y_strides, u_out, u_strides, v_out, v_strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, RANK: tl.constexpr,
    HALS: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    PRODUCT: tl.constexpr, M_PAD: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """One window of one copy: y = UVᵀ (PRODUCT), or the factors. Strides: x, y (b, c, 1, 2, 3),
    u0, v0 (batch, grid, row, rank), u, v (window, row, rank)."""
    # Copies of one window's neighbourhood run side by side, so that x is read from memory once.
    copy = tl.program_id(0) % len(SHIFTS)
    map_window = tl.program_id(0) // len(SHIFTS)
    at = copy.to(tl.int64) * map_windows + map_window
    window = window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    n = tl.arange(0, N_PAD)

    block = load_map(x, x_strides, window, sizes, m, n, u0, M, N, PATCH)
    if RELU:
        block = relu(block)
    u = load_factor(u0, u0_strides, at, grid_windows, m, m < M, RANK)
    v = load_factor(v0, v0_strides, at, grid_windows, n, n < N, RANK)
    for _ in range(num_iters):
        u, v = iterate(block, u, v, m < M, n < N, HALS, EPS, RANK)

    if PRODUCT:
        store_map(y, y_strides, window, sizes, m, n, outer(u, v, RANK), M, N, PATCH)
    else:
        store_columns(u_out, at * u_strides[0] + m * u_strides[1], u_strides[2], u, m < M, RANK)
        store_columns(v_out, at * v_strides[0] + n * v_strides[1], v_strides[2], v, n < N, RANK)


@triton.jit
def iterate(x, u, v, u_mask, v_mask, HALS: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr):
    """One iteration: U, then V."""
    u = update(u, times_columns(x, v, RANK), gram(v, RANK), u_mask, HALS, EPS, RANK)
    v = update(v, times_rows(x, u, RANK), gram(u, RANK), v_mask, HALS, EPS, RANK)
    return u, v


@triton.jit
def iterate_backward(
    x, old_u, old_v, u, v, grad_u, grad_v, HALS: tl.constexpr, EPS: tl.constexpr, RANK: tl.constexpr
):
    """(ū, v̄, x̄) before an iteration that took (old_u, old_v) to (u, v), from (ū, v̄) after it."""
    grad_v, grad_c, grad_d = update_backward(
        old_v, v, times_rows(x, u, RANK), gram(u, RANK), grad_v, HALS, EPS, RANK
    )
    grad_u = add_symmetric(add(grad_u, times_columns(x, grad_c, RANK), RANK), u, grad_d, RANK)
    grad_x = outer(u, grad_c, RANK)
    grad_u, grad_a, grad_b = update_backward(
        old_u, u, times_columns(x, old_v, RANK), gram(old_v, RANK), grad_u, HALS, EPS, RANK
    )
    grad_v = add_symmetric(add(grad_v, times_rows(x, grad_a, RANK), RANK), old_v, grad_b, RANK)
    return grad_u, grad_v, grad_x + outer(grad_a, old_v, RANK)


@triton.jit(do_not_specialize=["map_windows", "num_iters", "grad_steps", "copy"])
def backward_kernel(
    x, x_strides, sizes, heads, map_windows, grid_windows,
    u0, u0_strides, v0, v0_strides, num_iters, grad_steps, copy,
    dy, dy_strides, du, du_strides, dv, dv_strides,
    dx_before, dx, dx_strides, du0, dv0, u_tape, v_tape,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, RANK: tl.constexpr,
    HALS: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    PRODUCT: tl.constexpr, FACTOR_GRADS: tl.constexpr, M_PAD: tl.constexpr, N_PAD: tl.constexpr,
):  # fmt: skip
    """The windows of one copy: their share of dx, and of every copy but the first what those before it wrote.

    Strides as in the forward. du0 (windows, M, R) and dv0 (windows, N, R) are one window's share each.
    """
    m = tl.arange(0, M_PAD)
    n = tl.arange(0, N_PAD)
    first = num_iters - grad_steps
    slot = tl.program_id(0).to(tl.int64) * grad_steps * RANK
    for map_window in range(tl.program_id(0), map_windows, tl.num_programs(0)):
        at = copy.to(tl.int64) * map_windows + map_window
        window = window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)
        block = load_map(x, x_strides, window, sizes, m, n, u0, M, N, PATCH)
        if RELU:
            block = relu(block)
        if PRODUCT:
            dy_block = load_map(dy, dy_strides, window, sizes, m, n, u0, M, N, PATCH)
            dy_block *= 1.0 / len(SHIFTS)  # the mean over the shifts

        u = load_factor(u0, u0_strides, at, grid_windows, m, m < M, RANK)
        v = load_factor(v0, v0_strides, at, grid_windows, n, n < N, RANK)
        for _ in range(first):
            u, v = iterate(block, u, v, m < M, n < N, HALS, EPS, RANK)
        for i in range(grad_steps):
            store_columns(u_tape, (slot + i * RANK) * M + m, M, u, m < M, RANK)
            store_columns(v_tape, (slot + i * RANK) * N + n, N, v, n < N, RANK)
            u, v = iterate(block, u, v, m < M, n < N, HALS, EPS, RANK)
        # A thread may read from the tape what another one wrote.
        tl.debug_barrier()
        if PRODUCT:
            grad_u, grad_v = times_columns(dy_block, v, RANK), times_rows(dy_block, u, RANK)
        else:
            grad_u = converted(
                load_columns(du, at * du_strides[0] + m * du_strides[1], du_strides[2], m < M, RANK),
                u0,
                RANK,
            )
            grad_v = converted(
                load_columns(dv, at * dv_strides[0] + n * dv_strides[1], dv_strides[2], n < N, RANK),
                u0,
                RANK,
            )
        grad_x = tl.zeros_like(block)
        for k in range(grad_steps):
            i = grad_steps - 1 - k
            old_u = load_columns(u_tape, (slot + i * RANK) * M + m, M, m < M, RANK)
            old_v = load_columns(v_tape, (slot + i * RANK) * N + n, N, n < N, RANK)
            grad_u, grad_v, grad_step = iterate_backward(
                block, old_u, old_v, u, v, grad_u, grad_v, HALS, EPS, RANK
            )
            grad_x += grad_step
            u, v = old_u, old_v
        # The next window writes to the slot that this one read.
        tl.debug_barrier()

        if RELU:
            grad_x = tl.where(block <= 0, 0.0, grad_x)  # NaN keeps its gradient, as in torch
        if copy > 0:
            grad_x += load_map(dx_before, dx_strides, window, sizes, m, n, u0, M, N, PATCH)
        store_map(dx, dx_strides, window, sizes, m, n, grad_x, M, N, PATCH)
        if FACTOR_GRADS:
            store_columns(du0, (at * M + m) * RANK, 1, grad_u, m < M, RANK)
            store_columns(dv0, (at * N + n) * RANK, 1, grad_v, n < N, RANK)


def fits(problem: Problem) -> bool:
    """Whether a window and its factors fit on chip."""
    return problem.rank <= MAX_RANK and problem.on_chip


def _constants(problem: Problem) -> dict[str, Any]:
    rows, columns = padded(problem.rows), padded(problem.columns)
    return {
        "M": problem.rows, "N": problem.columns, "PATCH": problem.patch, "SHIFTS": problem.shifts,
        "RANK": problem.rank, "HALS": problem.hals, "RELU": problem.relu, "EPS": problem.eps,
        "M_PAD": rows, "N_PAD": columns,
    }  # fmt: skip


def _num_warps(problem: Problem, blocks: int, columns: int, per_lane: int) -> int:
    """So many that a lane holds ``per_lane`` elements of ``blocks`` blocks and ``columns`` pairs of factors.

    The counts are those of the registers' report of the compiler: tests/factorizer_kernels/triton.
    """
    held = blocks * padded(problem.rows) + columns * problem.rank
    warps = padded(held * padded(problem.columns)) // (32 * per_lane)
    return min(max(warps, 1), 8)


@lru_cache(maxsize=256)
def _forward_constants(problem: Problem, product: bool) -> dict[str, Any]:
    return {**_constants(problem), "PRODUCT": product, "num_warps": _num_warps(problem, 1, 2, 64)}


@lru_cache(maxsize=256)
def _backward_constants(problem: Problem, product: bool, factor_grads: bool) -> dict[str, Any]:
    return {
        **_constants(problem), "PRODUCT": product, "FACTOR_GRADS": factor_grads,
        "num_warps": _num_warps(problem, 3, 6, 128),
    }  # fmt: skip


def forward(
    problem: Problem,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch_shape: Sequence[int],
    out: Tensor | tuple[Tensor, Tensor],
) -> None:
    """Write ``out``: y (like x), or u (windows, M, R) and v (windows, N, R) of any strides.

    x is (B, C, S1, S2, S3); u0 and v0 broadcast to the matrices' leading dimensions ``batch_shape``.
    """
    numbers = map_numbers(problem, x.shape)
    y, u, v = map_or_factors(out)
    launch(
        forward_kernel, problem.num_shifts * numbers[2], x,
        x, x.stride(), *numbers, grid_of(batch_shape), *strided(u0, batch_shape), *strided(v0, batch_shape),
        problem.num_iters, *given(y, x, 5), *given(u, x, 3), *given(v, x, 3),
        **_forward_constants(problem, y is not None),
    )  # fmt: skip


def backward(
    problem: Problem,
    factor_grads: bool,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch_shape: Sequence[int],
    grads: Tensor | tuple[Tensor, Tensor],
    dx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dx; return every window's share of the gradients of u0 and v0, (windows, M, R), (windows, N, R).

    ``grads`` is dy (like x), or du (windows, M, R) and dv (windows, N, R). grad_steps >= 1, or no
    iterations at all.
    """
    numbers = map_numbers(problem, x.shape)
    windows = numbers[2]
    programs = min(windows, 8 * processors(x))
    dy, du, dv = map_or_factors(grads)
    tape = programs * problem.grad_steps * problem.rank
    shares = problem.num_shifts * windows * problem.rank if factor_grads else 0
    du0, dv0 = u0.new_empty(shares * problem.rows), u0.new_empty(shares * problem.columns)
    u_tape, v_tape = u0.new_empty(tape * problem.rows), u0.new_empty(tape * problem.columns)
    before = (
        x, x.stride(), *numbers, grid_of(batch_shape), *strided(u0, batch_shape), *strided(v0, batch_shape),
        problem.num_iters, problem.grad_steps,
    )  # fmt: skip
    gradients = (*given(dy, x, 5), *given(du, x, 3), *given(dv, x, 3))
    constants = _backward_constants(problem, dy is not None, factor_grads)
    for copy, dx_before, dx_out in shares_of(problem, dx, u0):
        launch(
            backward_kernel, programs, x,
            *before, copy, *gradients, dx_before, dx_out, dx.stride(), du0, dv0, u_tape, v_tape, **constants,
        )  # fmt: skip
    return du0.view(-1, problem.rows, problem.rank), dv0.view(-1, problem.columns, problem.rank)
