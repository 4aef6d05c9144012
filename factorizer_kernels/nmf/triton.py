"""Triton: which kernels run ``nmf`` and ``nmf_factors``. The kernels are in ``factorizer_kernels._triton``."""

import torch
from torch import Tensor

from factorizer_kernels import _ops
from factorizer_kernels._triton import resident, streaming, streaming_rank1, sweep
from factorizer_kernels._triton.launch import Problem, per_window


def path(problem: Problem):
    """The kernels for a problem: the window on chip, else passes over it, else any rank by matrix products."""
    return next((kernels for kernels in (resident, streaming_rank1, streaming) if kernels.fits(problem)), sweep)


def as_map(x: Tensor) -> Tensor:
    """Matrices (..., M, N) as the feature map (B, M, 1, 1, N), whose one window per item is the matrix."""
    rows, columns = x.shape[-2:]
    return x.reshape(-1, rows, 1, 1, columns)


def matrices(x: Tensor, rank: int, num_iters: int, solver: str, eps: float) -> Problem:
    rows, columns = x.shape[-2:]
    return Problem(rows, (1, 1, columns), (0, 0, 0), rank, solver == "hals", eps, False, num_iters)


@_ops.kernel("nmf", "triton")
def nmf(x: Tensor, u0: Tensor, v0: Tensor, num_iters: int, solver: str, eps: float) -> Tensor:
    problem = matrices(x, u0.shape[-1], num_iters, solver, eps)
    batch = x.shape[:-2]
    y = x.new_empty(x.shape)
    if y.numel():
        path(problem).forward(
            problem, as_map(x), per_window(u0, batch), per_window(v0, batch), as_map(y), None, None
        )
    return y


@_ops.kernel("nmf_factors", "triton")
def nmf_factors(
    x: Tensor, u0: Tensor, v0: Tensor, num_iters: int, solver: str, eps: float
) -> tuple[Tensor, Tensor]:
    problem = matrices(x, u0.shape[-1], num_iters, solver, eps)
    *batch, rows, columns = x.shape
    u, v = x.new_empty((*batch, rows, problem.rank)), x.new_empty((*batch, columns, problem.rank))
    if u.numel() or v.numel():
        path(problem).forward(
            problem, as_map(x), per_window(u0, batch), per_window(v0, batch),
            None, u.view(-1, rows, problem.rank), v.view(-1, columns, problem.rank),
        )  # fmt: skip
    return u, v


@_ops.kernel("nmf_backward", "triton")
def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor,
    num_iters: int, solver: str, grad_steps: int, eps: float, factor_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward((as_map(dy), None, None), x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads)


@_ops.kernel("nmf_factors_backward", "triton")
def nmf_factors_backward(
    du: Tensor, dv: Tensor, x: Tensor, u0: Tensor, v0: Tensor,
    num_iters: int, solver: str, grad_steps: int, eps: float, factor_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = (None, du.reshape(-1, *du.shape[-2:]), dv.reshape(-1, *dv.shape[-2:]))
    return _backward(grads, x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads)


def _backward(grads, x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads):
    problem = matrices(x, u0.shape[-1], num_iters, solver, eps)
    dx = x.new_empty(x.shape)
    du0, dv0 = backward(problem, grad_steps, factor_grads, as_map(x), u0, v0, x.shape[:-2], grads, as_map(dx))
    return dx, du0, dv0


def backward(problem, grad_steps, factor_grads, x, u0, v0, batch, grads, dx) -> tuple[Tensor, Tensor]:
    """Write dx (B, C, S1, S2, S3); return du0 and dv0 in the shapes of u0 and v0, empty if not asked for.

    ``batch`` are the leading dimensions of the matrices, that u0 and v0 broadcast to; ``grads`` is
    (dy, None, None) or (None, du, dv).
    """
    differentiated = grad_steps > 0 or problem.num_iters == 0
    reach = factor_grads and grad_steps == problem.num_iters
    if not differentiated or not dx.numel():
        dx.zero_()
        shares = None
    else:
        shares = path(problem).backward(
            problem, grad_steps, reach, x, per_window(u0, batch), per_window(v0, batch), *grads, dx
        )
    return tuple(
        _sum_shares(factor, batch, shares[i] if reach and shares else None, factor_grads)
        for i, factor in enumerate((u0, v0))
    )


def _sum_shares(factor: Tensor, batch, shares: Tensor | None, factor_grads: bool) -> Tensor:
    """One factor's gradient from every window's share: the second stage of a sum in a fixed order."""
    if not factor_grads:
        return factor.new_empty((0,))
    if shares is None:
        return torch.zeros_like(factor, memory_format=torch.contiguous_format)
    return shares.reshape(*batch, *factor.shape[-2:]).sum_to_size(factor.shape).contiguous()
