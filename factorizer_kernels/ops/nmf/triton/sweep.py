"""Any rank, any size: torch's batched matrix products, and one kernel for what they cannot do.

Above rank 8 the iterations are matrix products, and torch's library has the best ones. What is left is
the column-by-column sweep of HALS, sequential in the rank and independent in the rows: one kernel
forward, one backward. MU is elementwise. Products follow torch's float32 matmul precision.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.nmf.reference import mu_update
from factorizer_kernels.ops.nmf.triton.problem import Problem
from factorizer_kernels.ops.nmf.triton.updates import relu
from factorizer_kernels.ops.windows.triton import sw_dematricize, sw_matricize
from factorizer_kernels.shared.triton import cdiv, launch, padded

# Elements of one program's (rows, rank) block.
BLOCK_ELEMENTS = 1024


@triton.jit(do_not_specialize=["length"])
def hals_kernel(
    factor, projection, gram, new, length,
    RANK: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Rows of a factor (items, length, RANK) after one HALS update; all the arrays are contiguous."""
    j = tl.arange(0, R_PAD)
    item, offsets, mask = _rows(length, j, RANK, BLOCK)
    block = tl.load(factor + offsets, mask=mask, other=0.0)
    target = tl.load(projection + offsets, mask=mask, other=0.0)
    for r in range(RANK):
        gram_column = tl.load(gram + (item * RANK + j) * RANK + r, mask=j < RANK, other=0.0)
        others = tl.sum(block * tl.where(j == r, 0.0, gram_column)[None, :], axis=1)
        denominator = tl.load(gram + (item * RANK + r) * RANK + r) + EPS
        column = relu((_column(target, j, r) - others + EPS) / denominator)
        block = tl.where(j[None, :] == r, column[:, None], block)
    tl.store(new + offsets, block, mask=mask)


