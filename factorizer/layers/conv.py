"""Convolutional parts, by number of spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer, one_of
from factorizer_kernels.shared.dtypes import autocast_disabled

from .checks import check_dtype
from .linear import Linear
from .norm import LayerNorm
from .parts import untouched
from .slabs import convolve, plain_on_cpu


class _BlockwiseConv(nn.Module):
    """A convolution of torch that is one linear map of each block where its stride is its kernel.

    Its parameters and its results are torch's. A large map of an inference is computed slab by slab.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, ...)."""
        conv: Any = self
        kernel = conv.kernel_size
        blocks = x.ndim == len(kernel) + 2 and _takes_blocks(conv)
        if not blocks or any(s % k for s, k in zip(x.shape[2:], kernel, strict=True)):
            if x.ndim == len(kernel) + 2 and _takes_planes(conv) and plain_on_cpu(x):
                return convolve(x, conv)
            return super().forward(x)
        check_dtype(x, conv.weight)
        if all(k == 1 for k in kernel):
            return fk.linear(x, conv.weight.flatten(1), conv.bias)
        return fk.patch_conv(x, conv.weight, conv.bias)


class Conv1d(_BlockwiseConv, nn.Conv1d):
    """`torch.nn.Conv1d`; where its stride is its kernel, `factorizer_kernels.patch_conv`."""


class Conv2d(_BlockwiseConv, nn.Conv2d):
    """`torch.nn.Conv2d`; where its stride is its kernel, `factorizer_kernels.patch_conv`."""


class Conv3d(_BlockwiseConv, nn.Conv3d):
    """`torch.nn.Conv3d`; where its stride is its kernel, `factorizer_kernels.patch_conv`."""


CONV: dict[int, type[nn.Module]] = {1: Conv1d, 2: Conv2d, 3: Conv3d}
CONV_TRANSPOSE: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}


def _takes_planes(conv: Any) -> bool:
    """Whether each plane of a convolution's result depends on the planes around it, with zeros outside."""
    ones = all(s == d == 1 for s, d in zip(conv.stride, conv.dilation, strict=True))
    return (
        ones
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and conv.padding[0] < conv.kernel_size[0]  # or a slab could lie in the zeros alone
    )


def _takes_blocks(conv: Any) -> bool:
    """Whether the stride of a convolution is its kernel, so that its blocks do not overlap."""
    padding = () if isinstance(conv.padding, str) else conv.padding
    return (
        conv.stride == conv.kernel_size
        and conv.groups == 1
        and conv.padding != "same"
        and not any(padding)
        and all(d == 1 for d in conv.dilation)
    )


def can_join(upsample: Any, adapter: Any) -> bool:
    """Whether `join` does what the two do: a transposed convolution by blocks, and a linear layer."""
    return (
        untouched(upsample, *CONV_TRANSPOSE.values())
        and untouched(adapter, Linear)
        and untouched(adapter.linear, nn.Conv1d)
        and _takes_blocks(upsample)
        and not any(upsample.output_padding)
    )


def join(skip: Tensor, x: Tensor, upsample: Any, adapter: Linear, overwrite: bool = False) -> Tensor:
    """adapter(cat([skip, upsample(x)])): the product of the two weights, then `factorizer_kernels.join`.

    `overwrite`: nobody reads skip afterwards.
    """
    check_dtype(x, upsample.weight)
    weight, bias = adapter.weights
    with autocast_disabled(x):
        of_skip, of_x = weight.split((skip.shape[1], weight.shape[1] - skip.shape[1]), 1)
        weight_x = of_x @ upsample.weight.flatten(2)  # (in_channels, out_channels, k1 ... kp)
        if upsample.bias is not None:
            shift = torch.mv(of_x, upsample.bias)
            bias = shift if bias is None else bias + shift
    weight_x = weight_x.unflatten(2, upsample.kernel_size)
    return fk.join(skip, x, of_skip, weight_x, bias, overwrite=skip if overwrite else None)


class ConvStage(nn.Module):
    """`depth` times convolution (3 along each axis, no bias), layer norm, leaky ReLU.

    Args:
        in_channels, out_channels: channels of the input and the output.
        spatial_size: not used; the stages of a U-net are all called with it.
        depth: number of convolutions.
        spatial_dims: number of spatial axes, 1 to 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_size: Sequence[int] | None = None,
        depth: int = 1,
        spatial_dims: int = 3,
    ) -> None:
        super().__init__()
        integer("depth", depth, 1)
        one_of("spatial_dims", spatial_dims, (1, 2, 3))
        layers: list[nn.Module] = []
        for i in range(depth):
            width = out_channels if i else in_channels
            layers += [
                CONV[spatial_dims](width, out_channels, 3, padding=1, bias=False),
                LayerNorm(out_channels),
                nn.LeakyReLU(0.01),
            ]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, S1..Sp)."""
        return self.block(x)
