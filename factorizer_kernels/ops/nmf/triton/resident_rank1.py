"""Windows on chip where the rank-1 identity holds: rows in registers, read once, written once.

A program is one warp: a sum over the columns costs as many shuffles in each warp, however few columns it has,
and with several warps barriers. What of a large window does not fit into its registers it spills, which costs
less. Of short windows it has several, so that each lane has columns, and the arithmetic between the sums is
done for all of them at once.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.triton import rank1
from factorizer_kernels.ops.nmf.triton.problem import (
    Problem,
    given,
    grid_of,
    map_numbers,
    map_or_factors,
    shares_of,
    strided,
)
from factorizer_kernels.ops.nmf.triton.updates import add, load_factor, store_columns
from factorizer_kernels.ops.windows.address import channel_stride, first_row_offsets, window_of
from factorizer_kernels.shared.launches import cdiv, launch, padded

# A lane's columns are loads of 16 bytes.
COLUMNS_OF_A_WARP = 128


@triton.jit(do_not_specialize=["map_windows", "num_iters"])
def rank1_forward_kernel(
    x, x_strides, sizes, heads, map_windows, grid_windows, v0, v0_strides, num_iters,
    y, y_strides, u_out, u_strides, v_out, v_strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    PRODUCT: tl.constexpr, WINDOWS: tl.constexpr, M_PAD: tl.constexpr, N_PAD: tl.constexpr,
    T_PAD: tl.constexpr,
):  # fmt: skip
    """Some windows of one copy: y = uvᵀ (PRODUCT), or the factors. Arguments as of ``resident``'s."""
    # Copies of one window's neighbourhood run side by side, so that x is read from memory once.
    copy = tl.program_id(0) % len(SHIFTS)
    map_window = (tl.program_id(0) // len(SHIFTS) * WINDOWS + tl.arange(0, WINDOWS))[:, None]
    at = copy.to(tl.int64) * map_windows + map_window
    n = tl.arange(0, N_PAD)[None, :]
    there = map_window < map_windows
    mask = there & (n < N)
    window = window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)
    rows = rank1.load_rows(x, x_strides, window, sizes, n, mask, v0, M, PATCH)
    v = load_factor(v0, v0_strides, at, grid_windows, n, mask, 1)

    a, b, g, r = rank1.sums(rows, v[0], M)
    u, _history = rank1.solve(a, b, g, r, tl.arange(0, T_PAD)[None, :], num_iters, M, N, EPS)
    w, e, _inverse = rank1.scaled(u, M, EPS)
    v_row = rank1.column_of_v(rows, w, e, mask, M)

    if PRODUCT:
        offsets = first_row_offsets(n, window, sizes, y_strides, PATCH)
        store_columns(y, offsets, channel_stride(y_strides), rank1.scale(u, v_row, M), mask, M)
    else:
        # One store: for M of them the compiler would run the iterations once more in the stores' layout.
        m = tl.arange(0, M_PAD)[None, :]
        u_row = rank1.side_by_side(u, m, M)
        tl.store(u_out + at * u_strides[0] + m * u_strides[1], u_row, mask=there & (m < M))
        tl.store(v_out + at * v_strides[0] + n * v_strides[1], v_row, mask=mask)