@triton.jit(do_not_specialize=["length"])
def hals_backward_kernel(
    new, gram, grad_new, grad_factor, grad_projection, length,
    RANK: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """The gradients of the old factor and of the projection, from that of the new factor."""
    j = tl.arange(0, R_PAD)
    item, offsets, mask = _rows(length, j, RANK, BLOCK)
    block = tl.load(new + offsets, mask=mask, other=0.0)
    grad = tl.load(grad_new + offsets, mask=mask, other=0.0)
    steps = tl.zeros_like(grad)
    for k in range(RANK):
        r = RANK - 1 - k
        gram_column = tl.load(gram + (item * RANK + j) * RANK + r, mask=j < RANK, other=0.0)
        denominator = tl.load(gram + (item * RANK + r) * RANK + r) + EPS
        step = tl.where(_column(block, j, r) > 0, _column(grad, j, r), 0.0) / denominator
        steps = tl.where(j[None, :] == r, step[:, None], steps)
        # The old column r was not used: its update depends on the others only.
        grad = tl.where(j[None, :] == r, 0.0, grad - step[:, None] * gram_column[None, :])
    tl.store(grad_factor + offsets, grad, mask=mask)
    tl.store(grad_projection + offsets, steps, mask=mask)


@triton.jit
def _rows(length, j, RANK: tl.constexpr, BLOCK: tl.constexpr):
    """(item, offsets of its rows' elements, which exist) of this program."""
    row_blocks = tl.cdiv(length, BLOCK)
    item = (tl.program_id(0) // row_blocks).to(tl.int64)
    i = tl.program_id(0) % row_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (i < length)[:, None] & (j < RANK)[None, :]
    return item, (item * length + i)[:, None] * RANK + j[None, :], mask


@triton.jit
def _column(block, j, r):
    return tl.sum(tl.where(j[None, :] == r, block, 0.0), axis=1)


def _launch(kernel, problem: Problem, length: int, *tensors: Tensor) -> None:
    rank_block = padded(problem.rank)
    block = max(BLOCK_ELEMENTS // rank_block, 1)
    launch(
        kernel, tensors[0].shape[0] * cdiv(length, block), tensors[0], *tensors, length,
        RANK=problem.rank, EPS=problem.eps, BLOCK=block, R_PAD=rank_block,
    )  # fmt: skip


def _update(problem: Problem, factor: Tensor, projection: Tensor, gram: Tensor) -> Tensor:
    if not problem.hals:
        return mu_update(factor, projection, gram, problem.eps)
    new = torch.empty_like(factor)
    _launch(
        hals_kernel, problem, factor.shape[1],
        factor, projection.contiguous(), gram.contiguous(), new,
    )  # fmt: skip
    return new


def _update_backward(
    problem: Problem, old: Tensor, new: Tensor, projection: Tensor, gram: Tensor, grad_new: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the old factor, the projection and the Gram matrix."""
    if not problem.hals:
        step = grad_new / (old @ gram + problem.eps)
        grad_denominator = -step * new
        grad_old = step * projection + grad_denominator @ gram.mT
        return grad_old, step * old, old.mT @ grad_denominator
    grad_old, step = torch.empty_like(new), torch.empty_like(new)
    _launch(
        hals_backward_kernel, problem, new.shape[1],
        new, gram.contiguous(), grad_new.contiguous(), grad_old, step,
    )  # fmt: skip
    # Column r saw the columns before it new, itself after the division, those behind it old.
    grad_gram = -(torch.triu(new.mT @ step) + torch.tril(old.mT @ step, -1))
    return grad_old, step, grad_gram


def _iterate(problem: Problem, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u = _update(problem, u, x @ v, v.mT @ v)
    return u, _update(problem, v, x.mT @ u, u.mT @ u)


def _iterate_backward(problem, x, old_u, old_v, u, v, grad_u, grad_v, grad_x):
    """(ū, v̄) before an iteration, from those after it; grad_x is added to in place."""
    grad_v, grad_c, grad_d = _update_backward(problem, old_v, v, x.mT @ u, u.mT @ u, grad_v)
    grad_u = grad_u + x @ grad_c + u @ (grad_d + grad_d.mT)
    grad_u, grad_a, grad_b = _update_backward(problem, old_u, u, x @ old_v, old_v.mT @ old_v, grad_u)
    grad_v = grad_v + x.mT @ grad_a + old_v @ (grad_b + grad_b.mT)
    grad_x.baddbmm_(u, grad_c.mT).baddbmm_(grad_a, old_v.mT)
    return grad_u, grad_v


def _matrices(problem: Problem, x: Tensor, mean: bool = False) -> Tensor:
    """The map's windows (windows, M, N), as they are."""
    if x.shape[1] == problem.rows and x[0, 0].numel() == problem.columns and not any(problem.flat_shifts):
        return x.reshape(-1, problem.rows, problem.columns)
    z = sw_matricize(x, problem.rows, problem.patch, problem.flat_shifts, mean)
    return z.view(-1, problem.rows, problem.columns)


def _start(problem: Problem, x: Tensor, u0: Tensor, v0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The matrices after the activation and the first factors, all contiguous, in the arithmetic's dtype."""
    z = _matrices(problem, x).to(u0.dtype)
    return (
        z.relu() if problem.relu else z,
        u0.flatten(0, 1).contiguous(),
        v0.flatten(0, 1).contiguous(),
    )


def forward(problem: Problem, x: Tensor, u0: Tensor, v0: Tensor, out: Tensor | tuple[Tensor, Tensor]) -> None:
    """See ``resident.forward``."""
    z, new_u, new_v = _start(problem, x, u0, v0)
    for _ in range(problem.num_iters):
        new_u, new_v = _iterate(problem, z, new_u, new_v)
    if isinstance(out, Tensor):
        _write_map(problem, new_u @ new_v.mT, out)
    else:
        out[0].copy_(new_u)
        out[1].copy_(new_v)


def _write_map(problem: Problem, z: Tensor, x: Tensor) -> None:
    """Write the windows z (windows, M, N), summed over the shifts, into the map x."""
    cells = x[0, 0].numel() // problem.columns
    z = z.view(-1, cells, problem.rows, problem.columns)
    x.copy_(sw_dematricize(z, x.shape, problem.rows, problem.patch, problem.flat_shifts, False))


def backward(
    problem: Problem,
    factor_grads: bool,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    grads: Tensor | tuple[Tensor, Tensor],
    dx: Tensor,
) -> tuple[Tensor, Tensor]:
    """See ``resident.backward``."""
    z, u, v = _start(problem, x, u0, v0)
    tape = []
    for i in range(problem.num_iters):
        if i >= problem.num_iters - problem.grad_steps:
            tape.append((u, v))
        u, v = _iterate(problem, z, u, v)
    if isinstance(grads, Tensor):
        grad_y = _matrices(problem, grads, mean=True).to(u.dtype)
        grad_u, grad_v = grad_y @ v, grad_y.mT @ u
    else:
        grad_u, grad_v = (grad.to(u.dtype) for grad in grads)
    grad_z = torch.zeros_like(z)
    while tape:
        old_u, old_v = tape.pop()
        grad_u, grad_v = _iterate_backward(problem, z, old_u, old_v, u, v, grad_u, grad_v, grad_z)
        u, v = old_u, old_v
    if problem.relu:
        grad_z.masked_fill_(z <= 0, 0.0)
    _write_map(problem, grad_z, dx)
    return grad_u, grad_v
