"""The backward of ``depthwise_conv``, and the backward's: convolutions and their adjoints, to any order."""

import torch

from factorizer_kernels.ops.depthwise.spec import depthwise_conv, depthwise_conv_backward
from factorizer_kernels.shared.autograd import call_function
from factorizer_kernels.shared.registry import call

NAME = "depthwise_conv"


class DepthwiseConv(torch.autograd.Function):
    """(x, weight, bias or None, backend) -> y; keeps x and weight."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, weight, bias, backend: str):
        return call(depthwise_conv, x, weight, bias, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.backend = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, dy):
        wanted = tuple(ctx.needs_input_grad[:3])
        gradients = call_function(NAME, DepthwiseConvBackward, dy, *ctx.saved_tensors, wanted, ctx.backend)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None


class DepthwiseConvBackward(torch.autograd.Function):
    """(dy, x, weight, output_mask, backend) -> (dx, dweight, dbias); keeps dy, x and weight."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(dy, x, weight, output_mask: tuple[bool, bool, bool], backend: str):
        return call(depthwise_conv_backward, dy, x, weight, output_mask, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        dy, x, weight, ctx.output_mask, ctx.backend = inputs
        ctx.save_for_backward(dy, x, weight)

    @staticmethod
    def backward(ctx, ddx, ddweight, ddbias):
        # * is the convolution. <ddx, dx> = <ddx * weight, dy>, <ddweight, dweight> = <x * ddweight, dy>,
        # <ddbias, dbias> = <ddbias, dy>: in dy they are convolutions, in x and weight their adjoints.
        dy, x, weight = ctx.saved_tensors
        has_dx, has_dweight, has_dbias = ctx.output_mask
        grad_dy = grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            terms = []
            if has_dx:
                terms.append(call_function(NAME, DepthwiseConv, ddx, weight, None, ctx.backend))
            if has_dweight:
                terms.append(call_function(NAME, DepthwiseConv, x, ddweight, None, ctx.backend))
            if has_dbias:
                terms.append(ddbias.to(dy.dtype).view(-1, *(1,) * (dy.dim() - 2)).expand_as(dy))
            grad_dy = sum(terms[1:], terms[0])
        wanted = (has_dweight and ctx.needs_input_grad[1], has_dx and ctx.needs_input_grad[2], False)
        if any(wanted):
            grad_x, grad_weight, _ = call_function(
                NAME, DepthwiseConvBackward, dy, ddx if has_dx else x, ddweight if has_dweight else weight,
                wanted, ctx.backend,
            )  # fmt: skip
        return grad_dy, grad_x if wanted[0] else None, grad_weight if wanted[1] else None, None, None
