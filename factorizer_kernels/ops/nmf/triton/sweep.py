"""Any rank, any size: torch's batched matrix products, and one kernel for each update of a factor.

Above rank 8 the iterations are matrix products, and the vendor's library has the best ones. Half an iteration
is three launches: the projection XV, the Gram matrix VᵀV, and a kernel for all that is left. MU's kernel
multiplies the factor with the small Gram matrix itself; that of HALS goes through the columns, sequential in
the rank and independent in the rows. Half of the backward of an iteration is three launches too: the
kernel, the gradient of the Gram matrix, and a product with X that is added to the other factor's gradient.

The factors of all the iterations lie beside one another, and so do their gradients' counterparts, so that
x̄ = Σ_i U_{i+1} C̄_iᵀ + Ā_i V_iᵀ is one product, and is written once. All products follow torch's float32
matmul precision.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.triton.problem import Problem, per_window
from factorizer_kernels.ops.nmf.triton.updates import relu
from factorizer_kernels.ops.windows.triton import sw_dematricize, sw_matricize
from factorizer_kernels.shared.dtypes import autocast_disabled
from factorizer_kernels.shared.launches import cdiv, launch, padded, product_precision

# Elements of one program's (rows, rank) block in HALS; rows and most columns of a block in MU.
BLOCK_ELEMENTS = 1024
MU_ROWS, MU_COLUMNS = 16, 64

# Factors in the kernels are (items, length, RANK), with strides (item, row): they may be slots of a tape.
# What else has rows is contiguous, and so are the squares (items, RANK, RANK).


@triton.jit
def _block(length, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(item, rows, columns) of this program."""
    column_blocks: tl.constexpr = (RANK + COLUMNS - 1) // COLUMNS
    row_blocks = tl.cdiv(length, ROWS)
    block = tl.program_id(0) // column_blocks
    i = block % row_blocks * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    return (block // row_blocks).to(tl.int64), i.to(tl.int64), j


@triton.jit
def _load(factor, strides, item, i, j, length, RANK: tl.constexpr):
    at = item * strides[0] + i[:, None] * strides[1] + j[None, :]
    return tl.load(factor + at, mask=(i < length)[:, None] & (j < RANK)[None, :], other=0.0)


@triton.jit
def _store(factor, strides, item, i, j, block, length, RANK: tl.constexpr):
    at = item * strides[0] + i[:, None] * strides[1] + j[None, :]
    tl.store(factor + at, block, mask=(i < length)[:, None] & (j < RANK)[None, :])


@triton.jit
def _times(
    total, factor, strides, square, item, i, j, length, RANK: tl.constexpr, SYMMETRIC: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + rows i of the factor times columns j of the square, or (SYMMETRIC) of it and its transpose."""
    for start in range(0, RANK, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        inside = (k < RANK)[:, None] & (j < RANK)[None, :]
        rows = square + (item * RANK + k)[:, None] * RANK + j[None, :]
        block = tl.load(rows, mask=inside, other=0.0)
        if SYMMETRIC:
            columns = square + (item * RANK + j)[None, :] * RANK + k[:, None]
            block += tl.load(columns, mask=inside, other=0.0)
        rows_of_factor = _load(factor, strides, item, i, k, length, RANK)
        total = tl.dot(rows_of_factor, block, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit(do_not_specialize=["length"])
def mu_kernel(
    factor, factor_strides, projection, gram, new, new_strides, length,
    RANK: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of a factor after one MU update: F∘A / (FB + ε)."""
    item, i, j = _block(length, RANK, ROWS, COLUMNS)
    old = _load(factor, factor_strides, item, i, j, length, RANK)
    target = _load(projection, (length * RANK, RANK), item, i, j, length, RANK)
    denominator = _times(
        tl.zeros_like(old), factor, factor_strides, gram, item, i, j, length, RANK, False, COLUMNS, PRECISION
    )
    _store(new, new_strides, item, i, j, old * target / (denominator + EPS), length, RANK)


@triton.jit(do_not_specialize=["length"])
def mu_backward_kernel(
    old, new, strides, projection, gram, grad, grad_gram, later_denominators, later_gram,
    grad_projection, grad_projection_strides, denominators, length,
    RANK: tl.constexpr, EPS: tl.constexpr, HANDED: tl.constexpr, CARRIED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the projection, of the denominators and, in place in ``grad``, of the old factor.

    What the latter lacks is the denominators' part, a product with ``gram``: the next kernel, whose
    ``later_*`` they are, adds it (CARRIED), together with what the new factor's Gram matrix hands back
    (HANDED). So a block's columns need nothing of the other columns' results, at any rank.
    """
    item, i, j = _block(length, RANK, ROWS, COLUMNS)
    contiguous = (length * RANK, RANK)
    total = _load(grad, contiguous, item, i, j, length, RANK)
    if HANDED:
        total = _times(
            total, new, strides, grad_gram, item, i, j, length, RANK, True, COLUMNS, PRECISION
        )  # fmt: skip
    if CARRIED:
        total = _times(
            total, later_denominators, contiguous, later_gram, item, i, j, length, RANK, False, COLUMNS,
            PRECISION,
        )  # fmt: skip
    denominator = _times(
        tl.zeros_like(total), old, strides, gram, item, i, j, length, RANK, False, COLUMNS, PRECISION
    )
    step = total / (denominator + EPS)
    target = _load(projection, contiguous, item, i, j, length, RANK)
    before = _load(old, strides, item, i, j, length, RANK)
    after = _load(new, strides, item, i, j, length, RANK)
    _store(grad, contiguous, item, i, j, step * target, length, RANK)
    _store(grad_projection, grad_projection_strides, item, i, j, step * before, length, RANK)
    _store(denominators, contiguous, item, i, j, -step * after, length, RANK)


@triton.jit(do_not_specialize=["length"])
def hals_kernel(
    factor, factor_strides, projection, gram, new, new_strides, length,
    RANK: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows of a factor after one HALS update."""
    item, i, j = _block(length, RANK, ROWS, COLUMNS)
    block = _load(factor, factor_strides, item, i, j, length, RANK)
    target = _load(projection, (length * RANK, RANK), item, i, j, length, RANK)
    square = gram + item * RANK * RANK
    for r in range(RANK):
        gram_column = tl.load(square + j * RANK + r, mask=j < RANK, other=0.0)
        # A_r − Σ_{j≠r} F_j B_jr in one sum over the columns.
        terms = tl.where(j[None, :] == r, target, -block * gram_column[None, :])
        column = relu((tl.sum(terms, axis=1) + EPS) / (tl.load(square + r * RANK + r) + EPS))
        block = tl.where(j[None, :] == r, column[:, None], block)
    _store(new, new_strides, item, i, j, block, length, RANK)


@triton.jit(do_not_specialize=["length"])
def hals_backward_kernel(
    new, strides, gram, grad, grad_gram, grad_projection, grad_projection_strides, length,
    RANK: tl.constexpr, EPS: tl.constexpr, HANDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of the projection and, in place in ``grad``, of the old factor.

    ``grad_gram`` (items, 2 RANK, RANK) is what the new factor's Gram matrix hands back (HANDED): see
    ``_gram_gradient``.
    """
    item, i, j = _block(length, RANK, ROWS, COLUMNS)
    block = _load(new, strides, item, i, j, length, RANK)
    total = _load(grad, (length * RANK, RANK), item, i, j, length, RANK)
    steps = tl.zeros_like(total)
    square, pair = gram + item * RANK * RANK, grad_gram + item * 2 * RANK * RANK
    for k in range(RANK):
        r = RANK - 1 - k
        terms = tl.where(j[None, :] == r, total, 0.0)
        if HANDED:  # F (D̄ + D̄ᵀ), column r
            column = tl.load(pair + (j + tl.where(j <= r, RANK, 0)) * RANK + r, mask=j < RANK, other=0.0)
            row = tl.load(pair + (r + tl.where(r <= j, RANK, 0)) * RANK + j, mask=j < RANK, other=0.0)
            terms -= block * (column + row)[None, :]
        column_r = tl.load(new + item * strides[0] + i * strides[1] + r, mask=i < length, other=0.0)
        denominator = tl.load(square + r * RANK + r) + EPS
        step = tl.where(column_r > 0, tl.sum(terms, axis=1), 0.0) / denominator
        steps = tl.where(j[None, :] == r, step[:, None], steps)
        # The old column r was not used: its update depends on the others only.
        gram_column = tl.load(square + j * RANK + r, mask=j < RANK, other=0.0)
        total = tl.where(j[None, :] == r, 0.0, total - step[:, None] * gram_column[None, :])
    _store(grad, (length * RANK, RANK), item, i, j, total, length, RANK)
    _store(grad_projection, grad_projection_strides, item, i, j, steps, length, RANK)


def _launch(kernel, problem: Problem, like: Tensor, *arguments, **constants) -> None:
    """Launch over the blocks of a factor (items, length, R), the shape of ``like``."""
    items, length, rank = like.shape
    rows, columns = max(BLOCK_ELEMENTS // padded(rank), 1), padded(rank)
    if not problem.hals:
        rows, columns = MU_ROWS, min(max(columns, 16), MU_COLUMNS)
        constants |= {"PRECISION": product_precision(), "num_stages": 1}
    launch(
        kernel, items * cdiv(length, rows) * cdiv(rank, columns), like,
        *arguments, length, RANK=rank, EPS=problem.eps, ROWS=rows, COLUMNS=columns, **constants,
    )  # fmt: skip


def _strides(factor: Tensor) -> tuple[int, int]:
    return factor.stride(0), factor.stride(1)


def _gram(factor: Tensor) -> Tensor:
    return torch.bmm(factor.mT, factor)


def _update(problem: Problem, factor: Tensor, projection: Tensor, gram: Tensor, new: Tensor) -> None:
    """Write ``new``, the factor after an update."""
    _launch(
        hals_kernel if problem.hals else mu_kernel, problem, new,
        factor, _strides(factor), projection, gram, new, _strides(new),
    )  # fmt: skip


def _iterate(problem: Problem, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    new_u, new_v = x.new_empty(u.shape), x.new_empty(v.shape)
    _update(problem, u, torch.bmm(x, v), _gram(v), new_u)
    _update(problem, v, torch.bmm(x.mT, new_u), _gram(new_u), new_v)
    return new_u, new_v


class _Updates:
    """The updates of one factor on the way back, the last one first.

    Attributes:
        factors: (items, length, steps + 1, R), before and after each update.
        grad_projections: (items, length, steps, R), written by :meth:`backward`.
        grad: (items, length, R), contiguous: the gradient of the factor, as far as it was handed back.
    """

    def __init__(self, problem: Problem, factors: Tensor, grad_projections: Tensor, grad: Tensor) -> None:
        self.problem, self.factors, self.grad_projections = problem, factors, grad_projections
        self.grad = grad
        self.taken: list[tuple[Tensor | None, Tensor]] = []  # MU's projection, and the other's Gram matrix
        # MU: the gradient of the denominators of the update after, and the Gram matrix in them.
        self.later: tuple[Tensor, Tensor] | None = None

    def __getitem__(self, i: int) -> Tensor:
        return self.factors[:, :, i]

    def forward(self, i: int, x: Tensor, other: Tensor) -> None:
        """Update i, from the other factor."""
        projection, gram = torch.bmm(x, other), _gram(other)
        _update(self.problem, self[i], projection, gram, self[i + 1])
        self.taken.append((None if self.problem.hals else projection, gram))

    def backward(self, i: int, grad_gram: Tensor | None) -> None:
        """Back through update i; ``grad_gram`` is what the new factor's Gram matrix hands back."""
        projection, gram = self.taken.pop()
        old, new, grad_projection = self[i], self[i + 1], self.grad_projections[:, :, i]
        handed = gram if grad_gram is None else grad_gram  # a stand-in that is not read
        if self.problem.hals:
            _launch(
                hals_backward_kernel, self.problem, new,
                new, _strides(new), gram, self.grad, handed, grad_projection, _strides(grad_projection),
                HANDED=grad_gram is not None,
            )  # fmt: skip
            return
        denominators = torch.empty_like(self.grad)
        later = (self.grad, gram) if self.later is None else self.later
        _launch(
            mu_backward_kernel, self.problem, new,
            old, new, _strides(new), projection, gram, self.grad, handed, *later,
            grad_projection, _strides(grad_projection), denominators,
            HANDED=grad_gram is not None, CARRIED=self.later is not None,
        )  # fmt: skip
        self.later = denominators, gram

    def gram_gradient(self, i: int) -> Tensor:
        """What update i, gone back through, hands back to the other factor's Gram matrix.

        MU: D̄ (items, R, R). HALS: the products of the old and of the new factor with the projection's
        gradient, (items, 2 R, R). Column r saw the columns before it new, itself after the division, those
        behind it old: D̄ is minus the upper triangle of the latter product and the lower one of the former.
        """
        if self.problem.hals:
            both = self.factors[:, :, i : i + 2].flatten(2)
            return torch.bmm(both.mT, self.grad_projections[:, :, i])
        assert self.later is not None
        return torch.bmm(self[i].mT, self.later[0])

    def first_gradient(self, grad_gram: Tensor | None) -> Tensor:
        """The gradient of the first factor, with what its Gram matrix hands back."""
        if self.later is not None:
            self.grad.baddbmm_(*self.later)
        if grad_gram is None:
            return self.grad
        if self.problem.hals:
            old, new = grad_gram.unflatten(1, (2, -1)).unbind(1)
            grad_gram = -(new.triu() + old.tril(-1))
        return self.grad.baddbmm_(self[0], grad_gram + grad_gram.mT)


def _whole(problem: Problem, x: Tensor) -> bool:
    """Whether the map's matrices are its one window an item, as they lie."""
    one = x.shape[1] == problem.rows and x[0, 0].numel() == problem.columns
    return one and not any(problem.flat_shifts) and problem.num_shifts == 1


def _matrices(problem: Problem, x: Tensor, mean: bool = False) -> Tensor:
    """The map's windows (windows, M, N), as they are."""
    if _whole(problem, x):
        return x.reshape(-1, problem.rows, problem.columns)
    z = sw_matricize(x, problem.rows, problem.patch, problem.flat_shifts, mean)
    return z.view(-1, problem.rows, problem.columns)


def _packed(z: Tensor) -> Tensor:
    """z, or a copy that torch multiplies without copying it each time: rows or columns are contiguous."""
    rows = z.stride(-1) == 1 and z.stride(-2) >= z.shape[-1]
    columns = z.stride(-2) == 1 and z.stride(-1) >= z.shape[-2]
    return z if rows or columns else z.contiguous()


def _start(
    problem: Problem, x: Tensor, u0: Tensor, v0: Tensor, batch_shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices after the activation in the arithmetic's dtype, and the first factors (items, L, R)."""
    z = _packed(_matrices(problem, x).to(u0.dtype))
    u, v = (per_window(f, batch_shape).flatten(0, 1) for f in (u0, v0))
    u, v = (f if f.stride(-1) == 1 else f.contiguous() for f in (u, v))
    return z.relu() if problem.relu else z, u, v


def forward(
    problem: Problem,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch_shape: Sequence[int],
    out: Tensor | tuple[Tensor, Tensor],
) -> None:
    """See ``resident.forward``."""
    with autocast_disabled(x):
        z, u, v = _start(problem, x, u0, v0, batch_shape)
        for _ in range(problem.num_iters):
            u, v = _iterate(problem, z, u, v)
        if isinstance(out, Tensor):
            _write_map(problem, u, v, out)
        else:
            out[0].copy_(u)
            out[1].copy_(v)


def _write_map(problem: Problem, u: Tensor, v: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """Write UVᵀ, zero where the mask is true, into the map x: its windows, summed over the shifts."""
    whole = _whole(problem, x)
    out = x.view(-1, problem.rows, problem.columns) if whole and x.dtype == u.dtype else None
    z = torch.bmm(u, v.mT, out=out)
    if mask is not None:
        z.masked_fill_(mask, 0.0)
    if whole and out is None:
        x.copy_(z.view(x.shape))
    elif not whole:
        cells = x[0, 0].numel() // problem.columns
        z = z.view(-1, cells, problem.rows, problem.columns)
        x.copy_(sw_dematricize(z, x.shape, problem.rows, problem.patch, problem.flat_shifts, False))


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
    """See ``resident.backward``."""
    with autocast_disabled(x):
        return _backward(problem, factor_grads, x, u0, v0, batch_shape, grads, dx)


def _backward(problem, factor_grads, x, u0, v0, batch_shape, grads, dx):
    z, u, v = _start(problem, x, u0, v0, batch_shape)
    steps, rank = problem.grad_steps, problem.rank
    for _ in range(problem.num_iters - steps):
        u, v = _iterate(problem, z, u, v)
    # Beside each other: U_0, then U_1.. and Ā_0..; C̄_0.. and V_0.., then V_T. What is between is x̄'s product.
    left = z.new_empty((*u.shape[:2], 2 * steps + 1, rank))
    right = z.new_empty((*v.shape[:2], 2 * steps + 1, rank))
    left[:, :, 0], right[:, :, steps] = u, v
    us = _Updates(problem, left[:, :, : steps + 1], left[:, :, steps + 1 :], z.new_empty(u.shape))
    vs = _Updates(problem, right[:, :, steps:], right[:, :, :steps], z.new_empty(v.shape))
    for i in range(steps):
        us.forward(i, z, vs[i])
        vs.forward(i, z.mT, us[i + 1])
    if isinstance(grads, Tensor):
        grad_y = _packed(_matrices(problem, grads, mean=True).to(z.dtype))
        torch.bmm(grad_y, vs[steps], out=us.grad)
        torch.bmm(grad_y.mT, us[steps], out=vs.grad)
    else:
        us.grad.copy_(grads[0])
        vs.grad.copy_(grads[1])
    grad_gram = None
    for i in reversed(range(steps)):
        vs.backward(i, grad_gram)
        us.grad.baddbmm_(z, vs.grad_projections[:, :, i])
        us.backward(i, vs.gram_gradient(i))
        if i == 0 and not factor_grads:
            break
        vs.grad.baddbmm_(z.mT, us.grad_projections[:, :, i])
        grad_gram = us.gram_gradient(i)
    left, right = left[:, :, 1:].flatten(2), right[:, :, : 2 * steps].flatten(2)
    _write_map(problem, left, right, dx, z <= 0 if problem.relu else None)
    if not factor_grads:
        return us.grad, vs.grad
    return us.first_gradient(None), vs.first_gradient(grad_gram)
