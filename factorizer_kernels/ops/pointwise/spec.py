"""The contract of the pointwise operators and of their backwards.

Maps are (B, C, S1..Sp). Weights, biases and their gradients are in the arithmetic's dtype. ``dtype``
is the least precise dtype that products may be computed in: x's own, or autocast's. Norms, sums and the GELU
are in the arithmetic's dtype. A result that is a product is of ``dtype``, one that is a sum is of x's.
Gradients of maps are of the maps' dtypes. ``weight_grads`` says whether the gradients of the weights are
wanted; those that are not wanted, or belong to an argument that is None, are empty. An ``addend`` is another
gradient of x: it is added to dx.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from factorizer_kernels.shared.registry import define
from factorizer_kernels.shared.vmap import joined, looped, parted


class Sizes(NamedTuple):
    """What a kernel is asked about.

    Attributes:
        widest: channels of the widest map that it holds: of x, and of what is computed beside it.
        products: multiplications for one item of the batch, where the reference is a single product or
            convolution of PyTorch; else None.
        blocked: voxels of a channel of the finer map, where there are two grids; else 0.
    """

    widest: int
    products: int | None = None
    blocked: int = 0


# A single product of PyTorch starts some 30 us sooner than a kernel with its backward (docs/performance.md).
_FEW_PRODUCTS = 2**17


def yields(x: Tensor, sizes: Sizes) -> str | None:
    """Why plain PyTorch should run the call, which it does faster, or None.

    By what one item takes, so that no result depends on how many there are. Not in a graph, whose calls take
    no such start, and which may be for maps of any size.
    """
    if sizes.products is None or torch.compiler.is_compiling() or sizes.products > _FEW_PRODUCTS:
        return None
    return "plain PyTorch is faster at a single product so small"


def coarse_size(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The spatial size of x over the kernel (.., k1..kp) of weight."""
    return tuple(s // k for s, k in zip(x.shape[2:], weight.shape[2:], strict=True))


def fine_size(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """The spatial size of x times the kernel (.., k1..kp) of weight."""
    return tuple(s * k for s, k in zip(x.shape[2:], weight.shape[2:], strict=True))


def gradients_like(maps: list[Tensor], weights: list[Tensor | None], weight_grads: bool) -> list[Tensor]:
    """Uninitialised gradients of the maps and of the weights."""
    none, contiguous = maps[0].new_empty, torch.contiguous_format
    # Half the time of new_empty with a shape.
    return [torch.empty_like(m, memory_format=contiguous) for m in maps] + [
        none(0) if w is None or not weight_grads else torch.empty_like(w, memory_format=contiguous)
        for w in weights
    ]


# Fakes: outputs of the right shape.


def _norm_linear(x, norm_weight, norm_bias, weight, bias, eps, dtype, backend):
    channels = x.shape[1] if weight is None else weight.shape[0]
    return x.new_empty((x.shape[0], channels, *x.shape[2:]), dtype=dtype)


def _norm_linear_backward(
    dy, addend, x, norm_weight, norm_bias, weight, bias, eps, dtype, weight_grads, backend
):  # fmt: skip
    return tuple(gradients_like([x], [norm_weight, norm_bias, weight, bias], weight_grads))


def _linear_norm_mlp(y, x, *options):
    return x.new_empty(x.shape)


def _linear_norm_mlp_backward(dout, y, x, *others):
    *weights, _, _, weight_grads, _ = others
    return tuple(gradients_like([y, x], weights, weight_grads))


def _join(skip, x, weight_skip, weight_x, bias, dtype, backend):
    return x.new_empty((x.shape[0], weight_skip.shape[0], *skip.shape[2:]), dtype=dtype)


def _join_backward(dy, skip, x, weight_skip, weight_x, bias, dtype, weight_grads, backend):
    return tuple(gradients_like([skip, x], [weight_skip, weight_x, bias], weight_grads))


def _patch_conv(x, weight, bias, dtype, backend):
    return x.new_empty((x.shape[0], weight.shape[0], *coarse_size(x, weight)), dtype=dtype)


def _patch_conv_backward(dy, x, weight, bias, dtype, weight_grads, backend):
    return tuple(gradients_like([x], [weight, bias], weight_grads))


# The rules for vmap: the mapped dimension joins the batch. Weights that are mapped, and gradients of weights,
# are another call for each element.


def _forward_rule(operator: Callable, num_maps: int) -> Callable:
    def rule(info, in_dims, *arguments):
        if any(dim is not None for dim in in_dims[num_maps:]):
            return looped(operator(), info, in_dims, arguments)
        size = info.batch_size
        maps = (joined(t, dim, size) for t, dim in zip(arguments[:num_maps], in_dims, strict=False))
        return parted(operator()(*maps, *arguments[num_maps:]), size), 0

    return rule


def _backward_rule(operator: Callable, num_maps: int, num_before: int = 1) -> Callable:
    """``num_maps``: of the inputs, before which there are the gradient and maybe an addend."""
    num_joined = num_before + num_maps

    def rule(info, in_dims, *arguments):
        weight_grads = arguments[-2]
        if weight_grads or any(dim is not None for dim in in_dims[num_joined:]):
            return looped(operator(), info, in_dims, arguments)
        size = info.batch_size
        maps = (
            t if t is None else joined(t, dim, size)
            for t, dim in zip(arguments[:num_joined], in_dims, strict=False)
        )
        outputs = operator()(*maps, *arguments[num_joined:])
        gradients = tuple(parted(t, size) for t in outputs[:num_maps]) + outputs[num_maps:]
        return gradients, tuple(0 if i < num_maps else None for i in range(len(outputs)))

    return rule


_NORM = "Tensor? norm_weight, Tensor? norm_bias, Tensor? weight, Tensor? bias, float eps, ScalarType dtype"
_MLP = (
    "Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, "
    "Tensor weight2, Tensor bias2, float eps, ScalarType dtype"
)
_JOIN = "Tensor weight_skip, Tensor weight_x, Tensor bias, ScalarType dtype"
_PATCH = "Tensor weight, Tensor bias, ScalarType dtype"

#: W n(x) + b, without n where there is no norm_weight, without W and b where there is no weight.
norm_linear: OpOverload = define(
    "norm_linear",
    f"(Tensor x, {_NORM}, str backend) -> Tensor",
    _norm_linear,
    _forward_rule(lambda: norm_linear, 1),
)
norm_linear_backward: OpOverload = define(
    "norm_linear_backward",
    f"(Tensor dy, Tensor? addend, Tensor x, {_NORM}, bool weight_grads, str backend)"
    " -> (Tensor dx, Tensor dnorm_weight, Tensor dnorm_bias, Tensor dweight, Tensor dbias)",
    _norm_linear_backward,
    _backward_rule(lambda: norm_linear_backward, 1, 2),
)
linear_norm_mlp: OpOverload = define(
    "linear_norm_mlp",
    f"(Tensor y, Tensor x, {_MLP}, str backend) -> Tensor",
    _linear_norm_mlp,
    _forward_rule(lambda: linear_norm_mlp, 2),
)
linear_norm_mlp_backward: OpOverload = define(
    "linear_norm_mlp_backward",
    f"(Tensor dout, Tensor y, Tensor x, {_MLP}, bool weight_grads, str backend)"
    " -> (Tensor dy, Tensor dx, Tensor dweight, Tensor dbias, Tensor dnorm_weight, Tensor dnorm_bias,"
    " Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2)",
    _linear_norm_mlp_backward,
    _backward_rule(lambda: linear_norm_mlp_backward, 2),
)
join: OpOverload = define(
    "join",
    f"(Tensor skip, Tensor x, {_JOIN}, str backend) -> Tensor",
    _join,
    _forward_rule(lambda: join, 2),
)
join_backward: OpOverload = define(
    "join_backward",
    f"(Tensor dy, Tensor skip, Tensor x, {_JOIN}, bool weight_grads, str backend)"
    " -> (Tensor dskip, Tensor dx, Tensor dweight_skip, Tensor dweight_x, Tensor dbias)",
    _join_backward,
    _backward_rule(lambda: join_backward, 2),
)
patch_conv: OpOverload = define(
    "patch_conv",
    f"(Tensor x, {_PATCH}, str backend) -> Tensor",
    _patch_conv,
    _forward_rule(lambda: patch_conv, 1),
)
patch_conv_backward: OpOverload = define(
    "patch_conv_backward",
    f"(Tensor dy, Tensor x, {_PATCH}, bool weight_grads, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _patch_conv_backward,
    _backward_rule(lambda: patch_conv_backward, 1),
)
