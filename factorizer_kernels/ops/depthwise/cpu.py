"""Depthwise convolution: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.ops.depthwise.spec import gradients_like, small_filters
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.maps import empty_map, three_axes
from factorizer_kernels.shared.registry import kernel


def _problem(x: Tensor, weight: Tensor):
    batch, channels, *spatial = x.shape
    kernel_size = three_axes(weight.shape[1:], 1)
    return cpu.DTYPE_CODES[x.dtype], (batch, channels, *three_axes(spatial, 1)), kernel_size


@kernel("depthwise_conv", "cpu", small_filters)
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = empty_map(x)
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    cpu.native.depthwise_conv_forward(
        *_problem(x, weight), cpu.volume(x), cpu.memory(weight),
        None if bias is None else cpu.memory(bias), cpu.memory(y), cpu.threads(),
    )  # fmt: skip
    return y


@kernel("depthwise_conv_backward", "cpu", small_filters)
def depthwise_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    dx, dweight, dbias = gradients = gradients_like(dy, weight, output_mask)
    cpu.native.depthwise_conv_backward(
        *_problem(x, weight), cpu.volume(dy), cpu.volume(x), cpu.memory(weight),
        *(cpu.memory(g) if wanted else None for g, wanted in zip(gradients, output_mask, strict=True)),
        cpu.threads(),
    )  # fmt: skip
    return dx, dweight, dbias
