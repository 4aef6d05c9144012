"""Layers that treat every voxel alike, a cache-sized block of voxels at a time.

Normalisation over the channels, pointwise linear maps and the MLP do little arithmetic on large
tensors: written as separate operations they wait for memory, and autograd keeps every intermediate.
Here each chain of them runs block by block, so that the intermediates stay in the cache, and the
backward pass computes them again from the chain's input, the only large tensor that is kept.

A chain is a pair of functions for one block of voxels, x (C, voxels) or (batch, C, voxels): the
forward y, and the backward with the gradients of x and of the weights. `_Pointwise` cuts the
tensors, runs the chain over the blocks, and adds up the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block. On a CPU 1 MiB of float32 for each thread, about a level-2 cache (half as
# much and four times as much are no faster); elsewhere only the intermediates' memory counts.
_CPU_BLOCK_PER_THREAD = 2**18
_DEVICE_BLOCK = 2**26


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the channels of x (B, C, S1..Sp), in float32 at least."""
    return _run(_chain(_norm, _norm_backward, eps=eps), x, None, weight[:, None], bias[:, None])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """W x + b (+ residual) over the channels of x (B, C, S1..Sp)."""
    weights = [weight] if bias is None else [weight, bias[:, None]]
    return _run(_chain(_linear, _linear_backward), x, residual, *_matmul_dtype(x, *weights))


def norm_linear(x: Tensor, norm: tuple[Tensor, Tensor], weight: Tensor, eps: float) -> Tensor:
    """W norm(x) over the channels of x (B, C, S1..Sp); `norm` is the norm's weight and bias."""
    weights = _fold(norm, weight, None)
    chain = _chain(_norm_linear, _norm_linear_backward, eps=eps)
    return _run(chain, x, None, *_matmul_dtype(x, *weights))


