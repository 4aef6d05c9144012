"""Large maps of an inference on a CPU, computed slab by slab: what lies between exists for a slab at a time.

A slab is some planes of the first spatial axis. Each voxel has the value that it has without slabs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from factorizer_kernels.shared.checks import plain

SLAB_BYTES = 2**24  # of a slab, about: it stays in a large cache
LARGE = 2**27  # bytes of a map from which on it is computed in slabs


def worth_slabs(num_bytes: int, x: Tensor) -> bool:
    """Whether a map of so many bytes, computed from x, is to be computed slab by slab: in plain calls on a
    CPU alone."""
    return num_bytes >= LARGE and plain_on_cpu(x)


def plain_on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, and nothing that is computed from it is differentiated, compiled or watched."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and plain((x,))
    )


def slabs(begin: int, end: int, plane_bytes: int, least: int = 1) -> Iterator[tuple[int, int]]:
    """From where to where each slab goes, of planes of so many bytes; of as many planes as `least`, or
    more."""
    step = max(least, 1, SLAB_BYTES // max(plane_bytes, 1))
    for first in range(begin, end, step):
        yield first, min(first + step, end)


def plane_bytes(x: Tensor) -> int:
    """Of one plane of x (B, C, S1..Sp), all channels together."""
    return x.numel() * x.element_size() // max(x.shape[2], 1)


def convolve(x: Tensor, conv: Any) -> Tensor:
    """A convolution of torch, of stride and dilation 1, on x (B, C, S1..Sp), in a plain call on a CPU.

    A large result comes slab by slab: whole, oneDNN would hold it twice, in its own order and in torch's.

    Args:
        conv: the module, whose padding is a number of zeros for each axis.
    """
    reach, kernel, length = conv.padding[0], conv.kernel_size[0], x.shape[2]
    planes = length + 2 * reach - kernel + 1
    if x[:, :1].nbytes * conv.out_channels < LARGE:
        return _convolved(x, conv, conv.padding)
    y: Tensor | None = None
    for begin, end in slabs(0, planes, plane_bytes(x[:, :1]) * conv.out_channels):
        first, last = begin - reach, end - reach + kernel - 1
        part = x[:, :, max(first, 0) : min(last, length)]
        missing = [0] * (2 * (x.dim() - 3)) + [max(-first, 0), max(last - length, 0)]
        if any(missing):
            part = torch.nn.functional.pad(part, missing)
        values = _convolved(part, conv, (0, *conv.padding[1:]))
        if y is None:
            y = values.new_empty(*values.shape[:2], planes, *values.shape[3:])
        y[:, :, begin:end] = values
    assert y is not None
    return y


def _convolved(x: Tensor, conv: Any, padding: tuple[int, ...]) -> Tensor:
    """oneDNN's convolution by name: for a small x torch takes its own, which runs on one thread and copies
    the neighbours of every voxel."""
    inputs, options = (x, conv.weight, conv.bias), (conv.stride, conv.dilation, conv.groups)
    if x.dim() == 5 and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.aten.mkldnn_convolution(*inputs, padding, *options)
    stride, dilation, groups = options
    return torch.convolution(*inputs, stride, padding, dilation, False, conv.output_padding, groups)


def filter_in_place(x: Tensor, filtered: Callable[[Tensor], Tensor], reach: int) -> Tensor:
    """Writes `filtered(x)` over x (B, C, S1..Sp), where a voxel depends on those up to `reach` planes away
    and the ends of what it is given count as the ends of x."""
    length = x.shape[2]
    before = x[:, :, :0]  # the planes before a slab, as they were
    for begin, end in slabs(0, length, plane_bytes(x), least=8 * reach):
        part = torch.cat([before, x[:, :, begin : min(end + reach, length)]], 2)
        skipped, before = before.shape[2], x[:, :, max(end - reach, 0) : end].clone()
        x[:, :, begin:end] = filtered(part).narrow(2, skipped, end - begin)
    return x
