"""Layers that treat every voxel alike, a cache-sized block of voxels at a time.

Normalisation over the channels, pointwise linear maps and the MLP do little arithmetic on large
tensors: written as separate operations they wait for memory, and autograd keeps every intermediate.
Here each chain of them runs block by block, so that the intermediates stay in the cache, and the
backward pass computes them again from the chain's inputs, the only large tensors that are kept.

A chain is a pair of functions for one block of voxels, of inputs (C, voxels) or (batch, C, voxels):
the forward, and the backward with the gradients of inputs and weights. `_Pointwise` cuts the
tensors, runs the chain over the blocks, and adds up the gradients of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of a block. On a CPU half a MiB of float32 for each thread, a level-2 cache or less: half as
# much and twice as much are slower; elsewhere only the intermediates' memory counts.
_CPU_BLOCK_PER_THREAD = 2**17
_DEVICE_BLOCK = 2**26

Weights = tuple[Tensor, Tensor]  # weight and bias


def norm(x: Tensor, norm: Weights, eps: float) -> Tensor:
    """Layer normalisation over the channels of x (B, C, S1..Sp), in float32 at least."""
    return _run(_chain(_norm, _norm_backward, eps=eps), [x], [w[:, None] for w in norm])


def linear(x: Tensor, linear: Weights) -> Tensor:
    """W x + b over the channels of x (B, C, S1..Sp)."""
    return _run(_chain(_linear, _linear_backward), [x], _matmul_dtype(x, _columns(linear)))


def norm_linear(x: Tensor, norm: Weights, linear: Weights, eps: float) -> Tensor:
    """W norm(x) + b over the channels of x (B, C, S1..Sp)."""
    chain = _chain(_norm_linear, _norm_linear_backward, eps=eps)
    return _run(chain, [x], _matmul_dtype(x, _fold(norm, linear)))


def linear_norm_mlp(
    y: Tensor, x: Tensor, linear: Weights, norm: Weights, first: Weights, second: Weights, eps: float
) -> Tensor:
    """z + W2 gelu(W1 norm(z) + b1) + b2, where z = x + W y + b, over the channels of y and x."""
    weights = *_columns(linear), *_fold(norm, first), *_columns(second)
    chain = _chain(_linear_norm_mlp, _linear_norm_mlp_backward, eps=eps)
    return _run(chain, [y, x], _matmul_dtype(x, weights))


def check_dtype(x: Tensor, weight: Tensor) -> None:
    """Checks that x is of the dtype of a layer's weight, or that autocast sees to that."""
    if x.dtype != weight.dtype and not _autocasts(x.device.type):
        raise TypeError(f"x must be {weight.dtype}, as the weights are, got {x.dtype}")


