"""Matrices too long for the chip: every iteration is one pass over X, in strips of columns.

A V step is local to a column, and a U step needs only the sums A = XV and B = VᵀV. So one pass updates V
from the current U and at once adds up the next A and B, strip by strip; the strips' sums are added in a
fixed order, and a small kernel takes the U step. The backward goes the same way: one pass for each
iteration carries v̄ back and adds up what reaches Ū, and a last pass writes x̄ once, from the small
factors of all the iterations.

Factors lie as (windows, RANK, length) here, sums as (windows, RANK * M + RANK * RANK): A, then B.
"""
# Triton knows no unpacking inside a tuple, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.triton.problem import Problem, per_window, shares_of
from factorizer_kernels.ops.nmf.triton.strips import Strips
from factorizer_kernels.ops.nmf.triton.updates import (
    add,
    add_symmetric,
    gram,
    load_columns,
    outer,
    relu,
    store_columns,
    times_columns,
    times_rows,
    update,
    update_backward,
)
from factorizer_kernels.ops.windows.address import load_map, store_map, window_of_matrix
from factorizer_kernels.shared.launches import launch, padded

MAX_RANK = 8
MAX_ROWS = 64

_RUNTIME = ["map_windows", "strips", "strip_blocks", "grad_steps"]


@triton.jit
def load_sums(sums, at, m, M: tl.constexpr, RANK: tl.constexpr):
    """(A as columns, B as scalars)."""
    start = at * (RANK * M + RANK * RANK)
    return load_columns(sums, start + m, M, m < M, RANK), load_scalars(sums, start + RANK * M, RANK * RANK)


@triton.jit
def load_scalars(pointer, start, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(pointer + start + i),)
    return values


@triton.jit
def store_sums(sums, at, m, a, b, M: tl.constexpr, RANK: tl.constexpr):
    start = at * (RANK * M + RANK * RANK)
    store_columns(sums, start + m, M, a, m < M, RANK)
    for i in tl.static_range(RANK * RANK):
        tl.store(sums + start + RANK * M + i, b[i])


