"""The contract of the operators ``depthwise_conv`` and ``depthwise_conv_backward``.

weight is (C, k1..kp), each k odd; weight and bias (C) are in the arithmetic's dtype, and so are their
gradients. ``output_mask`` says which of dx, dweight and dbias are wanted; the others are empty.
"""

from collections.abc import Sequence

from torch import Tensor

from factorizer_kernels.shared.registry import define
from factorizer_kernels.shared.vmap import joined, mapped_first, parted


def small_filters(x: Tensor, kernel_size: tuple[int, ...]) -> str | None:
    """The limit of the kernels: why they do not run a filter of this size, or None where they do."""
    if all(k in (1, 3, 5, 7) for k in kernel_size):
        return None
    return f"it takes kernels of 1, 3, 5 or 7 voxels along each axis, got {tuple(kernel_size)}"


def gradients_like(dy: Tensor, weight: Tensor, output_mask: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dx, dweight and dbias."""
    return (
        dy.new_empty(dy.shape if output_mask[0] else (0,)),
        weight.new_empty(weight.shape if output_mask[1] else (0,)),
        weight.new_empty(weight.shape[:1] if output_mask[2] else (0,)),
    )


def _fake(x, weight, bias, backend):
    return x.new_empty(x.shape)


def _backward_fake(dy, x, weight, output_mask, backend):
    return gradients_like(dy, weight, output_mask)


# The rules for vmap: the mapped dimension joins the batch, or, where each of its elements has weights of its
# own, the channels.


def _join_channels(t: Tensor, dim: int | None, size: int) -> Tensor:
    """A map (B, C, ...), whose mapped dimension joins the channels: (B, size · C, ...)."""
    return mapped_first(t, dim, size).movedim(0, 1).flatten(1, 2)


def _vmap(info, in_dims, x, weight, bias, backend):
    size = info.batch_size
    x_dim, weight_dim, bias_dim, _ = in_dims
    if weight_dim is None and bias_dim is None:
        return parted(depthwise_conv(joined(x, x_dim, size), weight, bias, backend), size), 0
    bias = bias if bias is None else joined(bias, bias_dim, size)
    y = depthwise_conv(_join_channels(x, x_dim, size), joined(weight, weight_dim, size), bias, backend)
    return y.unflatten(1, (size, -1)), 1


def _backward_vmap(info, in_dims, dy, x, weight, output_mask, backend):
    size = info.batch_size
    dy, x = (_join_channels(t, dim, size) for t, dim in zip((dy, x), in_dims[:2], strict=True))
    weight = joined(weight, in_dims[2], size)
    dx, *others = depthwise_conv_backward(dy, x, weight, output_mask, backend)
    outputs = (
        (dx.unflatten(1, (size, -1)) if output_mask[0] else dx),
        *(parted(t, size) if wanted else t for t, wanted in zip(others, output_mask[1:], strict=True)),
    )
    return outputs, tuple(dim if wanted else None for dim, wanted in zip((1, 0, 0), output_mask, strict=True))


depthwise_conv = define(
    "depthwise_conv",
    "(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor",
    _fake,
    _vmap,
)
depthwise_conv_backward = define(
    "depthwise_conv_backward",
    "(Tensor dy, Tensor x, Tensor weight, bool[3] output_mask, str backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _backward_fake,
    _backward_vmap,
)
