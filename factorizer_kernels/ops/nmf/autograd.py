"""The backward of ``nmf`` and ``nmf_factors`` for the backends with kernels."""

import torch
from torch import Tensor

from factorizer_kernels.shared import registry  # noqa: F401  (defines the operators that are bound here)
from factorizer_kernels.shared.autograd import once

_nmf = torch.ops.factorizer_kernels.nmf.default
_nmf_backward = torch.ops.factorizer_kernels.nmf_backward.default
_nmf_factors = torch.ops.factorizer_kernels.nmf_factors.default
_nmf_factors_backward = torch.ops.factorizer_kernels.nmf_factors_backward.default


def _save(ctx, inputs, *outputs: Tensor) -> None:
    x, u0, v0, ctx.num_iters, ctx.solver, ctx.grad_steps, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(x, u0, v0)
    if ctx.grad_steps == 0 < ctx.num_iters:  # every factor is a constant
        ctx.mark_non_differentiable(*outputs)


def _backward(ctx, operator, *grads: Tensor):
    factor_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, du0, dv0 = once(
        operator,
        *grads,
        *ctx.saved_tensors,
        ctx.num_iters,
        ctx.solver,
        ctx.grad_steps,
        ctx.eps,
        factor_grads,
        ctx.backend,
    )
    du0, dv0 = (du0, dv0) if factor_grads else (None, None)
    return dx, du0, dv0, None, None, None, None, None


class NMF(torch.autograd.Function):
    """(x, u0, v0, num_iters, solver, grad_steps, eps, backend) -> y; keeps x, u0 and v0."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, num_iters, solver, grad_steps, eps, backend):
        return _nmf(x, u0, v0, num_iters, solver, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy):
        return _backward(ctx, _nmf_backward, dy)


class NMFFactors(torch.autograd.Function):
    """(x, u0, v0, num_iters, solver, grad_steps, eps, backend) -> (u, v); keeps x, u0 and v0."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, num_iters, solver, grad_steps, eps, backend):
        return _nmf_factors(x, u0, v0, num_iters, solver, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, *output)

    @staticmethod
    def backward(ctx, du, dv):
        return _backward(ctx, _nmf_factors_backward, du, dv)
