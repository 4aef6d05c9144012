"""The arguments of a factorisation, checked: the first factors and the solver's options."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from factorizer_kernels.shared.checks import integer, number, one_of, plain_tensor, tensor
from factorizer_kernels.shared.dtypes import compute_dtype

SOLVERS = ("mu", "hals")


class Options(NamedTuple):
    """How a matrix is factorised, in the order of the public functions' arguments.

    Attributes:
        grad_steps: the number of differentiated iterations, the last ones. Where it is num_iters, the
            gradient reaches u0 and v0.
    """

    num_iters: int
    solver: str
    grad_steps: int
    eps: float

    @property
    def hals(self) -> bool:
        return self.solver == "hals"

    @property
    def constant(self) -> bool:
        """Whether the factors are constants: there are iterations, and none is differentiated."""
        return self.grad_steps == 0 < self.num_iters


def check_factorisation(
    x: Tensor, u0: object, v0: object, matrices_shape: tuple[int, ...], num_iters, solver, num_grad_steps, eps
) -> Options:
    """The options of a factorisation of matrices (..., M, N), which x holds.

    u0 (..., M, R) and v0 (..., N, R) are checked too. num_grad_steps is clipped to num_iters.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    _check_factors(u0, v0, matrices_shape, x.device)
    return _options(num_iters, solver, num_grad_steps, eps, compute_dtype(x.dtype))


def first_factors(x: Tensor, u0: Tensor, v0: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """u0 and v0 in the dtype of the arithmetic on x; constants where no gradient reaches them."""
    dtype = compute_dtype(x.dtype)
    u0, v0 = plain_tensor(u0, dtype), plain_tensor(v0, dtype)
    return (u0, v0) if options.grad_steps == options.num_iters else (u0.detach(), v0.detach())


def _check_factors(u0, v0, matrices_shape, device: torch.device) -> None:
    *batch_shape, rows, columns = matrices_shape
    u0 = tensor("u0", u0, "(M, R) or (..., M, R)", 2, device=device)
    v0 = tensor("v0", v0, "(N, R) or (..., N, R)", 2, device=device)
    for name, factor, extent, meaning in (("u0", u0, rows, "rows"), ("v0", v0, columns, "columns")):
        if factor.shape[-2] != extent:
            raise ValueError(
                f"{name} must have {extent} rows, one for each of the {meaning} of the matrices, "
                f"got shape {tuple(factor.shape)}"
            )
        if not _broadcasts(factor.shape[:-2], batch_shape):
            raise ValueError(
                f"{name}'s leading dimensions must broadcast to {tuple(batch_shape)}, "
                f"got shape {tuple(factor.shape)}"
            )
    if u0.shape[-1] != v0.shape[-1]:
        raise ValueError(
            f"u0 and v0 must have the same rank (last dimension), got {u0.shape[-1]} and {v0.shape[-1]}"
        )
    if u0.shape[-1] < 1:
        raise ValueError("u0 and v0 must have a rank (last dimension) of at least 1, got 0")


def _options(num_iters, solver, num_grad_steps, eps, dtype: torch.dtype) -> Options:
    num_iters = integer("num_iters", num_iters)
    grad_steps = num_iters if num_grad_steps is None else integer("num_grad_steps", num_grad_steps)
    one_of("solver", solver, SOLVERS)
    eps = number("eps", eps)
    smallest = torch.finfo(dtype).tiny
    if not smallest <= eps < math.inf:
        raise ValueError(
            f"eps must be finite and at least {smallest:.3g}, the smallest normal number of the arithmetic "
            f"({dtype}), got {eps!r}"
        )
    return Options(num_iters, solver, min(grad_steps, num_iters), eps)


def _broadcasts(shape, target) -> bool:
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(own == 1 or own == other for own, other in zip(shape, tail, strict=True))
