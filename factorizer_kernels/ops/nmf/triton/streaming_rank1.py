"""Long matrices at rank 1, where the rank-1 identity holds: two passes over X, whatever the iterations.

The first pass adds up G = XXᵀ, X1, X v0 and v0ᵀv0, strip by strip; one small program for each matrix runs
all the iterations on them; the second pass computes v and writes y. The backward adds one pass: over X
and dy for what reaches u, before the one that writes x̄.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.triton import rank1
from factorizer_kernels.ops.nmf.triton.problem import Problem, per_window, shares_of
from factorizer_kernels.ops.nmf.triton.strips import Strips
from factorizer_kernels.ops.nmf.triton.updates import relu
from factorizer_kernels.ops.windows.address import load_map, store_map, window_of_matrix
from factorizer_kernels.shared.launches import launch, padded

_RUNTIME = ["map_windows", "strips", "strip_blocks", "num_iters", "grad_steps", "copy"]


@triton.jit
def load_vector(pointer, start, m, M: tl.constexpr):
    return tl.load(pointer + start + m, mask=m < M, other=0.0)


@triton.jit
def load_square(pointer, start, m, M: tl.constexpr):
    mask = (m < M)[:, None] & (m < M)[None, :]
    return tl.load(pointer + start + m[:, None] * M + m[None, :], mask=mask, other=0.0)


@triton.jit
def store_square(pointer, start, m, square, M: tl.constexpr):
    mask = (m < M)[:, None] & (m < M)[None, :]
    tl.store(pointer + start + m[:, None] * M + m[None, :], square, mask=mask)


@triton.jit(do_not_specialize=_RUNTIME)
def sums_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, v0, sums,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip's share of (G, a, r, b): M * M + 2 M + 1 numbers."""
    at, strip = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    a, r = tl.zeros([M_PAD], v0.dtype.element_ty), tl.zeros([M_PAD], v0.dtype.element_ty)
    b = tl.sum(a, axis=0)
    g = tl.zeros([M_PAD, M_PAD], v0.dtype.element_ty)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        block = relu(load_map(x, x_strides, window, sizes, m, n, v0, M, N, PATCH))
        more_a, more_b, more_g, more_r = rank1.sums(block, load_vector(v0, at * N, n, N), m, M)
        a, b, g, r = a + more_a, b + more_b, g + more_g, r + more_r
    start = (at * strips + strip) * (M * M + 2 * M + 1)
    store_square(sums, start, m, g, M)
    tl.store(sums + start + M * M + m, a, mask=m < M)
    tl.store(sums + start + M * M + M + m, r, mask=m < M)
    tl.store(sums + start + M * M + 2 * M, b)


@triton.jit
def load_sums(sums, at, m, M: tl.constexpr):
    """(a, b, G, r) of one matrix."""
    start = at * (M * M + 2 * M + 1)
    return (
        load_vector(sums, start + M * M, m, M),
        tl.load(sums + start + M * M + 2 * M),
        load_square(sums, start, m, M),
        load_vector(sums, start + M * M + M, m, M),
    )


@triton.jit(do_not_specialize=_RUNTIME)
def solve_kernel(
    sums, u, num_iters,
    M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, M_PAD: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """All the iterations of one matrix: u after the last."""
    at = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M_PAD)
    a, b, g, r = load_sums(sums, at, m, M)
    row, _history = rank1.solve(a, b, g, r, m, tl.arange(0, T_PAD), num_iters, M, N, EPS)
    tl.store(u + at * M + m, row, mask=m < M)


