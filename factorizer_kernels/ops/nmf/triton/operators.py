"""Triton: the kernels of ``nmf`` and ``nmf_factors``, and which of them run a problem.

To them a batch of matrices is a feature map with one window an item, so ``swin_nmf`` takes the same way.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType

from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.triton import resident, resident_rank1, streaming, streaming_rank1, sweep
from factorizer_kernels.ops.nmf.triton.problem import Problem, problem_of
from factorizer_kernels.ops.windows.geometry import whole_matrices
from factorizer_kernels.shared.maps import empty_map, spatial_3d
from factorizer_kernels.shared.registry import kernel


@lru_cache(maxsize=256)
def kernels_for(problem: Problem) -> ModuleType:
    """The kernels for a problem: windows on chip, else passes over the map, else matrix products."""
    candidates = (resident_rank1, resident, streaming_rank1, streaming)
    return next((kernels for kernels in candidates if kernels.fits(problem)), sweep)


def forward(
    problem: Problem,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    batch_shape: Sequence[int],
    out: Tensor | tuple[Tensor, Tensor],
) -> None:
    """Write ``out``: y (B, C, S1, S2, S3), or u (windows, M, R) and v (windows, N, R).

    u0 and v0 broadcast to the matrices' leading dimensions ``batch_shape``.
    """
    kernels_for(problem).forward(problem, x, u0, v0, batch_shape, out)


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
    """Write dx; return the gradients of u0 and v0, empty if they are not asked for.

    ``grads`` are the gradients of ``forward``'s ``out``.
    """
    reached = problem.grad_steps == problem.num_iters  # every iteration is differentiated, back to u0 and v0
    if problem.grad_steps == 0 and not reached:
        dx.zero_()
        shares = None
    else:
        shares = kernels_for(problem).backward(
            problem, factor_grads and reached, x, u0, v0, batch_shape, grads, dx
        )
    if not factor_grads:
        return u0.new_empty((0,)), v0.new_empty((0,))
    if shares is None or not reached:
        return u0.new_zeros(u0.shape), v0.new_zeros(v0.shape)
    return _sum_shares(shares[0], u0, batch_shape), _sum_shares(shares[1], v0, batch_shape)


def _sum_shares(shares: Tensor, factor: Tensor, batch_shape: Sequence[int]) -> Tensor:
    """A factor's gradient from every window's share: the second stage of a sum in a fixed order."""
    full = shares.reshape(*batch_shape, *factor.shape[-2:])
    return full.sum_to_size(factor.shape).contiguous()


def _problem(x: Tensor, u0: Tensor, options) -> Problem:
    return problem_of(whole_matrices(x.shape), u0.shape[-1], False, Options(*options))


def _as_map(x: Tensor) -> Tensor:
    """Matrices (..., M, N) as the feature map (B, M, 1, 1, N)."""
    return spatial_3d(x.reshape(whole_matrices(x.shape).size))


@kernel("nmf", "triton")
def nmf(x: Tensor, u0: Tensor, v0: Tensor, *options) -> Tensor:
    y = empty_map(x)
    forward(_problem(x, u0, options), _as_map(x), u0, v0, x.shape[:-2], _as_map(y))
    return y


@kernel("nmf_factors", "triton")
def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, *options) -> tuple[Tensor, Tensor]:
    *batch_shape, rows, columns = x.shape
    rank = u0.shape[-1]
    u, v = x.new_empty((*batch_shape, rows, rank)), x.new_empty((*batch_shape, columns, rank))
    out = (u.view(-1, rows, rank), v.view(-1, columns, rank))
    forward(_problem(x, u0, options), _as_map(x), u0, v0, batch_shape, out)
    return u, v


@kernel("nmf_backward", "triton")
def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(_as_map(dy), x, u0, v0, factor_grads, options)


@kernel("nmf_factors_backward", "triton")
def nmf_factors_backward(
    du: Tensor, dv: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (du.reshape(-1, *du.shape[-2:]), dv.reshape(-1, *dv.shape[-2:]))
    return _backward(grads, x, u0, v0, factor_grads, options)


def _backward(grads, x, u0, v0, factor_grads, options):
    dx = empty_map(x)
    problem = _problem(x, u0, options)
    du0, dv0 = backward(problem, factor_grads, _as_map(x), u0, v0, x.shape[:-2], grads, _as_map(dx))
    return dx, du0, dv0
