"""The backward of ``swin_nmf`` for the backends with kernels."""

import torch

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.swin_nmf import spec
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared.autograd import once


class SwinNMF(torch.autograd.Function):
    """(x, u0, v0, windows, relu, options, backend) -> y; keeps x, u0 and v0, and computes all else again."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, windows: Windows, relu: bool, options: Options, backend: str):
        return spec.swin_nmf(x, u0, v0, *windows.options, relu, *options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, u0, v0, ctx.windows, ctx.relu, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(x, u0, v0)
        if ctx.options.constant:
            ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx, dy):
        factor_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, du0, dv0 = once("swin_nmf", spec.swin_nmf_backward)(
            dy, *ctx.saved_tensors, factor_grads, *ctx.windows.options, ctx.relu, *ctx.options, ctx.backend
        )
        du0, dv0 = (du0, dv0) if factor_grads else (None, None)
        return dx, du0, dv0, None, None, None, None
