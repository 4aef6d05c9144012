"""What the operators' autograd Functions share: the bounds of their differentiability, in words."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_WAY_OUT = 'inside factorizer_kernels.use_backend("reference") they are plain PyTorch, and can be'


class _Once(torch.autograd.Function):
    """(operator, *arguments) -> the outputs of a backward pass's operator; raises where differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(operator, *arguments):
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(
            f"the kernels of nmf, nmf_factors and swin_nmf cannot be differentiated twice: {_WAY_OUT}"
        )


def once(operator, *arguments) -> Any:
    """Run a backward pass's operator, which cannot be differentiated again."""
    # Nothing to remember without a graph of the backward. A compiled graph is differentiated once by
    # construction, and its tracer would run into the error.
    plain = not torch.is_grad_enabled() or torch.compiler.is_compiling()
    return operator(*arguments) if plain else _Once.apply(operator, *arguments)


def apply(function: type[torch.autograd.Function], *arguments) -> Any:
    """``function.apply`` where something is differentiated; forward mode gets a word about the way out."""
    if not torch.compiler.is_compiling() and not _differentiated(arguments):
        return function.forward(*arguments)  # apply's own bookkeeping takes as long as a small kernel
    # Dynamo refuses a Function that has a jvp of its own.
    eager = function if torch.compiler.is_compiling() else _with_jvp(function)
    return eager.apply(*arguments)


def _differentiated(arguments) -> bool:
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    return torch.is_grad_enabled() and any(a.requires_grad for a in arguments if isinstance(a, Tensor))


@cache
def _with_jvp(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    return type(function.__name__, (function,), {"jvp": staticmethod(_no_forward_mode)})


def _no_forward_mode(ctx, *tangents):
    raise NotImplementedError(f"the kernels cannot be differentiated in forward mode: {_WAY_OUT}")
