"""NMF: the calls of the C++ kernels.

A batch of M x N matrices is a 1-D feature map (batch, M, N) with one window as long as the map, so these
are the kernels of ``swin_nmf`` without shifts and without activation.
"""

from math import prod

import torch
from torch import Tensor

from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared import registry


class _Call:
    """The arguments that forward and backward share."""

    def __init__(self, x: Tensor, u0: Tensor, v0: Tensor):
        *batch, rows, columns = x.shape
        # A view where the leading dimensions are strided as one, else a copy.
        self.x = x.reshape(prod(batch), rows, columns)
        self.factors = cpu.Factors(u0, v0, batch)
        self.rows, self.columns = rows, columns

    def arguments(self):
        one_window = [1, 1, self.columns]
        cut = cpu.native.Windows(self.x.shape[0], 1, self.rows, one_window, one_window, [0, 0, 0])
        return (
            cpu.DTYPE_CODES[self.x.dtype],
            cut,
            cpu.volume(self.x),
            *self.factors.arguments(),
            self.factors.rank,
        )

    def backward(
        self, num_iters, solver, grad_steps, eps, factor_grads, **loss
    ) -> tuple[Tensor, Tensor, Tensor]:
        dx = self.x.new_empty(self.x.shape)
        du0, dv0 = self.factors.new_grads(factor_grads)
        cpu.native.swin_nmf_backward(
            *self.arguments(), num_iters, grad_steps, solver == "hals", False, eps, cpu.threads(),
            dx=cpu.memory(dx), du0=cpu.memory(du0), dv0=cpu.memory(dv0), **loss,
        )  # fmt: skip
        return dx, *self.factors.grads(du0, dv0, factor_grads)


def nmf(x: Tensor, u0: Tensor, v0: Tensor, num_iters, solver, eps) -> Tensor:
    call = _Call(x, u0, v0)
    y = x.new_empty(x.shape)
    cpu.native.swin_nmf_forward(
        *call.arguments(), num_iters, solver == "hals", False, eps, cpu.threads(), y=cpu.memory(y)
    )
    return y


def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, num_iters, solver, grad_steps, eps, factor_grads
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x, u0, v0)
    dy = dy.reshape(call.x.shape)
    dx, du0, dv0 = call.backward(num_iters, solver, grad_steps, eps, factor_grads, dy=cpu.volume(dy))
    return dx.view(x.shape), du0, dv0


def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, num_iters, solver, eps) -> tuple[Tensor, Tensor]:
    call = _Call(x, u0, v0)
    *batch, rows, columns = x.shape
    u = call.factors.u0.new_empty((*batch, call.factors.rank, rows))
    v = call.factors.v0.new_empty((*batch, call.factors.rank, columns))
    cpu.native.swin_nmf_forward(
        *call.arguments(),
        num_iters,
        solver == "hals",
        False,
        eps,
        cpu.threads(),
        u=cpu.memory(u),
        v=cpu.memory(v),
    )
    return _transposed(u, x.dtype), _transposed(v, x.dtype)


def nmf_factors_backward(
    du: Tensor,
    dv: Tensor,
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    num_iters,
    solver,
    grad_steps,
    eps,
    factor_grads,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x, u0, v0)
    dtype = call.factors.u0.dtype
    du, dv = _transposed(du, dtype), _transposed(dv, dtype)
    none = cpu.native.Volume(0, 0, [0] * 5)
    dx, du0, dv0 = call.backward(
        num_iters,
        solver,
        grad_steps,
        eps,
        factor_grads,
        dy=none,
        du=cpu.memory(du),
        dv=cpu.memory(dv),
    )
    return dx.view(x.shape), du0, dv0


def _transposed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.mT.to(dtype).contiguous()


if cpu.native is not None:
    for _function in (nmf, nmf_backward, nmf_factors, nmf_factors_backward):
        registry.kernel(_function.__name__, "cpu")(_function)
