"""The backward of ``nmf`` and ``nmf_factors`` for the backends with kernels.

Both keep x, u0 and v0, and compute the iterations again.
"""

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf import spec
from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.shared.autograd import once
from factorizer_kernels.shared.registry import call


def _save(ctx, inputs) -> None:
    x, u0, v0, ctx.options, ctx.backend = inputs
    ctx.save_for_backward(x, u0, v0)


def _backward(ctx, name, operator, *grads: Tensor):
    factor_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    backward = once(name, operator)
    dx, du0, dv0 = backward(*grads, *ctx.saved_tensors, factor_grads, *ctx.options, ctx.backend)
    return (dx, du0, dv0, None, None) if factor_grads else (dx, None, None, None, None)


class NMF(torch.autograd.Function):
    """(x, u0, v0, options, backend) -> y"""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, options: Options, backend: str):
        return call(spec.nmf, x, u0, v0, *options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx, dy):
        return _backward(ctx, "nmf", spec.nmf_backward, dy)


class NMFFactors(torch.autograd.Function):
    """(x, u0, v0, options, backend) -> (u, v)"""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, options: Options, backend: str):
        return call(spec.nmf_factors, x, u0, v0, *options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs)

    @staticmethod
    def backward(ctx, du, dv):
        return _backward(ctx, "nmf_factors", spec.nmf_factors_backward, du, dv)