@triton.jit(do_not_specialize=_RUNTIME)
def write_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, u, v, y, y_strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    PRODUCT: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip: v from u, and y = uvᵀ (PRODUCT) or v itself."""
    at, strip = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    row = load_vector(u, at * M, m, M)
    w, e, _inverse = rank1.scaled(row, EPS)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        block = relu(load_map(x, x_strides, window, sizes, m, n, u, M, N, PATCH))
        v_column = rank1.column_of_v(block, w, e, n, N)
        if PRODUCT:
            product = row[:, None] * v_column[None, :]
            store_map(y, y_strides, window, sizes, m, n, product, M, N, PATCH)
        else:
            tl.store(v + at * N + n, v_column, mask=n < N)


@triton.jit(do_not_specialize=_RUNTIME)
def product_backward_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, u, dy, dy_strides, grad_sums,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip's share of the gradients of u (through y alone), w and e: 2 M + 1 numbers."""
    at, strip = (tl.program_id(0) // strips).to(tl.int64), tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    row = load_vector(u, at * M, m, M)
    w, e, _inverse = rank1.scaled(row, EPS)
    grad_u, grad_w = tl.zeros_like(row), tl.zeros_like(row)
    grad_e = tl.sum(grad_u, axis=0)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        block = relu(load_map(x, x_strides, window, sizes, m, n, u, M, N, PATCH))
        dy_block = load_map(dy, dy_strides, window, sizes, m, n, u, M, N, PATCH)
        dy_block *= 1.0 / len(SHIFTS)  # the mean over the shifts
        grad_v = tl.sum(dy_block * row[:, None], axis=0)
        grad_u += tl.sum(dy_block * rank1.column_of_v(block, w, e, n, N)[None, :], axis=1)
        grad_w += tl.sum(block * grad_v[None, :], axis=1)
        grad_e += tl.sum(grad_v, axis=0)
    start = (at * strips + strip) * (2 * M + 1)
    tl.store(grad_sums + start + m, grad_u, mask=m < M)
    tl.store(grad_sums + start + M + m, grad_w, mask=m < M)
    tl.store(grad_sums + start + 2 * M, grad_e)


@triton.jit(do_not_specialize=_RUNTIME)
def solve_backward_kernel(
    sums, grad_sums, u, u_start, grads, num_iters, grad_steps,
    M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, M_PAD: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """All the iterations of one matrix backward: ``grads`` gets (Ḡ + Ḡᵀ, ā, r̄, b̄), laid out as the sums.

    u_start gets the u before the first differentiated iteration, if there is one.
    """
    at = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, M_PAD)
    a, b, g, r = load_sums(sums, at, m, M)
    row, history = rank1.solve(a, b, g, r, m, tl.arange(0, T_PAD), num_iters, M, N, EPS)
    w, e, inverse = rank1.scaled(row, EPS)
    start = at * (2 * M + 1)
    grad_w = load_vector(grad_sums, start + M, m, M)
    grad_e = tl.load(grad_sums + start + 2 * M)
    grad_u = load_vector(grad_sums, start, m, M)
    grad_u += rank1.scaled_backward(row, w, e, inverse, grad_w, grad_e)
    grad_a, grad_b, both_g, grad_r = rank1.solve_backward(
        grad_u, a, b, g, r, history, tl.arange(0, T_PAD), num_iters, grad_steps, N, EPS
    )
    start = at * (M * M + 2 * M + 1)
    store_square(grads, start, m, both_g, M)
    tl.store(grads + start + M * M + m, grad_a, mask=m < M)
    tl.store(grads + start + M * M + M + m, grad_r, mask=m < M)
    tl.store(grads + start + M * M + 2 * M, grad_b)
    before = rank1.row(history, tl.arange(0, T_PAD), num_iters - grad_steps - 1)
    tl.store(u_start + at * M + m, before, mask=m < M)


@triton.jit(do_not_specialize=_RUNTIME)
def gradient_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, copy,
    u, u_start, v0, grads, dy, dy_strides, dx_before, dx, dx_strides, dv0,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    FROM_V0: tl.constexpr, M_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip of one copy: x̄ and v̄0. FROM_V0: every iteration is differentiated."""
    at, strip = copy.to(tl.int64) * map_windows + tl.program_id(0) // strips, tl.program_id(0) % strips
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m = tl.arange(0, M_PAD)
    row = load_vector(u, at * M, m, M)
    w, _e, _inverse = rank1.scaled(row, EPS)
    w_start, e_start, _inverse = rank1.scaled(load_vector(u_start, at * M, m, M), EPS)
    grad_a, grad_b, both_g, grad_r = load_sums(grads, at, m, M)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)
        block = relu(load_map(x, x_strides, window, sizes, m, n, u, M, N, PATCH))
        dy_block = load_map(dy, dy_strides, window, sizes, m, n, u, M, N, PATCH)
        dy_block *= 1.0 / len(SHIFTS)  # the mean over the shifts
        start = load_vector(v0, at * N, n, N) if FROM_V0 else rank1.column_of_v(block, w_start, e_start, n, N)
        grad_v = tl.sum(dy_block * row[:, None], axis=0)
        grad_x = rank1.map_gradient(block, w, grad_v, grad_a, start, both_g, grad_r, m, M)
        grad_x = tl.where(block <= 0, 0.0, grad_x)  # NaN keeps its gradient, as in torch
        if copy > 0:
            grad_x += load_map(dx_before, dx_strides, window, sizes, m, n, u, M, N, PATCH)
        store_map(dx, dx_strides, window, sizes, m, n, grad_x, M, N, PATCH)
        grad_v0 = tl.sum(block * grad_a[:, None], axis=0) + 2.0 * grad_b * start
        tl.store(dv0 + at * N + n, grad_v0, mask=n < N)


def fits(problem: Problem) -> bool:
    """Whether the rank-1 identity holds, and G fits on chip."""
    return problem.rank1_closed_form


class _Passes(Strips):
    """The launches of one call: what they share."""

    def __init__(
        self, problem: Problem, x: Tensor, u0: Tensor, v0: Tensor, batch_shape: Sequence[int]
    ) -> None:
        super().__init__(problem, x)
        self.problem, self.x = problem, x
        self.v0 = per_window(v0, batch_shape).flatten(0, 1).contiguous()
        rows = padded(problem.rows)
        self.map = {
            "M": problem.rows, "N": problem.columns, "PATCH": problem.patch, "SHIFTS": problem.shifts,
            "EPS": problem.eps, "M_PAD": rows, "BLOCK": self.block,
        }  # fmt: skip
        self.solve = {
            "M": problem.rows, "N": problem.columns, "EPS": problem.eps, "M_PAD": rows,
            "T_PAD": padded(problem.num_iters), "num_warps": 1,
        }  # fmt: skip

    def over_strips(self, kernel, *tensors, **constants) -> None:
        launch(
            kernel, self.windows * self.strips, self.x,
            *self.map_arguments, self.strips, self.strip_blocks, *tensors, **self.map, **constants,
        )  # fmt: skip

    def sums_and_u(self) -> tuple[Tensor, Tensor]:
        rows = self.problem.rows
        sums = self.v0.new_empty((self.windows, self.strips, rows * rows + 2 * rows + 1))
        self.over_strips(sums_kernel, self.v0, sums)
        sums = sums.sum(1)
        u = self.v0.new_empty((self.windows, rows))
        launch(solve_kernel, self.windows, self.x, sums, u, self.problem.num_iters, **self.solve)
        return sums, u


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
    _, new_u = passes.sums_and_u()
    if isinstance(out, Tensor):
        passes.over_strips(write_kernel, new_u, new_u, out, out.stride(), PRODUCT=True)
    else:
        new_v = passes.v0.new_empty(passes.v0.shape)
        passes.over_strips(write_kernel, new_u, new_v, new_v, (0,) * 5, PRODUCT=False)
        out[0].copy_(new_u.unsqueeze(-1))
        out[1].copy_(new_v)


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
    dy = grads
    passes = _Passes(problem, x, u0, v0, batch_shape)
    rows = problem.rows
    sums, u = passes.sums_and_u()
    grad_sums = u.new_empty((passes.windows, passes.strips, 2 * rows + 1))
    passes.over_strips(product_backward_kernel, u, dy, dy.stride(), grad_sums)
    grad_totals, u_start = u.new_empty(sums.shape), u.new_empty(u.shape)
    launch(
        solve_backward_kernel, passes.windows, x,
        sums, grad_sums.sum(1), u, u_start, grad_totals,
        problem.num_iters, problem.grad_steps, **passes.solve,
    )  # fmt: skip
    dv0 = passes.v0.new_empty(passes.v0.shape)
    for copy, dx_before, dx_out in shares_of(problem, dx, u0):
        launch(
            gradient_kernel, passes.map_windows * passes.strips, x,
            *passes.map_arguments, passes.strips, passes.strip_blocks, copy,
            u, u_start, passes.v0, grad_totals, dy, dy.stride(), dx_before, dx_out, dx.stride(), dv0,
            FROM_V0=problem.grad_steps == problem.num_iters, **passes.map,
        )  # fmt: skip
    return u.new_zeros((passes.windows, rows, 1)), dv0