def norm_mlp(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """x + W2 gelu(W1 norm(x) + b1) + b2 over the channels of x (B, C, S1..Sp).

    `norm`, `first` and `second` are weights and biases.
    """
    weights = (*_fold(norm, *first), second[0], second[1][:, None])
    chain = _chain(_norm_mlp, _norm_mlp_backward, eps=eps)
    return _run(chain, x, None, *_matmul_dtype(x, *weights))


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Checks that x is of the dtype of a layer's weight, or that autocast sees to that."""
    if x.dtype != weight.dtype and not _autocasts(x.device.type):
        raise TypeError(f"x must be {weight.dtype}, as the weights are, got {x.dtype}")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on x's device compute in the dtypes they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


# --- the chains ----------------------------------------------------------------------------------


class Chain(NamedTuple):
    """forward(x, *weights) -> y; backward(dy, x, *weights) -> (dx, gradient of each weight)."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


def _chain(forward: Callable[..., Any], backward: Callable[..., Any], **options: Any) -> Chain:
    return Chain(partial(forward, **options), partial(backward, **options))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = weight @ x.to(weight.dtype)
    return y if bias is None else y + bias


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    dy = dy.to(weight.dtype)
    grads = weight.mT @ dy, _over_voxels(dy @ x.to(weight.dtype).mT)
    return grads if bias is None else (*grads, _over_voxels(dy.sum(-1, keepdim=True)))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return (_standardise(x, eps)[0] * weight + bias).to(x.dtype)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    y, scale = _standardise(x, eps)
    grads = (_over_voxels(g.sum(-1, keepdim=True)) for g in (dy * y, dy))
    return _standardise_backward(dy * weight, y, scale), *grads


def _norm_linear(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _linear(_standardise(x, eps)[0], weight, bias)


def _norm_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, ...]:
    y, scale = _standardise(x, eps)
    dy, *grads = _linear_backward(dy, y, weight, bias)
    return _standardise_backward(dy, y, scale), *grads


def _norm_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, eps: float
) -> Tensor:
    hidden = F.gelu(_norm_linear(x, weight1, bias1, eps))
    return _linear(hidden, weight2, bias2).to(x.dtype) + x


def _norm_mlp_backward(
    dy: Tensor,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    y, scale = _standardise(x, eps)
    hidden = _linear(y, weight1, bias1)
    dhidden, *grads2 = _linear_backward(dy, F.gelu(hidden), weight2, bias2)
    dhidden = torch.ops.aten.gelu_backward(dhidden, hidden)
    dnorm, *grads1 = _linear_backward(dhidden, y, weight1, bias1)
    return _standardise_backward(dnorm, y, scale) + dy, *grads1, *grads2


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with zero mean and unit variance over its channels, and the factor that did the latter."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - _mean(x)
    scale = (_mean(centred.square()) + eps).rsqrt()
    return centred * scale, scale


def _standardise_backward(dy: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    dy = dy.to(y.dtype)
    return (dy - _mean(dy)).sub_(y * _mean(dy * y)).mul_(scale)


def _mean(x: Tensor) -> Tensor:
    # A matrix product, because it is faster than a reduction over the axis before the last.
    return x.new_full((1, x.shape[-2]), 1 / x.shape[-2]) @ x


def _over_voxels(gradient: Tensor) -> Tensor:
    """Adds up the gradients of a weight over the batch items of a block."""
    return gradient if gradient.ndim == 2 else gradient.sum(0)


def _fold(norm: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A linear map after a norm's scale and shift as one map: its weight and bias (a column)."""
    scale, shift = norm
    folded = weight @ shift[:, None]
    return weight * scale, folded if bias is None else folded + bias[:, None]


def _matmul_dtype(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The weights in the dtype of the matrix products: their own, or that of autocast."""
    check_dtype(x, weights[0])
    device, half = x.device.type, weights[0].dtype
    if half != torch.float64 and _autocasts(device):
        half = torch.get_autocast_dtype(device)
    return tuple(w.to(half) for w in weights)


# --- running them --------------------------------------------------------------------------------


def _run(chain: Chain, x: Tensor, residual: Tensor | None, *weights: Tensor) -> Tensor:
    size = x.shape[2:]
    x = x.flatten(2)
    residual = None if residual is None else residual.flatten(2)
    with without_autocast(x):
        # A compiler fuses, and decides what to keep, by itself.
        if torch.compiler.is_compiling() or x.numel() == 0:
            y = chain.forward(x, *weights)
            y = y if residual is None else y + residual
        else:
            y = _Pointwise.apply(chain, x, residual, *weights)
    return y.unflatten(2, size)


def _blocks(x: Tensor) -> Iterator[tuple]:
    """Indices that cut x (B, C, V) into blocks: one item's voxels, or several whole items."""
    batch, channels, voxels = x.shape
    cpu = x.device.type == "cpu"
    elements = torch.get_num_threads() * _CPU_BLOCK_PER_THREAD if cpu else _DEVICE_BLOCK
    length = max(elements // channels, 1)
    if length < voxels:
        for item in range(batch):
            for start in range(0, voxels, length):
                yield item, slice(None), slice(start, start + length)
    else:
        items = length // max(voxels, 1)
        for start in range(0, batch, items):
            yield (slice(start, start + items),)


class _Pointwise(torch.autograd.Function):
    """(chain, x (B, C, V), residual (B, D, V) or None, *weights) -> y (B, D, V); keeps x."""

    @staticmethod
    def forward(chain, x, residual, *weights):
        out = None
        for at in _blocks(x):
            y = chain.forward(x[at], *weights)
            if residual is not None:
                y = y + residual[at]
            if out is None:
                out = y.new_empty((x.shape[0], y.shape[-2], x.shape[2]))
            out[at] = y
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.chain, x, residual, *weights = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, *weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dx = torch.empty_like(x)
        totals = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        with without_autocast(x):
            for at in _blocks(x):
                dx[at], *grads = ctx.chain.backward(dy[at], x[at], *weights)
                for total, grad in zip(totals, grads, strict=True):
                    total.add_(grad)
        grads = (total.to(w.dtype) for total, w in zip(totals, weights, strict=True))
        return None, dx, dy if ctx.has_residual else None, *grads
