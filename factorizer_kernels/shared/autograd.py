"""How an operator is called where something may be differentiated, and what is said where that cannot be.

A family's ``autograd.py`` has a ``torch.autograd.Function`` for each of its operators. Its public function
goes through `call_function`, its backward pass through `once`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from factorizer_kernels.shared import registry
from factorizer_kernels.shared.checks import NO_TENSORS, plain

_WAY_OUT = 'inside factorizer_kernels.use_backend("reference") it is plain PyTorch, and'


def call_function(
    name: str, function: type[torch.autograd.Function], *arguments, overwrite: Tensor | None = None
) -> Any:
    """``function.apply(*arguments)``, for the public function of that name.

    Forward mode goes through ``function.reference``, where there is one: plain PyTorch that takes the same
    arguments but the last, the backend, and returns the same.

    Args:
        overwrite: see `over`.

    Raises:
        NotImplementedError: forward mode without such a reference, or a gradient inside
            ``torch.jit.trace``; the message names the way out.
    """
    if not differentiated(arguments):
        # apply's own bookkeeping takes as long as a small kernel.
        return over(overwrite, name, function.forward, *arguments)
    if torch.compiler.is_compiling():
        return function.apply(*arguments)
    if torch.jit.is_tracing():
        raise NotImplementedError(
            f"torch.jit.trace cannot keep the gradient of the kernels of {name}: trace inside "
            f"torch.no_grad(); or {_WAY_OUT} can be traced"
        )
    if forward_ad._current_level >= 0:
        # Not by a jvp of the Function's own: torch runs it without the tangents of what is around it.
        reference = getattr(function, "reference", None)
        if reference is None:
            return _without_jvp(name, function).apply(*arguments)
        return reference(*arguments[:-1])
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return _reverse_only(function).apply(*arguments)


def over(memory: Tensor | None, name: str, operator: Callable, *arguments) -> Tensor:
    """``operator(*arguments)``, that of this name, whose result may lie in a map that is not read any more.

    It does where the kernel can write there, and the call is nothing but a call: not differentiated,
    compiled, recorded or watched.

    Args:
        memory: of the result's shape and dtype, on the device of the first argument, contiguous, without a
            gradient, and read through no other layout by any argument, or it is not used.
    """
    if (
        memory is None
        or type(memory) is not Tensor
        or memory.requires_grad
        or memory.device != arguments[0].device
        or not memory.is_contiguous()
        or not plain(arguments)
        or differentiated(arguments)
        or _read_otherwise(memory, arguments)
    ):
        return operator(*arguments)
    kernel = registry.find(name, arguments[-1])
    if kernel is None or not kernel.takes_out:
        return operator(*arguments)
    y = kernel.function(*arguments[:-1], out=memory)
    if y is memory:
        increment_version(memory)  # so that a backward pass which needed the old values says so
    return y


def _read_otherwise(memory: Tensor, arguments: tuple) -> bool:
    """Whether one of the arguments has a place of the memory for another voxel than the result has there."""
    storage = memory.untyped_storage()._cdata
    return any(
        a is not memory
        and type(a) not in NO_TENSORS
        and isinstance(a, Tensor)
        and a.untyped_storage()._cdata == storage
        and not (a.dtype == memory.dtype and a.is_set_to(memory))
        for a in arguments
    )


def once(name: str, operator: torch._ops.OpOverload, fallback: Callable | None = None) -> Callable:
    """The operator of a backward pass of the public function ``name``, to be called in its place.

    It takes and returns the same, and knows what a second derivative is.

    Args:
        fallback: takes the operator's arguments and returns the same in plain PyTorch: a second derivative
            goes through it. Without it a second derivative raises NotImplementedError, which names the way
            out.
    """
    # Without a graph of the backward pass there is nothing to remember. A compiled graph is differentiated
    # once by construction, and its tracer would run into the error.
    if torch.compiler.is_compiling():
        return operator
    if not torch.is_grad_enabled():
        return partial(registry.call, operator)
    return partial(_Once.apply, name, operator, fallback)


class _Once(torch.autograd.Function):
    """(name, operator, fallback, *arguments) -> the outputs of a backward pass's operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name, operator, fallback, *arguments):
        return operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        name, _, fallback, *arguments = inputs
        ctx.name, ctx.fallback = name, fallback
        if ctx.fallback is not None:
            ctx.save_for_backward(*(a for a in arguments if isinstance(a, Tensor)))
            ctx.others = [None if isinstance(a, Tensor) else (a,) for a in arguments]

    @staticmethod
    def backward(ctx, *gradients):
        if ctx.fallback is None:
            raise NotImplementedError(
                f"the kernels of {ctx.name} cannot be differentiated twice: {_WAY_OUT} can be"
            )

        def fallback(*tensors):
            remaining = iter(tensors)
            return ctx.fallback(*(next(remaining) if a is None else a[0] for a in ctx.others))

        vjp = torch.func.vjp(fallback, *ctx.saved_tensors)[1]
        grads = iter(vjp(gradients if len(gradients) > 1 else gradients[0]))
        return None, None, None, *(next(grads) if a is None else None for a in ctx.others)


def differentiated(arguments) -> bool:
    """Whether a call with these arguments is part of something that is differentiated, or transformed."""
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return True
    if not torch.is_grad_enabled():
        return False
    for a in arguments:  # noqa: SIM110 - a generator takes longer, and this is a part of every call
        if type(a) not in NO_TENSORS and isinstance(a, Tensor) and a.requires_grad:
            return True
    return False


@cache
def _reverse_only(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same with a forward that sets its own context up.

    Where the two are apart, which only transforms ask for, PyTorch looks at the forward's signature at every
    call; that takes as long as a small kernel.
    """

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), methods)


@cache
def _without_jvp(name: str, function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The same with a forward mode that says that there is none."""

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            f"the kernels of {name} cannot be differentiated in forward mode: {_WAY_OUT} can be"
        )

    return type(function.__name__, (function,), {"jvp": staticmethod(jvp)})