@triton.jit(do_not_specialize=_RUNTIME)
def pass_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks,
    u, v, new_v, sums, y, y_strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, RANK: tl.constexpr,
    HALS: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    UPDATE: tl.constexpr, PRODUCT: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip: V's update from U (UPDATE), the strip's sums for the next U step, y (PRODUCT)."""
    at = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    u_columns = load_columns(u, at * (RANK * M) + m, M, m < M, RANK)
    u_gram = gram(u_columns, RANK)
    a = (tl.zeros([M_PAD], u.dtype.element_ty),) * RANK
    b = (tl.sum(tl.zeros([M_PAD], u.dtype.element_ty), axis=0),) * (RANK * RANK)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        block = load_map(x, x_strides, window, sizes, m, n, u, M, N, PATCH)
        if RELU:
            block = relu(block)
        v_columns = load_columns(v, at * (RANK * N) + n, N, n < N, RANK)
        if UPDATE:
            c = times_rows(block, u_columns, RANK)
            v_columns = update(v_columns, c, u_gram, n < N, HALS, EPS, RANK)
            store_columns(new_v, at * (RANK * N) + n, N, v_columns, n < N, RANK)
        if PRODUCT:
            store_map(y, y_strides, window, sizes, m, n, outer(u_columns, v_columns, RANK), M, N, PATCH)
        a = add(a, times_columns(block, v_columns, RANK), RANK)
        b = add(b, gram(v_columns, RANK), RANK * RANK)
    store_sums(sums, at * strips + strip, m, a, b, M, RANK)


@triton.jit
def update_u_kernel(
    sums, u, new_u,
    M: tl.constexpr, RANK: tl.constexpr, HALS: tl.constexpr, EPS: tl.constexpr, M_PAD: tl.constexpr,
):  # fmt: skip
    """One matrix: the U step from its sums."""
    at = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M_PAD)
    a, b = load_sums(sums, at, m, M, RANK)
    old = load_columns(u, at * (RANK * M) + m, M, m < M, RANK)
    new = update(old, a, b, m < M, HALS, EPS, RANK)
    store_columns(new_u, at * (RANK * M) + m, M, new, m < M, RANK)


@triton.jit(do_not_specialize=_RUNTIME)
def backward_pass_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks,
    u, old_v, v, dy, dy_strides, later_grad_sums, grad_v, grad_c, grad_sums,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, RANK: tl.constexpr,
    HALS: tl.constexpr, RELU: tl.constexpr, EPS: tl.constexpr,
    PRODUCT: tl.constexpr, LAST: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip: the V step's backward, in place in grad_v, and what it hands back to U and to UᵀU.

    LAST is the last iteration, whose gradient comes from dy (PRODUCT) or lies in grad_v; the gradient of
    any other one still lacks what the next U step hands back, ``later_grad_sums``.
    """
    at = (tl.program_id(0) // strips).to(tl.int64)
    strip = tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    u_columns = load_columns(u, at * (RANK * M) + m, M, m < M, RANK)
    u_gram = gram(u_columns, RANK)
    grad_u = (tl.zeros([M_PAD], u.dtype.element_ty),) * RANK
    grad_d = (tl.sum(tl.zeros([M_PAD], u.dtype.element_ty), axis=0),) * (RANK * RANK)
    if not LAST:
        grad_a, grad_b = load_sums(later_grad_sums, at, m, M, RANK)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        block = load_map(x, x_strides, window, sizes, m, n, u, M, N, PATCH)
        if RELU:
            block = relu(block)
        old = load_columns(old_v, at * (RANK * N) + n, N, n < N, RANK)
        new = load_columns(v, at * (RANK * N) + n, N, n < N, RANK)
        if LAST and PRODUCT:
            dy_block = load_map(dy, dy_strides, window, sizes, m, n, u, M, N, PATCH)
            dy_block *= 1.0 / len(SHIFTS)  # the mean over the shifts
            grad = times_rows(dy_block, u_columns, RANK)
            grad_u = add(grad_u, times_columns(dy_block, new, RANK), RANK)
        else:
            grad = load_columns(grad_v, at * (RANK * N) + n, N, n < N, RANK)
            if not LAST:
                grad = add_symmetric(add(grad, times_rows(block, grad_a, RANK), RANK), new, grad_b, RANK)
        grad, c_grad, d_grad = update_backward(
            old, new, times_rows(block, u_columns, RANK), u_gram, grad, HALS, EPS, RANK
        )
        store_columns(grad_v, at * (RANK * N) + n, N, grad, n < N, RANK)
        store_columns(grad_c, at * (RANK * N) + n, N, c_grad, n < N, RANK)
        grad_u = add(grad_u, times_columns(block, c_grad, RANK), RANK)
        grad_d = add(grad_d, d_grad, RANK * RANK)
    store_sums(grad_sums, at * strips + strip, m, grad_u, grad_d, M, RANK)


@triton.jit
def update_u_backward_kernel(
    grad_totals, sums, old_u, u, grad_u, grad_sums,
    M: tl.constexpr, RANK: tl.constexpr, HALS: tl.constexpr, EPS: tl.constexpr, M_PAD: tl.constexpr,
):  # fmt: skip
    """One matrix: the U step's backward, in place in grad_u; grad_sums gets the gradients of its A and B."""
    at = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M_PAD)
    from_v, grad_d = load_sums(grad_totals, at, m, M, RANK)
    a, b = load_sums(sums, at, m, M, RANK)
    old = load_columns(old_u, at * (RANK * M) + m, M, m < M, RANK)
    new = load_columns(u, at * (RANK * M) + m, M, m < M, RANK)
    grad = add(load_columns(grad_u, at * (RANK * M) + m, M, m < M, RANK), from_v, RANK)
    grad = add_symmetric(grad, new, grad_d, RANK)
    grad, grad_a, grad_b = update_backward(old, new, a, b, grad, HALS, EPS, RANK)
    store_columns(grad_u, at * (RANK * M) + m, M, grad, m < M, RANK)
    store_sums(grad_sums, at, m, grad_a, grad_b, M, RANK)


