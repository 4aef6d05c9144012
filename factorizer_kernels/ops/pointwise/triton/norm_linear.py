"""Triton kernels of ``norm_linear``: W n(x) + b, of which n, or W and b, may be left out.

Forward: a tile of x is standardised in registers and multiplied by blocks of W. Backward: one kernel writes
dx, another sums for the weights. Maps wider than a tile, and the norm alone, are norm.py's. With x̂ the
standardised x, s and t the norm's scale and shift, all that the weights' gradients need is G = Σ dy x̂ᵀ and
db = Σ dy:

    dW = G diag(s) + db tᵀ,   ds_c = Σ_d W_dc G_dc,   dt = Wᵀ db.
"""

from typing import cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.pointwise.reference import linear
from factorizer_kernels.ops.pointwise.spec import gradients_like
from factorizer_kernels.ops.pointwise.torch import linear_backward
from factorizer_kernels.ops.pointwise.triton import norm
from factorizer_kernels.ops.pointwise.triton.tiles import (
    MAX_CHANNELS,
    channel_block,
    columns,
    empty_shares,
    limit,
    load_matrix,
    load_tile,
    load_vector,
    products,
    programs_of,
    standardised,
    standardised_backward,
    store_tile,
    tile_of,
    tiles_of,
)
from factorizer_kernels.shared.dtypes import autocast_disabled
from factorizer_kernels.shared.launches import cdiv, launch
from factorizer_kernels.shared.registry import kernel

# Rows of W at a time; voxels of a tile, and the warps for it, of the sums too.
ROWS = 64
VOXELS = 64
WARPS, SUMS_WARPS = 2, 4


