"""The backward of the pointwise operators. Nothing is kept but the inputs: what is between is computed again.

Second derivatives and forward mode go through plain PyTorch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from factorizer_kernels.ops.pointwise import reference, spec
from factorizer_kernels.shared.autograd import once
from factorizer_kernels.shared.registry import call


def _chain(
    name: str,
    definition: Callable,
    num_maps: int,
    num_weights: int,
    takes_addend: bool = False,
    passes_on: bool = False,
) -> type[torch.autograd.Function]:
    """The Function of an operator: (maps, weights, options, backend) -> y.

    Args:
        name: of the operator, and of its public function.
        definition: the reference: takes the same, without the backend.
        num_maps, num_weights: of the operator; any weight may be None.
        takes_addend: the backward's operator takes, after dy, what is to be added to dx.
        passes_on: the Function returns (y, x), so that the gradients of both are added on the way.
    """
    operator, operator_backward = getattr(spec, name), getattr(spec, f"{name}_backward")
    num_tensors = num_maps + num_weights

    def backward_definition(dy: Tensor, *arguments) -> tuple[Tensor, ...]:
        """What the operator of the backward pass computes, in plain PyTorch."""
        addend, *others = arguments if takes_addend else (None, *arguments)
        *tensors, weight_grads = *others[:num_tensors], others[-2]
        options = others[num_tensors:-2]
        present = [i for i, t in enumerate(tensors) if t is not None]

        def forward(*inputs: Tensor) -> Tensor:
            filled = dict(zip(present, inputs, strict=True))
            return definition(*(filled.get(i) for i in range(num_tensors)), *options)

        gradients = torch.func.vjp(forward, *(tensors[i] for i in present))[1](dy)
        outputs = [dy.new_empty((0,)) for _ in range(num_tensors)]
        for i, gradient in zip(present, gradients, strict=True):
            if i < num_maps or weight_grads:
                outputs[i] = gradient
        if addend is not None:
            outputs[0] = outputs[0] + addend
        return tuple(outputs)

    def returned(y: Tensor, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return (y, x.view_as(x)) if passes_on else y

    class Chain(torch.autograd.Function):
        generate_vmap_rule = True  # from the operators' own

        @staticmethod
        def reference(*arguments):
            return returned(definition(*arguments), arguments[0])

        @staticmethod
        def forward(*arguments):
            return returned(call(operator, *arguments), arguments[0])

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:num_tensors])
            ctx.options = inputs[num_tensors:]

        @staticmethod
        def backward(ctx, dy, *passed):
            *options, backend = ctx.options
            addend = passed or ((None,) if takes_addend else ())
            wanted = ctx.needs_input_grad[:num_tensors]
            gradients = once(name, operator_backward, backward_definition)(
                dy, *addend, *ctx.saved_tensors, *options, any(wanted[num_maps:]), backend
            )
            used = (g if w else None for g, w in zip(gradients, wanted, strict=True))
            return *used, *(None for _ in ctx.options)

    return Chain


NormLinear = _chain("norm_linear", reference.norm_linear, 1, 4, takes_addend=True)
ResidualNormLinear = _chain("norm_linear", reference.norm_linear, 1, 4, takes_addend=True, passes_on=True)
LinearNormMLP = _chain("linear_norm_mlp", reference.linear_norm_mlp, 2, 8)
Join = _chain("join", reference.join, 2, 3)
PatchConv = _chain("patch_conv", reference.patch_conv, 1, 2)
