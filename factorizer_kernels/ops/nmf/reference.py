"""NMF in plain PyTorch: the definition of the operator, on any device, differentiable to any order.

X is (..., M, N), U (..., M, R), V (..., N, R). One iteration updates U from A = XV and B = VᵀV, then V
from C = XᵀU and D = UᵀU with the new U.
"""

import torch
from torch import Tensor

from factorizer_kernels.shared.registry import compute_dtype, without_autocast


def nmf(
    x: Tensor, u0: Tensor, v0: Tensor, num_iters: int, solver: str, grad_steps: int, eps: float
) -> Tensor:
    """Y = U Vᵀ after ``num_iters`` iterations; arithmetic in float32, or float64 for float64."""
    with without_autocast(x):
        u, v = _factors(x, u0, v0, num_iters, solver, grad_steps, eps)
        y = (u @ v.mT).to(x.dtype)
    return y.expand(x.shape)  # without iterations shared factors are shared yet


def nmf_factors(
    x: Tensor, u0: Tensor, v0: Tensor, num_iters: int, solver: str, grad_steps: int, eps: float
) -> tuple[Tensor, Tensor]:
    """U and V after ``num_iters`` iterations, each with x's leading dimensions and dtype."""
    with without_autocast(x):
        u, v = _factors(x, u0, v0, num_iters, solver, grad_steps, eps)
    u = u.expand(*x.shape[:-2], *u.shape[-2:])
    v = v.expand(*x.shape[:-2], *v.shape[-2:])
    return u.to(x.dtype), v.to(x.dtype)


def mu_update(factor: Tensor, projection: Tensor, gram: Tensor, eps: float) -> Tensor:
    """U∘A / (UB + ε): the multiplicative update. ε only below the line, so that zero stays zero."""
    return factor * projection / (factor @ gram + eps)


def hals_update(factor: Tensor, projection: Tensor, gram: Tensor, eps: float) -> Tensor:
    """max(0, (A_r − Σ_{j≠r} U_j B_jr + ε) / (B_rr + ε)) for each column r in turn, columns j < r new."""
    columns = list(factor.unbind(-1))
    for r in range(len(columns)):
        numerator = projection[..., r] + eps
        for j in range(len(columns)):
            if j != r:
                numerator = numerator - columns[j] * gram[..., j, r, None]
        columns[r] = torch.relu(numerator / (gram[..., r, r, None] + eps))
    return torch.stack(columns, -1)


UPDATES = {"mu": mu_update, "hals": hals_update}


def _factors(x, u, v, num_iters, solver, grad_steps, eps) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x.dtype))
    if grad_steps < num_iters:
        with torch.no_grad():
            u, v = _iterate(x, u, v, num_iters - grad_steps, solver, eps)
        num_iters = grad_steps
    return _iterate(x, u, v, num_iters, solver, eps)


def _iterate(x, u, v, num_iters, solver, eps) -> tuple[Tensor, Tensor]:
    update = UPDATES[solver]
    for _ in range(num_iters):
        u = update(u, x @ v, v.mT @ v, eps)
        v = update(v, x.mT @ u, u.mT @ u, eps)
    return u, v
