"""The problems of ``depthwise_conv``, and torch's convolution beside it, by both of its ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import factorizer_kernels as fk

from .harness import (
    DEVICE,
    FUSED,
    Contender,
    Effort,
    Function,
    Under,
    assert_close,
    cotangent,
    forward_backward,
)

# Relative L2 distance from float64: of the value and x's gradient, sums of one product for each tap; of the
# gradients of weight and bias, sums over all voxels.
TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (4e-3, 1e-2)}

# Channels are filtered alike: so many of them, first and last among them, are compared with float64.
CHECKED_CHANNELS = 4


@dataclass(frozen=True)
class Depthwise:
    """``depthwise_conv`` of a feature map (B, C, S1..Sp) by filters of ``kernel_size`` along each axis."""

    size: tuple[int, ...]
    kernel_size: int = 3
    dtype: torch.dtype = torch.float32

    def input(self) -> Tensor:
        return drawn(self)[0].to(DEVICE, self.dtype)

    def parameters(self) -> list[nn.Parameter]:
        """weight (C, k..k) and bias (C)."""
        return [nn.Parameter(t.to(DEVICE)) for t in drawn(self)[1:]]

    def check(self, function: Function, mode: str) -> None:
        """The value, and in the backward mode the gradients of x, weight and bias."""
        assert isinstance(function, nn.Module)
        x = self.input()
        results = forward_backward(function, x)() if mode == "forward+backward" else (function(x),)
        places = (1, 1, 0, 0)  # where they have the channels
        names = ("result", "gradient of x", "gradient of weight", "gradient of bias")
        for result, expected, place, what in zip(results, truth(self), places, names, strict=False):
            tolerance = TOLERANCES[self.dtype][what.endswith(("weight", "bias"))]
            assert_close(result.index_select(place, self.checked()), expected, tolerance, what)

    def checked(self) -> Tensor:
        channels = self.size[1]
        return torch.linspace(0, channels - 1, min(channels, CHECKED_CHANNELS), device=DEVICE).long()

    def describe(self, function: Function) -> dict[str, Any]:
        return {"voxels": prod(self.size[2:]), "x_bytes": prod(self.size) * self.dtype.itemsize}


@lru_cache(maxsize=1)
def drawn(problem: Depthwise) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    channels, axes = problem.size[1], len(problem.size) - 2
    shapes = (problem.size, (channels, *(problem.kernel_size,) * axes), (channels,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias


@lru_cache(maxsize=1)
def truth(problem: Depthwise) -> tuple[Tensor, ...]:
    """float64's value and gradients, of the channels that are compared."""
    channels = problem.checked()
    x, dy = (t.index_select(1, channels).double() for t in (problem.input(), cotangent(problem.input())))
    leaves = [x, *(p.detach().index_select(0, channels).double() for p in problem.parameters())]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with fk.use_backend("reference"):
        y = fk.depthwise_conv(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy)


class _Layer(nn.Module):
    def __init__(self, problem: Depthwise, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = problem.parameters()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def _ours(problem: Depthwise, effort: Effort) -> Function:
    return Under(FUSED, _Layer(problem, fk.depthwise_conv))


def _torch(problem: Depthwise, effort: Effort) -> Function:
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(problem.size) - 3]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return convolve(x, weight[:, None], bias, padding=problem.kernel_size // 2, groups=x.shape[1])

    return _Layer(problem, function)


class _Native(torch.autograd.Function):
    """(x, weight (C, 1, k..k), bias, padding) -> y: torch's convolution without oneDNN, on either way."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.save_for_backward(x, weight)
        axes = x.dim() - 2
        ctx.options = ([1] * axes, [padding] * axes, [1] * axes, False, [0] * axes, x.shape[1])
        with torch.backends.mkldnn.flags(enabled=False):
            return torch.ops.aten.convolution(x, weight, bias, *ctx.options)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        with torch.backends.mkldnn.flags(enabled=False):
            grads = torch.ops.aten.convolution_backward(
                dy, x, weight, [weight.shape[0]], *ctx.options, list(ctx.needs_input_grad[:3])
            )
        return *grads, None


def _native(problem: Depthwise, effort: Effort) -> Function:
    if DEVICE.type != "cpu":
        pytest.skip("oneDNN computes on the CPU")

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return _Native.apply(x, weight[:, None], bias, problem.kernel_size // 2)

    return _Layer(problem, function)


DEPTHWISE = Contender("ours", _ours, FUSED)
TORCH = Contender("torch", _torch)
NATIVE = Contender("torch, without oneDNN", _native)
