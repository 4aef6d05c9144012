"""Depthwise convolution: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.maps import three_axes
from factorizer_kernels.shared.registry import kernel


def limit(x: Tensor, kernel_size: tuple[int, ...]) -> str | None:
    """Why the kernels do not run a filter of this size, or None where they do."""
    if all(k in (1, 3, 5, 7) for k in kernel_size):
        return None
    return f"it takes kernels of 1, 3, 5 or 7 voxels along each axis, got {tuple(kernel_size)}"


def _problem(x: Tensor, weight: Tensor):
    batch, channels, *spatial = x.shape
    kernel_size = three_axes(weight.shape[1:], 1)
    return cpu.DTYPE_CODES[x.dtype], (batch, channels, *three_axes(spatial, 1)), kernel_size


@kernel("depthwise_conv", "cpu", limit)
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    cpu.native.depthwise_conv_forward(
        *_problem(x, weight), cpu.volume(x), cpu.memory(weight),
        None if bias is None else cpu.memory(bias), cpu.memory(y), cpu.threads(),
    )  # fmt: skip
    return y


@kernel("depthwise_conv_backward", "cpu", limit)
def depthwise_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    shapes = (dy.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = gradients = [
        like.new_empty(shape if wanted else (0,))
        for like, shape, wanted in zip((dy, weight, weight), shapes, output_mask, strict=True)
    ]
    cpu.native.depthwise_conv_backward(
        *_problem(x, weight), cpu.volume(dy), cpu.volume(x), cpu.memory(weight),
        *(cpu.memory(g) if wanted else None for g, wanted in zip(gradients, output_mask, strict=True)),
        cpu.threads(),
    )  # fmt: skip
    return dx, dweight, dbias