@triton.jit(do_not_specialize=["map_windows", "num_iters", "grad_steps", "copy"])
def rank1_backward_kernel(
    x, x_strides, sizes, heads, map_windows, grid_windows, v0, v0_strides, num_iters, grad_steps, copy,
    dy, dy_strides, dx_before, dx, dx_strides, dv0,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    FACTOR_GRADS: tl.constexpr, WINDOWS: tl.constexpr, N_PAD: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """Windows of one copy: their share of dx, and of every copy but the first what those before it wrote.

    dv0 (windows, N) is one window's share each; that of u0 is zero.
    """
    map_window = (tl.program_id(0) * WINDOWS + tl.arange(0, WINDOWS))[:, None]
    at = copy.to(tl.int64) * map_windows + map_window
    n, t = tl.arange(0, N_PAD)[None, :], tl.arange(0, T_PAD)[None, :]
    mask = (map_window < map_windows) & (n < N)
    window = window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)
    rows = rank1.load_rows(x, x_strides, window, sizes, n, mask, v0, M, PATCH)
    start = load_factor(v0, v0_strides, at, grid_windows, n, mask, 1)[0]

    a, b, g, r = rank1.sums(rows, start, M)
    u, history = rank1.solve(a, b, g, r, t, num_iters, M, N, EPS)
    w, e, inverse = rank1.scaled(u, M, EPS)
    grad_u, grad_v = rank1.product_backward(
        dy, first_row_offsets(n, window, sizes, dy_strides, PATCH), channel_stride(dy_strides), mask,
        1.0 / len(SHIFTS), u, rank1.column_of_v(rows, w, e, mask, M), M,
    )  # fmt: skip
    grad_w, grad_e = rank1.times(rows, grad_v, M), rank1.total(grad_v)
    grad_u = add(grad_u, rank1.scaled_backward(u, w, e, inverse, grad_w, grad_e, M), M)
    grad_a, grad_b, both_g, grad_r = rank1.solve_backward(
        grad_u, u, b, g, r, history, t, num_iters, grad_steps, M, N, EPS
    )
    if num_iters > grad_steps:
        before = rank1.recall(history, t, num_iters - grad_steps - 1, M)
        w_start, e_start, _inverse = rank1.scaled(before, M, EPS)
        start = rank1.column_of_v(rows, w_start, e_start, mask, M)

    offsets, stride = first_row_offsets(n, window, sizes, dx_strides, PATCH), channel_stride(dx_strides)
    for i in tl.static_range(M):
        grad = rank1.gradient_row(rows, i, w, grad_v, grad_a, start, both_g, grad_r, M)
        if copy > 0:
            grad += tl.load(dx_before + offsets + i * stride, mask=mask, other=0.0)
        tl.store(dx + offsets + i * stride, grad, mask=mask)
    if FACTOR_GRADS:
        tl.store(dv0 + at * N + n, rank1.combine(rows, grad_a, M) + 2.0 * grad_b * start, mask=mask)


def fits(problem: Problem) -> bool:
    """Whether the rank-1 identity holds, and a window fits on chip."""
    return problem.rank1_closed_form and problem.on_chip


@lru_cache(maxsize=256)  # a network asks for the same few again and again
def _constants(problem: Problem) -> dict[str, Any]:
    columns = padded(problem.columns)
    return {
        "M": problem.rows, "N": problem.columns, "PATCH": problem.patch, "SHIFTS": problem.shifts,
        "EPS": problem.eps, "WINDOWS": max(COLUMNS_OF_A_WARP // columns, 1), "N_PAD": columns,
        # The iterations' history is in registers, so its length is a compile-time constant.
        "T_PAD": padded(problem.num_iters), "num_warps": 1,
    }  # fmt: skip


def forward(
    problem: Problem,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch_shape: Sequence[int],
    out: Tensor | tuple[Tensor, Tensor],
) -> None:
    """See ``resident.forward``."""
    numbers, constants = map_numbers(problem, x.shape), _constants(problem)
    y, u, v = map_or_factors(out)
    launch(
        rank1_forward_kernel, problem.num_shifts * cdiv(numbers[2], constants["WINDOWS"]), x,
        x, x.stride(), *numbers, grid_of(batch_shape), *strided(v0, batch_shape), problem.num_iters,
        *given(y, x, 5), *given(u, x, 3), *given(v, x, 3),
        PRODUCT=y is not None, M_PAD=padded(problem.rows), **constants,
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
    """See ``resident.backward``; grad_steps >= 1, and the gradient is dy."""
    assert isinstance(grads, Tensor)  # nmf_factors has no activation, so it never takes the identity
    numbers, constants = map_numbers(problem, x.shape), _constants(problem)
    shares = problem.num_shifts * numbers[2] if factor_grads else 0
    dv0 = v0.new_empty((shares, problem.columns, 1))
    for copy, dx_before, dx_out in shares_of(problem, dx, u0):
        launch(
            rank1_backward_kernel, cdiv(numbers[2], constants["WINDOWS"]), x,
            x, x.stride(), *numbers, grid_of(batch_shape), *strided(v0, batch_shape),
            problem.num_iters, problem.grad_steps, copy, grads, grads.stride(),
            dx_before, dx_out, dx.stride(), dv0, FACTOR_GRADS=factor_grads, **constants,
        )  # fmt: skip
    return u0.new_zeros((shares, problem.rows, 1)), dv0