@triton.jit
def norm_linear_kernel(
    x, x_strides, norm_weight, norm_bias, weight, bias, y, voxels, eps,
    NORM: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, C_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous y (B, D, V)."""
    item, v = tile_of(tl.program_id(0), voxels, VOXELS)
    c = tl.arange(0, C_BLOCK)
    tile = load_tile(x, x_strides, item, c, v, voxels, C).to(tl.float32)
    if NORM:
        tile, _scale = standardised(tile, c, v < voxels, eps, C)
        tile = tile * load_vector(norm_weight, c, C)[:, None] + load_vector(norm_bias, c, C)[:, None]
    operand = tile.to(PRODUCT)
    for first in range(0, D, D_BLOCK):
        d = first + tl.arange(0, D_BLOCK)
        block = load_matrix(weight, d, c, D, C, PRODUCT)
        product = tl.dot(block, operand, input_precision=PRECISION)
        store_tile(y, item, d, v, voxels, product + load_vector(bias, d, D)[:, None], D)


@triton.jit
def norm_linear_backward_kernel(
    dy, dy_strides, x, x_strides, addend, addend_strides, norm_weight, weight, dx, voxels, eps,
    NORM: tl.constexpr, ADDEND: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, C_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous dx (B, C, V), with ADDEND the sum with that map."""
    item, v = tile_of(tl.program_id(0), voxels, VOXELS)
    c = tl.arange(0, C_BLOCK)
    gradient = tl.zeros([C_BLOCK, VOXELS], tl.float32)
    for first in range(0, D, D_BLOCK):
        d = first + tl.arange(0, D_BLOCK)
        block = load_matrix(weight, d, c, D, C, PRODUCT)
        operand = load_tile(dy, dy_strides, item, d, v, voxels, D).to(PRODUCT)
        gradient = tl.dot(tl.trans(block), operand, gradient, input_precision=PRECISION)
    if NORM:
        tile = load_tile(x, x_strides, item, c, v, voxels, C).to(tl.float32)
        tile, scale = standardised(tile, c, v < voxels, eps, C)
        gradient = gradient * load_vector(norm_weight, c, C)[:, None]
        gradient = standardised_backward(gradient, tile, scale, C)
    if ADDEND:
        gradient += load_tile(addend, addend_strides, item, c, v, voxels, C).to(tl.float32)
    store_tile(dx, item, c, v, voxels, gradient, C)


@triton.jit
def linear_sums_kernel(
    dy, dy_strides, x, x_strides, shares, bias_shares, batch, voxels, eps,
    NORM: tl.constexpr, C: tl.constexpr, D: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, C_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Shares (programs, D, C) of Σ dy x̂ᵀ (without NORM Σ dy xᵀ), and (programs, D) of Σ dy; D_BLOCK rows."""
    c, d = tl.arange(0, C_BLOCK), tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    total = tl.zeros([D_BLOCK, C_BLOCK], tl.float32)
    bias_total = tl.zeros([D_BLOCK], tl.float32)
    for at in range(tl.program_id(0), batch * tl.cdiv(voxels, VOXELS), tl.num_programs(0)):
        item, v = tile_of(at, voxels, VOXELS)
        tile = load_tile(x, x_strides, item, c, v, voxels, C)
        if NORM:
            tile, _scale = standardised(tile.to(tl.float32), c, v < voxels, eps, C)
        gradient = load_tile(dy, dy_strides, item, d, v, voxels, D)
        bias_total += tl.sum(gradient.to(tl.float32), axis=1)
        total = tl.dot(gradient.to(PRODUCT), tl.trans(tile.to(PRODUCT)), total, input_precision=PRECISION)
    row = tl.program_id(0) * D + d
    tl.store(shares + row[:, None] * C + c[None, :], total, mask=(d < D)[:, None] & (c < C)[None, :])
    tl.store(bias_shares + row, bias_total, mask=d < D)


def linear_sums(dy: Tensor, x: Tensor, eps: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """G = Σ dy x̂ᵀ (D, C), or Σ dy xᵀ where eps is None, and Σ dy (D), of dy (B, D, V) and x (B, C, V)."""
    d, c = dy.shape[1], x.shape[1]
    block = channel_block(d, ROWS)
    programs = programs_of(tiles_of(x, VOXELS), cdiv(d, block))
    shares, bias_shares = empty_shares(x, programs, (d, c), (d,))
    launch(
        linear_sums_kernel, (programs, cdiv(d, block)), x,
        dy, dy.stride()[:2], x, x.stride()[:2], shares, bias_shares, x.shape[0], x.shape[2], eps or 0.0,
        NORM=eps is not None, C=c, D=d, **products(dtype), C_BLOCK=channel_block(c), D_BLOCK=block,
        VOXELS=VOXELS, num_warps=SUMS_WARPS,
    )  # fmt: skip
    return shares.sum(0), bias_shares.sum(0)


def weights_before(
    sums: Tensor, dbias: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the norm's scale and shift, and of the weight behind it, from G and db."""
    dweight = torch.addcmul(dbias[:, None] * norm_bias, sums, norm_weight)
    with autocast_disabled(weight):
        return (weight * sums).sum(0), dbias @ weight, dweight


@kernel("norm_linear", "triton", limit(norm.MAX_CHANNELS))
def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    channels = x.shape[1] if weight is None else weight.shape[0]
    size, x = x.shape[2:], columns(x)
    if weight is None or bias is None or max(x.shape[1], channels) > MAX_CHANNELS:
        y = norm.normed(x, norm_weight, norm_bias, eps, dtype)
        if weight is not None and bias is not None:
            y = linear(y, weight, bias, dtype)
        return y.unflatten(2, size)
    y = x.new_empty((x.shape[0], channels, *size), dtype=dtype)
    launch(
        norm_linear_kernel, tiles_of(x, VOXELS), x,
        x, x.stride()[:2], *_present(x, norm_weight, norm_bias, weight, bias), y, x.shape[2], eps,
        NORM=norm_weight is not None, C=x.shape[1], D=channels, **products(dtype),
        C_BLOCK=channel_block(x.shape[1]), D_BLOCK=channel_block(channels, ROWS), VOXELS=VOXELS,
        num_warps=WARPS,
    )  # fmt: skip
    return y


def _present(x: Tensor, *weights: Tensor | None) -> list[Tensor]:
    """Contiguous weights; x in the place of one that is absent, which no kernel reads."""
    return [x if w is None else w.contiguous() for w in weights]


def data_gradient(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    eps: float,
    dtype: torch.dtype,
    dx: Tensor,
    addend: Tensor | None = None,
) -> None:
    """Write the contiguous dx (+ addend), of dy (B, D, V) and x, addend (B, C, V)."""
    added = dy if addend is None else addend
    launch(
        norm_linear_backward_kernel, tiles_of(x, VOXELS), x,
        dy, dy.stride()[:2], x, x.stride()[:2], added, added.stride()[:2],
        *_present(x, norm_weight, weight), dx, x.shape[2], eps,
        NORM=norm_weight is not None, ADDEND=addend is not None, C=x.shape[1], D=dy.shape[1],
        **products(dtype), C_BLOCK=channel_block(x.shape[1]), D_BLOCK=channel_block(dy.shape[1], ROWS),
        VOXELS=VOXELS, num_warps=WARPS,
    )  # fmt: skip


@kernel("norm_linear_backward", "triton", limit(norm.MAX_CHANNELS))
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
    dx, *dweights = gradients_like([x], [norm_weight, norm_bias, weight, bias], weight_grads)
    dy, x, addend = columns(dy), columns(x), None if addend is None else columns(addend)
    dscale, dshift, dweight, dbias = dweights
    if weight is None or max(x.shape[1], dy.shape[1]) > MAX_CHANNELS:
        if weight is not None:
            normed = norm.normed(x, norm_weight, norm_bias, eps, dtype)
            dy, *of_product = linear_backward(dy, normed, weight, dtype, weight_grads)
            if weight_grads:
                dweight, dbias = cast(list[Tensor], of_product)
        if norm_weight is None:
            dx.flatten(2).copy_(dy if addend is None else dy + addend)
        else:
            of_norm = norm.normed_backward(dy, x, norm_weight, eps, addend, weight_grads, dx)
            dscale, dshift = of_norm or (dscale, dshift)
        return dx, dscale, dshift, dweight, dbias
    data_gradient(dy, x, norm_weight, weight, eps, dtype, dx, addend)
    if not weight_grads:
        return dx, *dweights
    if norm_weight is None or norm_bias is None:
        dweight, dbias = linear_sums(dy, x, None, dtype)
    else:
        sums, dbias = linear_sums(dy, x, eps, dtype)
        dscale, dshift, dweight = weights_before(sums, dbias, norm_weight, norm_bias, weight)
    return dx, dscale, dshift, dweight, dbias
