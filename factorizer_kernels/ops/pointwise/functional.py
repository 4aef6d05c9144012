"""The public functions: pointwise chains, and the linear maps between a grid and a coarser one."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorizer_kernels.choice import choose, load_kernels
from factorizer_kernels.ops.pointwise import reference
from factorizer_kernels.ops.pointwise.autograd import (
    Join,
    LinearNormMLP,
    NormLinear,
    PatchConv,
    ResidualNormLinear,
)
from factorizer_kernels.ops.pointwise.spec import Sizes
from factorizer_kernels.shared.autograd import call_function
from factorizer_kernels.shared.checks import (
    check_overwrite,
    feature_map,
    number,
    one_of,
    plain_tensor,
    remembered,
    tensor,
)
from factorizer_kernels.shared.dtypes import autocast_dtype, compute_dtype

load_kernels(__package__)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of the channels of every voxel: W x + b.

    The same as a convolution with a kernel of one voxel. Autograd keeps x and the weights.

    Args:
        x: (B, C, S1..Sp), p = 1, 2 or 3; float32, float64, bfloat16 or float16.
        weight: W (D, C). Weights are converted to the arithmetic's dtype: float32, or float64 where x is.
        bias: b (D), or None for none.

    Returns:
        (B, D, S1..Sp) in x's dtype, or under autocast in autocast's.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    _checked_linear(x, weight, bias)
    x = plain_tensor(x)
    arguments = (x, None, None, *_linear_map(x, weight, bias))
    sizes = Sizes(x.shape[1], _products(x, weight))
    return _call("norm_linear", reference.norm_linear, NormLinear, x, arguments, 0.0, sizes=sizes)


@remembered
def _checked_linear(x, weight, bias) -> None:
    _check_linear_map("weight", weight, "bias", bias, feature_map("x", x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the channels of every voxel (Ba et al., 2016).

    Autograd keeps x and the weights.

    Args:
        x: (B, C, S1..Sp), as for `linear`.
        weight, bias: scale and shift (C).
        eps: added to the variance.

    Returns:
        x's shape, in x's dtype; mean and variance are computed in float32 at least.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    eps = _checked_layer_norm(x, weight, bias, eps)
    x = plain_tensor(x)
    arguments = (x, *_converted(x, weight, bias), None, None)
    sizes = Sizes(x.shape[1])
    return _call(
        "norm_linear", reference.norm_linear, NormLinear, x, arguments, eps, sizes=sizes, dtype=x.dtype
    )


@remembered
def _checked_layer_norm(x, weight, bias, eps) -> float:
    _check_norm("weight", weight, "bias", bias, feature_map("x", x))
    return _eps(eps)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm` over the channels, then `linear`: W n(x) + b.

    Autograd keeps x and the weights.

    Args:
        x: (B, C, S1..Sp), as for `linear`.
        norm_weight, norm_bias: scale and shift of the norm (C).
        weight: W (D, C).
        bias: b (D), or None for none.
        eps: added to the variance.
        residual: whether to return x as well, for a residual connection: where that one is used in place of
            x, the backward adds its gradient to x's, on the CPU in the same pass.

    Returns:
        (B, D, S1..Sp) in x's dtype, or under autocast in autocast's. With ``residual`` (that, x).

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    x = feature_map("x", x)
    one_of("residual", residual, (False, True))
    arguments = norm_linear_arguments(x, norm_weight, norm_bias, weight, bias, eps)
    function: Any = ResidualNormLinear if residual else NormLinear
    if arguments.backend == "reference":
        return function.reference(x, *arguments[:-1])
    return call_function("norm_linear", function, x, *arguments)


class NormLinearArguments(NamedTuple):
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    dtype: torch.dtype
    backend: str


def norm_linear_arguments(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> NormLinearArguments:
    """Those of `norm_linear` but for x, checked and completed."""
    eps = _checked_norm_linear(x, norm_weight, norm_bias, weight, bias, eps)
    scale, shift = _converted(x, norm_weight, norm_bias)
    weight, bias = _linear_map(x, weight, bias)
    backend = choose("norm_linear", x, Sizes(x.shape[1]))
    return NormLinearArguments(scale, shift, weight, bias, eps, autocast_dtype(x), backend)


@remembered
def _checked_norm_linear(x, norm_weight, norm_bias, weight, bias, eps) -> float:
    _check_norm("norm_weight", norm_weight, "norm_bias", norm_bias, x)
    _check_linear_map("weight", weight, "bias", bias, x)
    return _eps(eps)


def linear_norm_mlp(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    eps: float = 1e-5,
    overwrite: Tensor | None = None,
) -> Tensor:
    """A residual linear map and a residual MLP: z + W2 gelu(W1 n(z) + b1) + b2, where z = x + W y + b.

    What a transformer's or a ConvNeXt's block does after its mixing of voxels. n is `layer_norm` over
    the channels, gelu the exact one. Autograd keeps y, x and the weights; the hidden map never exists.

    Args:
        y: (B, D, S1..Sp), p = 1, 2 or 3; in x's dtype, or under autocast in another.
        x: (B, C, S1..Sp); float32, float64, bfloat16 or float16.
        weight, bias: W (C, D) and b (C).
        norm_weight, norm_bias: scale and shift of the norm (C).
        weight1, bias1: W1 (H, C) and b1 (H).
        weight2, bias2: W2 (C, H) and b2 (C). Any of the three biases may be None.
        eps: added to the variance.
        overwrite: a map that is not read afterwards, such as y or x: its memory may be used for the result.
            It is where it fits and nothing is differentiated, compiled or recorded.

    Returns:
        x's shape, in x's dtype. Under autocast the products may be computed in its dtype; the norm, the sums
        and the GELU are in float32 at least.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    x = feature_map("x", x)
    check_overwrite(overwrite)
    y = _beside("y", y, x)
    if y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:
        raise ValueError(
            f"y must have the batch and the spatial size of x, {tuple(x.shape)}, got shape {tuple(y.shape)}"
        )
    if y is x:
        y = x.view_as(x)  # torch.compile traces no Function that gets a tensor twice
    eps = _checked_mlp(
        y.shape[1], x, weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps
    )
    arguments = (
        y, x, *_linear_map(x, weight, bias), *_converted(x, norm_weight, norm_bias),
        *_linear_map(x, weight1, bias1), *_linear_map(x, weight2, bias2),
    )  # fmt: skip
    return _call(
        "linear_norm_mlp", reference.linear_norm_mlp, LinearNormMLP, x, arguments, eps,
        sizes=Sizes(max(x.shape[1], y.shape[1])), overwrite=overwrite,
    )  # fmt: skip


