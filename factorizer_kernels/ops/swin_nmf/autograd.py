"""The backward of ``swin_nmf`` for the backends with kernels."""

import torch

from factorizer_kernels.shared import registry  # noqa: F401  (defines the operators that are bound here)
from factorizer_kernels.shared.autograd import once

_swin_nmf = torch.ops.factorizer_kernels.swin_nmf.default
_swin_nmf_backward = torch.ops.factorizer_kernels.swin_nmf_backward.default


class SwinNMF(torch.autograd.Function):
    """(x, u0, v0, windows, relu, num_iters, solver, grad_steps, eps, backend) -> y; keeps x, u0 and v0."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, windows, relu, num_iters, solver, grad_steps, eps, backend):
        return _swin_nmf(x, u0, v0, *windows, relu, num_iters, solver, eps, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, u0, v0, windows, relu, num_iters, solver, grad_steps, eps, backend = inputs
        ctx.options = (*windows, relu, num_iters, solver, grad_steps, eps)
        ctx.backend = backend
        ctx.save_for_backward(x, u0, v0)
        if grad_steps == 0 < num_iters:  # every factor is a constant
            ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, dy):
        factor_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, du0, dv0 = once(
            _swin_nmf_backward, dy, *ctx.saved_tensors, *ctx.options, factor_grads, ctx.backend
        )
        du0, dv0 = (du0, dv0) if factor_grads else (None, None)
        return dx, du0, dv0, None, None, None, None, None, None, None
