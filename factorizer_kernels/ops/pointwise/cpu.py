"""The pointwise operators: the calls of the C++ kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from factorizer_kernels.ops.pointwise.spec import coarse_size, fine_size, gradients_like, yields
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.maps import three_axes
from factorizer_kernels.shared.registry import kernel


def _result(out: Tensor | None, x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """out, where a result of this shape and dtype fits there, else new memory."""
    if out is not None and out.shape == torch.Size(shape) and out.dtype == dtype:
        return out
    return x.new_empty(shape, dtype=dtype)


_Map = tuple[int, int, int, int, int]


def _columns(x: Tensor) -> Tensor:
    """x (B, C, S1..Sp) as (B, C, V) whose voxels lie side by side; a copy where they do not."""
    x = x.flatten(2)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _read(x: Tensor) -> _Map:
    return cpu.DTYPE_CODES[x.dtype], *cpu.memory(x), x.stride(0), x.stride(1)


def _written(x: Tensor) -> tuple[int, int, int]:
    return cpu.DTYPE_CODES[x.dtype], *cpu.memory(x)


def _contiguous(*weights: Tensor | None) -> list[Any]:
    return [w if w is None else w.contiguous() for w in weights]


def _memories(tensors: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
    return [None if t is None else cpu.memory(t) for t in tensors]


def _gradients(outputs: Sequence[Tensor], weight_grads: bool) -> list[tuple[int, int] | None]:
    return _memories(outputs) if weight_grads else []


# --- norm_linear -----------------------------------------------------------------------------


def _norm_linear_sizes(x: Tensor, weights: list[Tensor | None], eps: float) -> dict:
    norm_weight, _, weight, _ = weights
    compute = next(w for w in (norm_weight, weight) if w is not None).dtype
    return {
        "compute": cpu.DTYPE_CODES[compute],
        "batch": x.shape[0],
        "voxels": x.shape[2],
        "channels": x.shape[1],
        "out_channels": x.shape[1] if weight is None else weight.shape[0],
        "eps": eps,
        "weights": _memories(weights),
        "threads": cpu.threads(),
    }


@kernel("norm_linear", "cpu", yields=yields, takes_out=True)
def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    weights = _contiguous(norm_weight, norm_bias, weight, bias)
    channels = x.shape[1] if weight is None else weight.shape[0]
    y = _result(out, x, (x.shape[0], channels, *x.shape[2:]), dtype)
    x = _columns(x)
    sizes = _norm_linear_sizes(x, weights, eps)
    cpu.native.norm_linear_forward(x=_read(x), y=_written(y), **sizes)
    return y


@kernel("norm_linear_backward", "cpu")
def norm_linear_backward(
    dy: Tensor,
    addend: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    weights = _contiguous(norm_weight, norm_bias, weight, bias)
    dx, *dweights = outputs = gradients_like([x], weights, weight_grads)
    dy, x, addend = _columns(dy), _columns(x), None if addend is None else _columns(addend)
    cpu.native.norm_linear_backward(
        dy=_read(dy), x=_read(x), addend=None if addend is None else _read(addend), dx=_written(dx),
        gradients=_gradients(dweights, weight_grads), **_norm_linear_sizes(x, weights, eps),
    )  # fmt: skip
    return tuple(outputs)


# --- linear_norm_mlp -------------------------------------------------------------------------


def _linear_norm_mlp_sizes(y: Tensor, x: Tensor, weights: list[Tensor], eps: float) -> dict:
    return {
        "compute": cpu.DTYPE_CODES[weights[0].dtype],
        "batch": x.shape[0],
        "voxels": x.shape[2],
        "in_channels": y.shape[1],
        "channels": x.shape[1],
        "hidden": weights[4].shape[0],
        "eps": eps,
        "weights": _memories(weights),
        "threads": cpu.threads(),
    }


@kernel("linear_norm_mlp", "cpu", takes_out=True)
def linear_norm_mlp(y: Tensor, x: Tensor, *others, out: Tensor | None = None) -> Tensor:
    *weights, eps, _ = others
    weights = _contiguous(*weights)
    out = _result(out, x, x.shape, x.dtype)
    y, x = _columns(y), _columns(x)
    cpu.native.linear_norm_mlp_forward(
        y=_read(y), x=_read(x), out=_written(out), **_linear_norm_mlp_sizes(y, x, weights, eps)
    )
    return out


@kernel("linear_norm_mlp_backward", "cpu")
def linear_norm_mlp_backward(dout: Tensor, y: Tensor, x: Tensor, *others) -> tuple[Tensor, ...]:
    *weights, eps, _, weight_grads = others
    weights = _contiguous(*weights)
    dy, dx, *dweights = outputs = gradients_like([y, x], weights, weight_grads)
    dout, y, x = _columns(dout), _columns(y), _columns(x)
    cpu.native.linear_norm_mlp_backward(
        dout=_read(dout), y=_read(y), x=_read(x), dy=_written(dy), dx=_written(dx),
        gradients=_gradients(dweights, weight_grads), **_linear_norm_mlp_sizes(y, x, weights, eps),
    )  # fmt: skip
    return tuple(outputs)


# --- join and patch_conv ---------------------------------------------------------------------


def _grids(x: Tensor, weight: Tensor, coarse: tuple[int, ...]) -> dict:
    return {
        "compute": cpu.DTYPE_CODES[weight.dtype],
        "batch": x.shape[0],
        "size": three_axes(coarse, 1),
        "scale": three_axes(weight.shape[2:], 1),
        "threads": cpu.threads(),
    }


def _join_sizes(skip: Tensor, x: Tensor, weights: list[Tensor]) -> dict:
    return {
        "skip_channels": skip.shape[1],
        "channels": x.shape[1],
        "out_channels": weights[0].shape[0],
        "weights": _memories(weights),
        **_grids(x, weights[1], tuple(x.shape[2:])),
    }


@kernel("join", "cpu", takes_out=True)
def join(
    skip: Tensor,
    x: Tensor,
    weight_skip: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    weights = _contiguous(weight_skip, weight_x, bias)
    y = _result(out, x, (x.shape[0], weight_skip.shape[0], *fine_size(x, weight_x)), dtype)
    sizes = _join_sizes(skip, x, weights)
    skip, x = _columns(skip), _columns(x)
    cpu.native.join_forward(skip=_read(skip), x=_read(x), y=_written(y), **sizes)
    return y


@kernel("join_backward", "cpu")
def join_backward(
    dy: Tensor,
    skip: Tensor,
    x: Tensor,
    weight_skip: Tensor,
    weight_x: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    weight_grads: bool,
) -> tuple[Tensor, ...]:
    weights = _contiguous(weight_skip, weight_x, bias)
    dskip, dx, *dweights = outputs = gradients_like([skip, x], weights, weight_grads)
    sizes = _join_sizes(skip, x, weights)
    dy, skip, x = _columns(dy), _columns(skip), _columns(x)
    cpu.native.join_backward(
        dy=_read(dy), skip=_read(skip), x=_read(x), dskip=_written(dskip), dx=_written(dx),
        gradients=_gradients(dweights, weight_grads), **sizes,
    )  # fmt: skip
    return tuple(outputs)


def _patch_conv_sizes(x: Tensor, weights: list[Tensor]) -> dict:
    return {
        "channels": x.shape[1],
        "out_channels": weights[0].shape[0],
        "weights": _memories(weights),
        **_grids(x, weights[0], coarse_size(x, weights[0])),
    }


@kernel("patch_conv", "cpu", yields=yields)
def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    weights = _contiguous(weight, bias)
    y = x.new_empty((x.shape[0], weight.shape[0], *coarse_size(x, weight)), dtype=dtype)
    sizes = _patch_conv_sizes(x, weights)
    x = _columns(x)
    cpu.native.patch_conv_forward(x=_read(x), y=_written(y), **sizes)
    return y


@kernel("patch_conv_backward", "cpu")
def patch_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, weight_grads: bool
) -> tuple[Tensor, ...]:
    weights = _contiguous(weight, bias)
    dx, *dweights = outputs = gradients_like([x], weights, weight_grads)
    sizes = _patch_conv_sizes(x, weights)
    dy, x = _columns(dy), _columns(x)
    cpu.native.patch_conv_backward(
        dy=_read(dy), x=_read(x), dx=_written(dx), gradients=_gradients(dweights, weight_grads), **sizes
    )
    return tuple(outputs)
