"""Triton: which kernels run ``nmf`` and ``nmf_factors``.

To the kernels a batch of matrices is a feature map with one window
per item, so ``swin_nmf`` takes the same way.
"""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from factorizer_kernels.ops.nmf.triton import resident, streaming, streaming_rank1, sweep
from factorizer_kernels.shared import registry
from factorizer_kernels.shared.triton import Problem, per_window


def path(problem: Problem) -> ModuleType:
    """The kernels for a problem: windows on chip, else passes over the map, else matrix products."""
    candidates = (resident, streaming_rank1, streaming)
    return next((kernels for kernels in candidates if kernels.fits(problem)), sweep)


def as_map(x: Tensor) -> Tensor:
    """Matrices (..., M, N) as the feature map (B, M, 1, 1, N), whose one window per item is the matrix."""
    rows, columns = x.shape[-2:]
    return x.reshape(-1, rows, 1, 1, columns)


def matrices(x: Tensor, rank: int, num_iters: int, solver: str, eps: float) -> Problem:
    rows, columns = x.shape[-2:]
    return Problem(rows, (1, 1, columns), (0, 0, 0), rank, solver == "hals", eps, False, num_iters)


def forward(
    problem: Problem,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch: Sequence[int],
    out: Tensor | tuple[Tensor, Tensor],
) -> None:
    """Write ``out``: y (B, C, S1, S2, S3), or u (windows, M, R) and v (windows, N, R).

    ``batch`` are the leading dimensions of the matrices, that u0 and v0 broadcast to.
    """
    path(problem).forward(problem, x, per_window(u0, batch), per_window(v0, batch), out)


def backward(
    problem: Problem,
    grad_steps: int,
    factor_grads: bool,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch: Sequence[int],
    grads: Tensor | tuple[Tensor, Tensor],
    dx: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write dx; return the gradients of u0 and v0, empty if they are not asked for.

    ``grads`` are the gradients of ``forward``'s ``out``.
    """
    reached = grad_steps == problem.num_iters  # every iteration is differentiated, back to u0 and v0
    if grad_steps == 0 and not reached:
        dx.zero_()
        shares = None
    else:
        shares = path(problem).backward(
            problem, grad_steps, factor_grads and reached,
            x, per_window(u0, batch), per_window(v0, batch), grads, dx,
        )  # fmt: skip
    if not factor_grads:
        return u0.new_empty((0,)), v0.new_empty((0,))
    if shares is None or not reached:
        return u0.new_zeros(u0.shape), v0.new_zeros(v0.shape)
    return _sum_shares(shares[0], u0, batch), _sum_shares(shares[1], v0, batch)


def _sum_shares(shares: Tensor, factor: Tensor, batch: Sequence[int]) -> Tensor:
    """A factor's gradient from every window's share: the second stage of a sum in a fixed order."""
    full = shares.reshape(*batch, *factor.shape[-2:])
    return full.sum_to_size(factor.shape).contiguous()


@registry.kernel("nmf", "triton")
def nmf(x: Tensor, u0: Tensor, v0: Tensor, num_iters: int, solver: str, eps: float) -> Tensor:
    problem = matrices(x, u0.shape[-1], num_iters, solver, eps)
    y = x.new_empty(x.shape)
    forward(problem, as_map(x), u0, v0, x.shape[:-2], as_map(y))
    return y


@registry.kernel("nmf_factors", "triton")
def nmf_factors(
    x: Tensor, u0: Tensor, v0: Tensor, num_iters: int, solver: str, eps: float
) -> tuple[Tensor, Tensor]:
    problem = matrices(x, u0.shape[-1], num_iters, solver, eps)
    *batch, rows, columns = x.shape
    u, v = x.new_empty((*batch, rows, problem.rank)), x.new_empty((*batch, columns, problem.rank))
    out = (u.view(-1, rows, problem.rank), v.view(-1, columns, problem.rank))
    forward(problem, as_map(x), u0, v0, batch, out)
    return u, v


@registry.kernel("nmf_backward", "triton")
def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor,
    num_iters: int, solver: str, grad_steps: int, eps: float, factor_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(as_map(dy), x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads)


@registry.kernel("nmf_factors_backward", "triton")
def nmf_factors_backward(
    du: Tensor, dv: Tensor, x: Tensor, u0: Tensor, v0: Tensor,
    num_iters: int, solver: str, grad_steps: int, eps: float, factor_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grads = (du.reshape(-1, *du.shape[-2:]), dv.reshape(-1, *dv.shape[-2:]))
    return _backward(grads, x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads)


def _backward(grads, x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads):
    problem = matrices(x, u0.shape[-1], num_iters, solver, eps)
    dx = x.new_empty(x.shape)
    du0, dv0 = backward(problem, grad_steps, factor_grads, as_map(x), u0, v0, x.shape[:-2], grads, as_map(dx))
    return dx, du0, dv0