def autocast_disabled(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which operations on x's device compute in the dtypes they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


# --- the chains ----------------------------------------------------------------------------------


class Chain(NamedTuple):
    """forward(*inputs, *weights) -> y; backward(dy, *inputs, *weights) -> a gradient of each."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, ...]]


def _chain(forward: Callable[..., Any], backward: Callable[..., Any], **options: Any) -> Chain:
    return Chain(partial(forward, **options), partial(backward, **options))


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.to(weight.dtype)
    return torch.addmm(bias, weight, x) if x.ndim == 2 else weight @ x + bias


def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    dy = dy.to(weight.dtype)
    dweight, dbias = dy @ x.to(weight.dtype).mT, dy.sum(-1, keepdim=True)
    return weight.mT @ dy, _over_voxels(dweight), _over_voxels(dbias)


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


def _linear_norm_mlp(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> Tensor:
    z = _plus(_linear(y, weight, bias), x)
    hidden = _norm_linear(z, weight1, bias1, eps)
    hidden = F.gelu(hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden)
    return _plus(_linear(hidden, weight2, bias2), z)


def _linear_norm_mlp_backward(
    dout: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    normed, scale = _standardise(_plus(_linear(y, weight, bias), x), eps)
    hidden = _linear(normed, weight1, bias1)
    dhidden, *grads2 = _linear_backward(dout, F.gelu(hidden), weight2, bias2)
    dhidden = torch.ops.aten.gelu_backward(dhidden, hidden)
    dnormed, *grads1 = _linear_backward(dhidden, normed, weight1, bias1)
    dz = _plus(_standardise_backward(dnormed, normed, scale), dout)
    dy, *grads = _linear_backward(dz, y, weight, bias)
    return dy, dz, *grads, *grads1, *grads2


def _standardise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with zero mean and unit variance over its channels, and the factor that did the latter."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - _mean(x)
    scale = (_mean(centred.square()) + eps).rsqrt()
    return centred * scale if torch.is_grad_enabled() else centred.mul_(scale), scale


def _standardise_backward(dy: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    dy = dy.to(y.dtype)
    return (dy - _mean(dy)).sub_(y * _mean(dy * y)).mul_(scale)


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y, in the memory of x, a chain's own, where no gradient is recorded and the dtype stays."""
    in_place = not torch.is_grad_enabled() and x.dtype == torch.promote_types(x.dtype, y.dtype)
    return x.add_(y) if in_place else x + y


def _mean(x: Tensor) -> Tensor:
    return x.mean(-2, keepdim=True)


def _over_voxels(gradient: Tensor) -> Tensor:
    """Adds up the gradients of a weight over the batch items of a block."""
    return gradient if gradient.ndim == 2 else gradient.sum(0)


def _columns(linear: Weights) -> Weights:
    return linear[0], linear[1][:, None]


def _fold(norm: Weights, linear: Weights) -> Weights:
    """A linear map after a norm's scale and shift, as one map."""
    (scale, shift), (weight, bias) = norm, _columns(linear)
    return weight * scale, weight @ shift[:, None] + bias


def _matmul_dtype(x: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights in the dtype of the matrix products: their own, or that of autocast."""
    check_dtype(x, weights[0])
    device, dtype = x.device.type, weights[0].dtype
    if _autocasts(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [w.to(dtype) for w in weights]


# --- running them --------------------------------------------------------------------------------


def _run(chain: Chain, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    size = inputs[0].shape[2:]
    inputs = [x.flatten(2) for x in inputs]
    with autocast_disabled(inputs[0]):
        # A compiler fuses, and decides what to keep, by itself.
        if torch.compiler.is_compiling() or inputs[0].numel() == 0:
            y = chain.forward(*inputs, *weights)
        else:
            y = _Pointwise.apply(chain, len(inputs), *inputs, *weights)
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
    """(chain, n, n inputs (B, C, V), weights) -> y (B, D, V); keeps the inputs."""

    @staticmethod
    def forward(chain, n, *tensors):
        inputs, weights = tensors[:n], tensors[n:]
        out = None
        for at in _blocks(inputs[0]):
            y = chain.forward(*(x[at] for x in inputs), *weights)
            if out is None:
                out = y.new_empty((inputs[0].shape[0], y.shape[-2], inputs[0].shape[2]))
            out[at] = y
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.chain, ctx.n, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        if torch.is_grad_enabled():  # this will be differentiated again
            return None, None, *torch.func.vjp(ctx.chain.forward, *saved)[1](dy)
        inputs, weights = saved[: ctx.n], saved[ctx.n :]
        dinputs = [torch.empty_like(x) for x in inputs]
        dweights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        with autocast_disabled(dy):
            for at in _blocks(inputs[0]):
                grads = ctx.chain.backward(dy[at], *(x[at] for x in inputs), *weights)
                for dinput, grad in zip(dinputs, grads, strict=False):
                    dinput[at] = grad
                for dweight, grad in zip(dweights, grads[ctx.n :], strict=True):
                    dweight.add_(grad)
        return None, None, *dinputs, *(d.to(w.dtype) for d, w in zip(dweights, weights, strict=True))
