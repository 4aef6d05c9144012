"""The backward of ``swin_nmf`` for the backends with kernels, alone and after ``norm_linear``."""

from functools import partial

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.pointwise import reference as pointwise_reference
from factorizer_kernels.ops.pointwise import spec as pointwise_spec
from factorizer_kernels.ops.swin_nmf import reference, spec
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared.autograd import once, over
from factorizer_kernels.shared.registry import call


class SwinNMF(torch.autograd.Function):
    """(x, u0, v0, windows, relu, options, backend) -> y; keeps x, u0 and v0, and computes all else again."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, u0, v0, windows: Windows, relu: bool, options: Options, backend: str):
        return call(spec.swin_nmf, x, u0, v0, *windows.options, relu, *options, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, u0, v0, ctx.windows, ctx.relu, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(x, u0, v0)

    @staticmethod
    def backward(ctx, dy):
        factor_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, du0, dv0 = once("swin_nmf", spec.swin_nmf_backward)(
            dy, *ctx.saved_tensors, factor_grads, *ctx.windows.options, ctx.relu, *ctx.options, ctx.backend
        )
        du0, dv0 = (du0, dv0) if factor_grads else (None, None)
        return dx, du0, dv0, None, None, None, None


def norm_linear_swin_nmf(
    x, norm_weight, norm_bias, weight, bias, eps: float, dtype: torch.dtype, chain_backend: str,
    u0, v0, windows: Windows, relu: bool, options: Options, backend: str, *,
    overwrite: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The two operators in turn; the second writes over the result of the first, where it can."""
    between = over(
        overwrite, "norm_linear", partial(call, pointwise_spec.norm_linear),
        x, norm_weight, norm_bias, weight, bias, eps, dtype, chain_backend,
    )  # fmt: skip
    return over(
        between, "swin_nmf", partial(call, spec.swin_nmf),
        between, u0, v0, *windows.options, relu, *options, backend,
    )  # fmt: skip


class NormLinearSwinNMF(torch.autograd.Function):
    """(x, the weights of norm_linear, its options and backend, then as above) -> (y, x).

    Keeps the tensors that it is given. Of its two halves each has a backend.
    """

    generate_vmap_rule = True

    @staticmethod
    def reference(x, norm_weight, norm_bias, weight, bias, eps, dtype, backend, *factorisation):
        between = pointwise_reference.norm_linear(x, norm_weight, norm_bias, weight, bias, eps, dtype)
        return reference.swin_nmf(between, *factorisation), x.view_as(x)

    @staticmethod
    def forward(x, *arguments):
        return norm_linear_swin_nmf(x, *arguments), x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, eps, dtype, chain_backend, u0, v0, windows, relu, options, backend = inputs
        ctx.save_for_backward(*tensors, u0, v0)
        ctx.chain = eps, dtype, chain_backend
        ctx.factorisation = *windows.options, relu, *options, backend

    @staticmethod
    def backward(ctx, dy: Tensor, dx: Tensor):
        *tensors, u0, v0 = ctx.saved_tensors
        *chain, chain_backend = ctx.chain
        wanted = ctx.needs_input_grad
        weight_grads, factor_grads = any(wanted[1:5]), any(wanted[8:10])
        with torch.no_grad():
            between = call(pointwise_spec.norm_linear, *tensors, *chain, chain_backend)
        name = "norm_linear_swin_nmf"
        between, du0, dv0 = once(name, spec.swin_nmf_backward)(
            dy, between, u0, v0, factor_grads, *ctx.factorisation
        )  # which is its gradient now
        gradients = once(name, pointwise_spec.norm_linear_backward)(
            between, dx, *tensors, *chain, weight_grads, chain_backend
        )
        grads = (*gradients, None, None, None, du0, dv0, None, None, None, None)
        return tuple(g if w else None for g, w in zip(grads, wanted, strict=True))
