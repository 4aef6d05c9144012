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
from factorizer_kernels.ops.nmf.triton.updates import add, converted, load_columns, store_columns
from factorizer_kernels.ops.windows.address import channel_stride, first_row_offsets, window_of_matrix
from factorizer_kernels.shared.launches import launch, padded

_RUNTIME = ["map_windows", "strips", "strip_blocks", "num_iters", "grad_steps", "copy"]


@triton.jit
def place(
    first, map_windows, strips, sizes, heads, M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr
):  # fmt: skip
    """(matrix, strip, window) of this program; matrix is a (1, 1) block, counted from ``first`` on."""
    at = first + (tl.program_id(0) // strips).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    return at, tl.program_id(0) % strips, window


@triton.jit
def load_numbers(pointer, start, COUNT: tl.constexpr):
    return load_columns(pointer, start, 1, start >= 0, COUNT)


@triton.jit
def store_numbers(pointer, start, numbers, COUNT: tl.constexpr):
    store_columns(pointer, start, 1, numbers, start >= 0, COUNT)


@triton.jit(do_not_specialize=_RUNTIME)
def sums_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, v0, shares,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip's share of (G, a, r, b): M * M + 2 M + 1 numbers."""
    at, strip, window = place(0, map_windows, strips, sizes, heads, M, PATCH, SHIFTS)
    zero = tl.zeros([1, 1], v0.dtype.element_ty)
    a, b, g, r = (zero,) * M, zero, (zero,) * (M * M), (zero,) * M
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)[None, :]
        rows = rank1.load_rows(x, x_strides, window, sizes, n, n < N, v0, M, PATCH)
        start = tl.load(v0 + at * N + n, mask=n < N, other=0.0)
        more_a, more_b, more_g, more_r = rank1.sums(rows, start, M)
        a, b, g, r = add(a, more_a, M), b + more_b, add(g, more_g, M * M), add(r, more_r, M)
    store_sums(shares, at * strips + strip, a, b, g, r, M)


@triton.jit
def store_sums(sums, at, a, b, g, r, M: tl.constexpr):
    start = at * (M * M + 2 * M + 1)
    store_numbers(sums, start, g, M * M)
    store_numbers(sums, start + M * M, a, M)
    store_numbers(sums, start + M * M + M, r, M)
    store_numbers(sums, start + M * M + 2 * M, (b,), 1)


@triton.jit
def load_sums(sums, at, M: tl.constexpr):
    """(a, b, G, r) of one matrix."""
    start = at * (M * M + 2 * M + 1)
    return (
        load_numbers(sums, start + M * M, M),
        load_numbers(sums, start + M * M + 2 * M, 1)[0],
        load_numbers(sums, start, M * M),
        load_numbers(sums, start + M * M + M, M),
    )


@triton.jit(do_not_specialize=_RUNTIME)
def solve_kernel(
    sums, u, num_iters, M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, T_PAD: tl.constexpr
):  # fmt: skip
    """All the iterations of one matrix: u after the last."""
    at = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    a, b, g, r = load_sums(sums, at, M)
    new_u, _history = rank1.solve(a, b, g, r, tl.arange(0, T_PAD)[None, :], num_iters, M, N, EPS)
    store_numbers(u, at * M, new_u, M)


@triton.jit(do_not_specialize=_RUNTIME)
def write_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, u, v, y, y_strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip: v from u, and y = uvᵀ (PRODUCT) or v itself."""
    at, strip, window = place(0, map_windows, strips, sizes, heads, M, PATCH, SHIFTS)
    final_u = load_numbers(u, at * M, M)
    w, e, _inverse = rank1.scaled(final_u, M, EPS)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)[None, :]
        rows = rank1.load_rows(x, x_strides, window, sizes, n, n < N, u, M, PATCH)
        v_row = rank1.column_of_v(rows, w, e, n < N, M)
        if PRODUCT:
            offsets = first_row_offsets(n, window, sizes, y_strides, PATCH)
            store_columns(y, offsets, channel_stride(y_strides), rank1.scale(final_u, v_row, M), n < N, M)
        else:
            tl.store(v + at * N + n, v_row, mask=n < N)


@triton.jit(do_not_specialize=_RUNTIME)
def product_backward_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, u, dy, dy_strides, shares,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip's share of the gradients of u (through y alone), w and e: 2 M + 1 numbers."""
    at, strip, window = place(0, map_windows, strips, sizes, heads, M, PATCH, SHIFTS)
    final_u = load_numbers(u, at * M, M)
    w, e, _inverse = rank1.scaled(final_u, M, EPS)
    zero = tl.zeros_like(e)
    grad_u, grad_w, grad_e = (zero,) * M, (zero,) * M, zero
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)[None, :]
        rows = rank1.load_rows(x, x_strides, window, sizes, n, n < N, u, M, PATCH)
        more_u, grad_v = rank1.product_backward(
            dy, first_row_offsets(n, window, sizes, dy_strides, PATCH), channel_stride(dy_strides), n < N,
            1.0 / len(SHIFTS), final_u, rank1.column_of_v(rows, w, e, n < N, M), M,
        )  # fmt: skip
        grad_u = add(grad_u, more_u, M)
        grad_w = add(grad_w, rank1.times(rows, grad_v, M), M)
        grad_e += rank1.total(grad_v)
    start = (at * strips + strip) * (2 * M + 1)
    store_numbers(shares, start, grad_u, M)
    store_numbers(shares, start + M, grad_w, M)
    store_numbers(shares, start + 2 * M, (grad_e,), 1)