@remembered
def _checked_mlp(
    branch_channels, x, weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps
) -> float:
    channels = x.shape[1]
    _check_linear_map("weight1", weight1, "bias1", bias1, x)
    _check_linear_map("weight", weight, "bias", bias, x, (channels, branch_channels))
    _check_norm("norm_weight", norm_weight, "norm_bias", norm_bias, x)
    _check_linear_map("weight2", weight2, "bias2", bias2, x, (channels, weight1.shape[0]))
    return _eps(eps)


def join(
    skip: Tensor,
    x: Tensor,
    weight_skip: Tensor,
    weight_x: Tensor,
    bias: Tensor | None = None,
    *,
    overwrite: Tensor | None = None,
) -> Tensor:
    """A fine map and a coarse one, joined: W_s skip + (transposed convolution of x by weight_x) + b.

    The transposed convolution's stride is its kernel, so that its blocks do not overlap. This is what a
    U-net's decoder does where it upsamples x, concatenates the skip and maps the channels: neither the
    upsampled map nor the concatenation exists. A map A after an upsampling by T is one of weight A T; see
    ``factorizer.layers`` for a layer that does this. Autograd keeps skip, x and the weights.

    Args:
        skip: (B, C, k1 S1..kp Sp), p = 1, 2 or 3; in x's dtype, or under autocast in another.
        x: (B, E, S1..Sp); float32, float64, bfloat16 or float16.
        weight_skip: W_s (D, C).
        weight_x: (E, D, k1..kp), as ``torch.nn.ConvTranspose3d`` has it; k is the scale along each axis.
        bias: b (D), or None for none.
        overwrite: a map that is not read afterwards, such as skip: its memory may be used for the result. It
            is where it fits and nothing is differentiated, compiled or recorded.

    Returns:
        (B, D, k1 S1..kp Sp) in x's dtype, or under autocast in autocast's.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    x = feature_map("x", x)
    check_overwrite(overwrite)
    skip = _beside("skip", skip, x)
    _checked_join(skip, x, weight_skip, weight_x, bias)
    weight_skip, bias = _linear_map(x, weight_skip, bias)
    arguments = (skip, x, weight_skip, *_converted(x, weight_x), bias)
    sizes = Sizes(max(x.shape[1], *weight_skip.shape), blocked=prod(skip.shape[2:]))
    return _call("join", reference.join, Join, x, arguments, sizes=sizes, overwrite=overwrite)


@remembered
def _checked_join(skip, x, weight_skip, weight_x, bias) -> None:
    _check_kernel("weight_x", weight_x, x, "(E, D, k1..kp)")
    if weight_x.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight_x must be of {x.shape[1]} channels, those of x, got shape {tuple(weight_x.shape)}"
        )
    fine = tuple(s * k for s, k in zip(x.shape[2:], weight_x.shape[2:], strict=True))
    if skip.dim() != x.dim() or skip.shape[0] != x.shape[0] or tuple(skip.shape[2:]) != fine:
        raise ValueError(
            f"skip must have the batch of x and the spatial size {fine}, x's times the kernel of weight_x, "
            f"got shape {tuple(skip.shape)}"
        )
    shape = (weight_x.shape[1], skip.shape[1])
    _check_linear_map("weight_skip", weight_skip, "bias", bias, x, shape)


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The convolution whose stride is its kernel: each block of voxels becomes one.

    The downsampling of a U-net, a patch embedding, a patch merging: one linear map of a block's voxels.
    Autograd keeps x and the weights.

    Args:
        x: (B, C, k1 S1..kp Sp), p = 1, 2 or 3; float32, float64, bfloat16 or float16.
        weight: (D, C, k1..kp), as ``torch.nn.Conv3d`` has it.
        bias: b (D), or None for none.

    Returns:
        (B, D, S1..Sp) in x's dtype, or under autocast in autocast's.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    _checked_patch_conv(x, weight, bias)
    x = plain_tensor(x)
    arguments = (x, *_linear_map(x, weight, bias))
    sizes = Sizes(max(weight.shape[:2]), _products(x, weight), prod(x.shape[2:]))
    return _call("patch_conv", reference.patch_conv, PatchConv, x, arguments, sizes=sizes)


@remembered
def _checked_patch_conv(x, weight, bias) -> None:
    x = feature_map("x", x)
    _check_kernel("weight", weight, x, "(D, C, k1..kp)")
    kernel = tuple(weight.shape[2:])
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight must be of {x.shape[1]} channels, those of x, got shape {tuple(weight.shape)}"
        )
    if any(s % k for s, k in zip(x.shape[2:], kernel, strict=True)):
        raise ValueError(
            f"x must have a spatial size that the kernel {kernel} of weight divides, got {tuple(x.shape[2:])}"
        )
    _check_vector("bias", bias, weight.shape[0], x)


# --- checks ----------------------------------------------------------------------------------


def _call(
    name: str,
    definition: Callable,
    function: type[torch.autograd.Function],
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    *options: float,
    sizes: Sizes,
    dtype: torch.dtype | None = None,
    overwrite: Tensor | None = None,
) -> Tensor:
    dtype = autocast_dtype(x) if dtype is None else dtype
    # The other map may have no channels, where x has some.
    first = tensors[0]
    backend = choose(name, x if first is None or first.numel() else first, sizes)
    if backend == "reference":
        return definition(*tensors, *options, dtype)
    return call_function(name, function, *tensors, *options, dtype, backend, overwrite=overwrite)


def _products(x: Tensor, weight: Tensor) -> int:
    """Multiplications of weight (D, C, ..) with one item of x, each of whose voxels is read once."""
    return prod(x.shape[1:]) * weight.shape[0]


def _converted(x: Tensor, *weights: Tensor) -> list[Tensor]:
    """Checked weights in the dtype of the arithmetic on x."""
    dtype = compute_dtype(x.dtype)
    return [plain_tensor(weight, dtype) for weight in weights]


def _linear_map(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """A checked weight and its bias, likewise; zeros where that is None."""
    if bias is None:
        bias = x.new_zeros(weight.shape[:1], dtype=compute_dtype(x.dtype))
    return _converted(x, weight, bias)


def _eps(eps: float) -> float:
    eps = number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    return eps


def _beside(name: str, value: Tensor, x: Tensor) -> Tensor:
    """A map that goes with x: of its dtype, but under autocast, and on its device."""
    value = tensor(name, value, "(B, C, S1..Sp) with x's number of axes", x.dim(), x.dim(), x.device)
    mixed = autocast_dtype(x) != x.dtype or autocast_dtype(value) != value.dtype
    if value.dtype != x.dtype and not (mixed and torch.float64 not in (value.dtype, x.dtype)):
        raise TypeError(f"{name} must be {x.dtype}, as x is, got {value.dtype}")
    return value


def _check_vector(name: str, value: Tensor | None, length: int, x: Tensor) -> None:
    if value is None:
        return
    value = tensor(name, value, f"({length})", 1, 1, x.device)
    if value.shape[0] != length:
        raise ValueError(f"{name} must have {length} entries, got shape {tuple(value.shape)}")


def _check_linear_map(
    weight_name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    x: Tensor,
    shape: tuple[int, int] | None = None,
) -> None:
    """``shape``: W's; None: of any number of rows, for x's channels."""
    weight = tensor(weight_name, weight, "a matrix", 2, 2, x.device)
    rows, columns = (weight.shape[0], x.shape[1]) if shape is None else shape
    if tuple(weight.shape) != (rows, columns):
        wanted = f"(D, {columns})" if shape is None else f"({rows}, {columns})"
        raise ValueError(f"{weight_name} must be {wanted}, got shape {tuple(weight.shape)}")
    if rows == 0:
        raise ValueError(f"{weight_name} must have a row, got shape {tuple(weight.shape)}")
    _check_vector(bias_name, bias, rows, x)


def _check_norm(weight_name: str, weight: Tensor, bias_name: str, bias: Tensor, x: Tensor) -> None:
    for name, value in ((weight_name, weight), (bias_name, bias)):
        if value is None:
            raise TypeError(f"{name} must be a torch.Tensor, got NoneType")
        _check_vector(name, value, x.shape[1], x)


def _check_kernel(name: str, value: Tensor, x: Tensor, layout: str) -> None:
    weight = tensor(name, value, f"{layout}, one k for each spatial axis of x", x.dim(), x.dim(), x.device)
    if 0 in weight.shape:
        raise ValueError(f"{name} must have no axis of size 0, got shape {tuple(weight.shape)}")