@triton.jit(do_not_specialize=[*_RUNTIME, "copy", "windows"])
def gradient_kernel(
    x, x_strides, sizes, heads, map_windows, windows, strips, strip_blocks, grad_steps, copy,
    u_tape, v_tape, grad_c_tape, grad_sums_tape, grad_v, dx_before, dx, dx_strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, RANK: tl.constexpr,
    RELU: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip of one copy: x̄ = Σ_i U_{i+1} C̄_iᵀ + Ā_i V_iᵀ, and what the first U step hands back to v0."""
    at = copy.to(tl.int64) * map_windows + tl.program_id(0) // strips
    strip = tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        grad_x = tl.zeros([M_PAD, BLOCK], u_tape.dtype.element_ty)
        for i in range(grad_steps):
            slot = i * windows.to(tl.int64) + at
            u = load_columns(u_tape, (slot + windows) * (RANK * M) + m, M, m < M, RANK)
            v = load_columns(v_tape, slot * (RANK * N) + n, N, n < N, RANK)
            c = load_columns(grad_c_tape, slot * (RANK * N) + n, N, n < N, RANK)
            grad_a, _grad_b = load_sums(grad_sums_tape, slot, m, M, RANK)
            grad_x += outer(u, c, RANK) + outer(grad_a, v, RANK)
        block = load_map(x, x_strides, window, sizes, m, n, u_tape, M, N, PATCH)
        if RELU:
            block = relu(block)
            grad_x = tl.where(block <= 0, 0.0, grad_x)  # NaN keeps its gradient, as in torch
        grad_a, grad_b = load_sums(grad_sums_tape, at, m, M, RANK)
        start = load_columns(v_tape, at * (RANK * N) + n, N, n < N, RANK)
        grad = load_columns(grad_v, at * (RANK * N) + n, N, n < N, RANK)
        grad = add_symmetric(add(grad, times_rows(block, grad_a, RANK), RANK), start, grad_b, RANK)
        store_columns(grad_v, at * (RANK * N) + n, N, grad, n < N, RANK)
        if copy > 0:
            grad_x += load_map(dx_before, dx_strides, window, sizes, m, n, u_tape, M, N, PATCH)
        store_map(dx, dx_strides, window, sizes, m, n, grad_x, M, N, PATCH)


def fits(problem: Problem) -> bool:
    """Whether the strips' blocks and the factors' columns fit on chip."""
    return problem.rank <= MAX_RANK and problem.rows <= MAX_ROWS and problem.num_iters > 0


def _rank_first(factor: Tensor, like: Tensor) -> Tensor:
    """A copy of (windows, L, R) as (windows, R, L), in the dtype of ``like``."""
    copy = like.new_empty((factor.shape[0], factor.shape[2], factor.shape[1]))
    return copy.copy_(factor.mT)


class _Passes(Strips):
    """The launches of one call: what they share, and its scratch memory."""

    def __init__(
        self, problem: Problem, x: Tensor, u0: Tensor, v0: Tensor, batch_shape: Sequence[int]
    ) -> None:
        super().__init__(problem, x)
        self.problem, self.x = problem, x
        # Copies: they are updated in place.
        self.u0, self.v0 = (_rank_first(per_window(f, batch_shape).flatten(0, 1), u0) for f in (u0, v0))
        self.update = {
            "M": problem.rows, "RANK": problem.rank, "HALS": problem.hals, "EPS": problem.eps,
            "M_PAD": padded(problem.rows),
        }  # fmt: skip
        self.map = {
            "M": problem.rows, "N": problem.columns, "PATCH": problem.patch, "SHIFTS": problem.shifts,
            "RANK": problem.rank, "RELU": problem.relu, "M_PAD": padded(problem.rows), "BLOCK": self.block,
        }  # fmt: skip

    def empty_sums(self, *leading: int) -> Tensor:
        return self.u0.new_empty((*leading, self.problem.rank * (self.problem.rows + self.problem.rank)))

    def over_strips(self, kernel, before_sums, after_sums, **constants) -> Tensor:
        """Launch over all the strips; return the total of the sums that they write."""
        sums = self.empty_sums(self.windows, self.strips)
        launch(
            kernel, self.windows * self.strips, self.x,
            *self.map_arguments, self.strips, self.strip_blocks, *before_sums, sums, *after_sums,
            **self.map, HALS=self.problem.hals, EPS=self.problem.eps, **constants,
        )  # fmt: skip
        return sums.sum(1)

    def sums_of(self, v: Tensor) -> Tensor:
        return self.over_strips(pass_kernel, (self.u0, v, v), (v, (0,) * 5), UPDATE=False, PRODUCT=False)

    def step_v(self, u: Tensor, v: Tensor, new_v: Tensor, y: Tensor | None) -> Tensor:
        """Write new_v, and y if it is wanted; return the sums of the next U step."""
        product = (v, (0,) * 5) if y is None else (y, y.stride())
        return self.over_strips(pass_kernel, (u, v, new_v), product, UPDATE=True, PRODUCT=y is not None)

    def step_u(self, sums: Tensor, u: Tensor, new_u: Tensor) -> None:
        launch(update_u_kernel, self.windows, self.x, sums, u, new_u, **self.update)


def forward(
    problem: Problem,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch_shape: Sequence[int],
    out: Tensor | tuple[Tensor, Tensor],
) -> None:
    """See ``resident.forward``."""
    passes = _Passes(problem, x, u0, v0, batch_shape)
    new_u, new_v = passes.u0, passes.v0
    sums = passes.sums_of(new_v)
    y = out if isinstance(out, Tensor) else None
    for i in range(problem.num_iters):
        passes.step_u(sums, new_u, new_u)
        sums = passes.step_v(new_u, new_v, new_v, y if i == problem.num_iters - 1 else None)
    if not isinstance(out, Tensor):
        out[0].copy_(new_u.mT)
        out[1].copy_(new_v.mT)


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
    """See ``resident.backward``; grad_steps >= 1."""
    steps = problem.grad_steps
    passes = _Passes(problem, x, u0, v0, batch_shape)
    u, v = passes.u0, passes.v0
    sums = passes.sums_of(v)
    for _ in range(problem.num_iters - steps):
        passes.step_u(sums, u, u)
        sums = passes.step_v(u, v, v, None)
    # Slot i: the factors before the i-th differentiated iteration, the sums that its U step takes.
    u_tape, v_tape = u.new_empty((steps + 1, *u.shape)), v.new_empty((steps + 1, *v.shape))
    sums_tape, grad_sums_tape = (
        passes.empty_sums(steps, passes.windows),
        passes.empty_sums(steps, passes.windows),
    )
    u_tape[0], v_tape[0] = u, v
    for i in range(steps):
        sums_tape[i] = sums
        passes.step_u(sums, u_tape[i], u_tape[i + 1])
        sums = passes.step_v(u_tape[i + 1], v_tape[i], v_tape[i + 1], None)

    grad_c_tape = v.new_empty((steps, *v.shape))
    if isinstance(grads, Tensor):
        grad_u, grad_v = u.new_zeros(u.shape), v.new_empty(v.shape)
        grad_y = (grads, grads.stride())
    else:
        grad_u, grad_v = _rank_first(grads[0], u), _rank_first(grads[1], u)
        grad_y = (grad_v, (0,) * 5)
    for i in reversed(range(steps)):
        last = i == steps - 1
        later = grad_sums_tape[i if last else i + 1]
        totals = passes.over_strips(
            backward_pass_kernel,
            (u_tape[i + 1], v_tape[i], v_tape[i + 1], *grad_y, later, grad_v, grad_c_tape[i]), (),
            PRODUCT=isinstance(grads, Tensor), LAST=last,
        )  # fmt: skip
        launch(
            update_u_backward_kernel, passes.windows, x,
            totals, sums_tape[i], u_tape[i], u_tape[i + 1], grad_u, grad_sums_tape[i], **passes.update,
        )  # fmt: skip
    for copy, dx_before, dx_out in shares_of(problem, dx, u0):
        launch(
            gradient_kernel, passes.map_windows * passes.strips, x,
            *passes.map_arguments, passes.windows, passes.strips, passes.strip_blocks, steps, copy,
            u_tape, v_tape, grad_c_tape, grad_sums_tape, grad_v, dx_before, dx_out, dx.stride(), **passes.map,
        )  # fmt: skip
    return grad_u.mT, grad_v.mT