@triton.jit(do_not_specialize=_RUNTIME)
def solve_backward_kernel(
    sums, grad_sums, u_start, grads, num_iters, grad_steps,
    M: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """All the iterations of one matrix backward: ``grads`` gets (Ḡ + Ḡᵀ, ā, r̄, b̄), laid out as the sums.

    u_start gets the u before the first differentiated iteration, zero if there is none.
    """
    at = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    t = tl.arange(0, T_PAD)[None, :]
    a, b, g, r = load_sums(sums, at, M)
    u, history = rank1.solve(a, b, g, r, t, num_iters, M, N, EPS)
    w, e, inverse = rank1.scaled(u, M, EPS)
    start = at * (2 * M + 1)
    grad_u, grad_w = load_numbers(grad_sums, start, M), load_numbers(grad_sums, start + M, M)
    grad_e = load_numbers(grad_sums, start + 2 * M, 1)[0]
    grad_u = add(grad_u, rank1.scaled_backward(u, w, e, inverse, grad_w, grad_e, M), M)
    grad_a, grad_b, both_g, grad_r = rank1.solve_backward(
        grad_u, u, b, g, r, history, t, num_iters, grad_steps, M, N, EPS
    )
    store_sums(grads, at, grad_a, grad_b, both_g, grad_r, M)
    store_numbers(u_start, at * M, rank1.recall(history, t, num_iters - grad_steps - 1, M), M)


@triton.jit(do_not_specialize=_RUNTIME)
def gradient_kernel(
    x, x_strides, sizes, heads, map_windows, strips, strip_blocks, copy,
    u, u_start, v0, grads, dy, dy_strides, dx_before, dx, dx_strides, dv0,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr, EPS: tl.constexpr,
    FROM_V0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One strip of one copy: x̄ and v̄0. FROM_V0: every iteration is differentiated."""
    first = copy.to(tl.int64) * map_windows
    at, strip, window = place(first, map_windows, strips, sizes, heads, M, PATCH, SHIFTS)
    final_u = load_numbers(u, at * M, M)
    w, _e, _inverse = rank1.scaled(final_u, M, EPS)
    w_start, e_start, _inverse = rank1.scaled(load_numbers(u_start, at * M, M), M, EPS)
    grad_a, grad_b, both_g, grad_r = load_sums(grads, at, M)
    for k in range(strip_blocks):
        n = (strip * strip_blocks + k) * BLOCK + tl.arange(0, BLOCK)[None, :]
        rows = rank1.load_rows(x, x_strides, window, sizes, n, n < N, u, M, PATCH)
        dy_offsets = first_row_offsets(n, window, sizes, dy_strides, PATCH)
        grads_y = converted(load_columns(dy, dy_offsets, channel_stride(dy_strides), n < N, M), u, M)
        grad_v = rank1.combine(grads_y, final_u, M) * (1.0 / len(SHIFTS))  # y is the mean over the shifts
        if FROM_V0:
            start = tl.load(v0 + at * N + n, mask=n < N, other=0.0)
        else:
            start = rank1.column_of_v(rows, w_start, e_start, n < N, M)
        offsets, stride = first_row_offsets(n, window, sizes, dx_strides, PATCH), channel_stride(dx_strides)
        for i in tl.static_range(M):
            grad = rank1.gradient_row(rows, i, w, grad_v, grad_a, start, both_g, grad_r, M)
            if copy > 0:
                grad += tl.load(dx_before + offsets + i * stride, mask=n < N, other=0.0)
            tl.store(dx + offsets + i * stride, grad, mask=n < N)
        grad_v0 = rank1.combine(rows, grad_a, M) + 2.0 * grad_b * start
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
        sizes = {"M": problem.rows, "N": problem.columns, "EPS": problem.eps, "num_warps": 1}
        self.map = {**sizes, "PATCH": problem.patch, "SHIFTS": problem.shifts, "BLOCK": self.block}
        self.solve = {**sizes, "T_PAD": padded(problem.num_iters)}

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
        sums, grad_sums.sum(1), u_start, grad_totals, problem.num_iters, problem.grad_steps, **passes.solve,
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
