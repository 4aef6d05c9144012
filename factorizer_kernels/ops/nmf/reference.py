"""NMF in plain PyTorch: the definition of the operator, on any device, differentiable to any order.

X is (..., M, N), U (..., M, R), V (..., N, R). One iteration updates U from A = XV and B = VᵀV, then V
from C = XᵀU and D = UᵀU with the new U.
"""

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.shared.dtypes import autocast_disabled, compute_dtype


def nmf(x: Tensor, u0: Tensor, v0: Tensor, options: Options) -> Tensor:
    """Y = U Vᵀ after the iterations; arithmetic in float32, or float64 for float64."""
    with autocast_disabled(x):
        u, v = _factors(x, u0, v0, options)
        y = (u @ v.transpose(-1, -2)).to(x.dtype)
    # With num_iters = 0 shared factors have not been broadcast to the batch.
    return y.expand(x.shape).contiguous()


def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """U and V after the iterations, each with x's leading dimensions and dtype."""
    with autocast_disabled(x):
        u, v = _factors(x, u0, v0, options)
    u = u.expand(*x.shape[:-2], *u.shape[-2:])
    v = v.expand(*x.shape[:-2], *v.shape[-2:])
    own = options.num_iters == 0  # not the memory of u0 and v0
    return u.to(x.dtype, copy=own), v.to(x.dtype, copy=own)


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


def _factors(x: Tensor, u: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x.dtype))
    constant_steps = options.num_iters - options.grad_steps
    if constant_steps > 0:
        with torch.no_grad():
            u, v = _iterate(x, u, v, constant_steps, options)
    return _iterate(x, u, v, options.grad_steps, options)


def _iterate(x: Tensor, u: Tensor, v: Tensor, steps: int, options: Options) -> tuple[Tensor, Tensor]:
    update = UPDATES[options.solver]
    for _ in range(steps):
        u = update(u, x @ v, v.transpose(-1, -2) @ v, options.eps)
        v = update(v, x.transpose(-1, -2) @ u, u.transpose(-1, -2) @ u, options.eps)
    return u, v
