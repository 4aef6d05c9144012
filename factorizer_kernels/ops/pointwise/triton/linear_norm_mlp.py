"""Triton kernels of ``linear_norm_mlp``: z + W2 gelu(W1 n(z) + b1) + b2, where z = x + W y + b.

Forward: z stays in registers, and the hidden channels exist HIDDEN at a time. The backward computes them
again, in two kernels, since one would not fit the registers: one writes dy and dz, which is dx; another,
whose programs have HIDDEN hidden channels each, sums for W1 and W2. dW = Σ dz yᵀ is that of a linear map.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.pointwise.reference import linear
from factorizer_kernels.ops.pointwise.spec import gradients_like
from factorizer_kernels.ops.pointwise.torch import linear_backward
from factorizer_kernels.ops.pointwise.triton import norm
from factorizer_kernels.ops.pointwise.triton.norm_linear import linear_sums, weights_before
from factorizer_kernels.ops.pointwise.triton.tiles import (
    MAX_CHANNELS,
    channel_block,
    columns,
    empty_shares,
    exact,
    gelu,
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
from factorizer_kernels.shared.launches import cdiv, launch
from factorizer_kernels.shared.maps import empty_map
from factorizer_kernels.shared.registry import kernel

# Voxels of a tile and hidden channels at a time, of the exact products and of others. More of either would
# take fewer instructions, but not fit the registers.
WARPS = 4
FORWARD, EXACT_FORWARD = (64, 64), (64, 32)
BACKWARD, EXACT_BACKWARD = (128, 32), (64, 32)
SUMS, EXACT_SUMS = (64, 64), (32, 32)


@triton.jit
def _middle(
    y, y_strides, x, x_strides, weight, bias, item, c, e, v, voxels, eps,
    E: tl.constexpr, C: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z = x + W y + b of a tile, z standardised, and the factor that did it."""
    z = load_tile(x, x_strides, item, c, v, voxels, C).to(tl.float32) + load_vector(bias, c, C)[:, None]
    operand = load_tile(y, y_strides, item, e, v, voxels, E).to(PRODUCT)
    z = tl.dot(load_matrix(weight, c, e, C, E, PRODUCT), operand, z, input_precision=PRECISION)
    normed, scale = standardised(z, c, v < voxels, eps, C)
    return z, normed, scale


@triton.jit
def linear_norm_mlp_kernel(
    y, y_strides, x, x_strides, weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out,
    voxels, eps,
    E: tl.constexpr, C: tl.constexpr, H: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    E_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous out (B, C, V)."""
    item, v = tile_of(tl.program_id(0), voxels, VOXELS)
    c, e = tl.arange(0, C_BLOCK), tl.arange(0, E_BLOCK)
    z, normed, _scale = _middle(
        y, y_strides, x, x_strides, weight, bias, item, c, e, v, voxels, eps, E, C, PRODUCT, PRECISION
    )
    scaled = normed * load_vector(norm_weight, c, C)[:, None] + load_vector(norm_bias, c, C)[:, None]
    operand = scaled.to(PRODUCT)
    z += load_vector(bias2, c, C)[:, None]
    for first in range(0, H, H_BLOCK):
        h = first + tl.arange(0, H_BLOCK)
        hidden = tl.dot(load_matrix(weight1, h, c, H, C, PRODUCT), operand, input_precision=PRECISION)
        activated, _slope = gelu(hidden + load_vector(bias1, h, H)[:, None])
        block = load_matrix(weight2, c, h, C, H, PRODUCT)
        z = tl.dot(block, activated.to(PRODUCT), z, input_precision=PRECISION)
    store_tile(out, item, c, v, voxels, z, C)


@triton.jit
def linear_norm_mlp_backward_kernel(
    dout, dout_strides, y, y_strides, x, x_strides, weight, bias, norm_weight, norm_bias, weight1, bias1,
    weight2, dy, dx, voxels, eps,
    E: tl.constexpr, C: tl.constexpr, H: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    E_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous dy (B, E, V) and dx (B, C, V)."""
    item, v = tile_of(tl.program_id(0), voxels, VOXELS)
    c, e = tl.arange(0, C_BLOCK), tl.arange(0, E_BLOCK)
    _z, normed, scale = _middle(
        y, y_strides, x, x_strides, weight, bias, item, c, e, v, voxels, eps, E, C, PRODUCT, PRECISION
    )
    norm_scale = load_vector(norm_weight, c, C)[:, None]
    operand = (normed * norm_scale + load_vector(norm_bias, c, C)[:, None]).to(PRODUCT)
    gradient = load_tile(dout, dout_strides, item, c, v, voxels, C).to(tl.float32)
    gradient_operand = gradient.to(PRODUCT)
    through = tl.zeros([C_BLOCK, VOXELS], tl.float32)
    for first in range(0, H, H_BLOCK):
        h = first + tl.arange(0, H_BLOCK)
        block = load_matrix(weight1, h, c, H, C, PRODUCT)
        hidden = tl.dot(block, operand, input_precision=PRECISION) + load_vector(bias1, h, H)[:, None]
        _activated, slope = gelu(hidden)
        second = load_matrix(weight2, c, h, C, H, PRODUCT)
        dhidden = tl.dot(tl.trans(second), gradient_operand, input_precision=PRECISION) * slope
        through = tl.dot(tl.trans(block), dhidden.to(PRODUCT), through, input_precision=PRECISION)
    gradient += standardised_backward(through * norm_scale, normed, scale, C)
    store_tile(dx, item, c, v, voxels, gradient, C)
    block = load_matrix(weight, c, e, C, E, PRODUCT)
    store_tile(
        dy, item, e, v, voxels,
        tl.dot(tl.trans(block), gradient.to(PRODUCT), input_precision=PRECISION), E,
    )  # fmt: skip


@triton.jit
def mlp_sums_kernel(
    dout, dout_strides, y, y_strides, x, x_strides, weight, bias, norm_weight, norm_bias, weight1, bias1,
    weight2, shares1, bias_shares1, shares2, bias_shares2, batch, voxels, eps,
    E: tl.constexpr, C: tl.constexpr, H: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    E_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, H_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Shares of Σ da ẑᵀ (programs, H, C) and Σ da (programs, H), where a = W1 n(z) + b1, and of Σ g doutᵀ
    (programs, H, C), where g = gelu(a), and Σ dout (programs, C); H_BLOCK hidden channels of them.
    """
    c, e = tl.arange(0, C_BLOCK), tl.arange(0, E_BLOCK)
    h = tl.program_id(1) * H_BLOCK + tl.arange(0, H_BLOCK)
    norm_scale, norm_shift = load_vector(norm_weight, c, C)[:, None], load_vector(norm_bias, c, C)[:, None]
    first = load_matrix(weight1, h, c, H, C, PRODUCT)
    second = tl.trans(load_matrix(weight2, c, h, C, H, PRODUCT))
    shift1 = load_vector(bias1, h, H)[:, None]
    total1, total2 = tl.zeros([H_BLOCK, C_BLOCK], tl.float32), tl.zeros([H_BLOCK, C_BLOCK], tl.float32)
    bias_total1, bias_total2 = tl.zeros([H_BLOCK], tl.float32), tl.zeros([C_BLOCK], tl.float32)
    for at in range(tl.program_id(0), batch * tl.cdiv(voxels, VOXELS), tl.num_programs(0)):
        item, v = tile_of(at, voxels, VOXELS)
        _z, normed, _scale = _middle(
            y, y_strides, x, x_strides, weight, bias, item, c, e, v, voxels, eps, E, C, PRODUCT, PRECISION
        )
        operand = (normed * norm_scale + norm_shift).to(PRODUCT)
        activated, slope = gelu(tl.dot(first, operand, input_precision=PRECISION) + shift1)
        gradient = load_tile(dout, dout_strides, item, c, v, voxels, C)
        bias_total2 += tl.sum(gradient.to(tl.float32), axis=1)
        gradient = gradient.to(PRODUCT)
        total2 = tl.dot(activated.to(PRODUCT), tl.trans(gradient), total2, input_precision=PRECISION)
        dhidden = tl.dot(second, gradient, input_precision=PRECISION) * slope
        bias_total1 += tl.sum(dhidden, axis=1)
        total1 = tl.dot(dhidden.to(PRODUCT), tl.trans(normed.to(PRODUCT)), total1, input_precision=PRECISION)
    row = tl.program_id(0) * H + h
    at, inside = row[:, None] * C + c[None, :], (h < H)[:, None] & (c < C)[None, :]
    tl.store(shares1 + at, total1, mask=inside)
    tl.store(shares2 + at, total2, mask=inside)
    tl.store(bias_shares1 + row, bias_total1, mask=h < H)
    tl.store(bias_shares2 + tl.program_id(0) * C + c, bias_total2, mask=(c < C) & (tl.program_id(1) == 0))


def _constants(y: Tensor, x: Tensor, hidden: int, dtype, tile: tuple[int, int]) -> dict:
    voxels, block = tile
    return {
        "E": y.shape[1], "C": x.shape[1], "H": hidden, **products(dtype),
        "E_BLOCK": channel_block(y.shape[1]), "C_BLOCK": channel_block(x.shape[1]),
        "H_BLOCK": channel_block(hidden, block), "VOXELS": voxels, "num_warps": WARPS,
    }  # fmt: skip


# --- Maps wider than a tile: the norm alone is a kernel, and torch multiplies ----------------------


def _wide_middle(y, x, weight, bias, norm_weight, norm_bias, weight1, bias1, eps, dtype):
    """(z, z normed, the hidden layer's input) of y (B, E, V) and x (B, C, V)."""
    z = linear(y, weight, bias, dtype) + x.to(weight.dtype)
    normed = norm.normed(z, norm_weight, norm_bias, eps, dtype)
    return z, normed, linear(normed, weight1, bias1, dtype)


def _wide(y, x, weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps, dtype):
    z, _normed, hidden = _wide_middle(y, x, weight, bias, norm_weight, norm_bias, weight1, bias1, eps, dtype)
    return z.add_(linear(F.gelu(hidden.to(z.dtype)), weight2, bias2, dtype))


def _wide_backward(outputs, dout, y, x, *others) -> tuple[Tensor, ...]:
    weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, _, eps, dtype, weight_grads = others
    compute = weight.dtype
    z, normed, hidden = _wide_middle(y, x, weight, bias, norm_weight, norm_bias, weight1, bias1, eps, dtype)
    hidden, dout = hidden.to(compute), dout.to(compute)
    dhidden, *of_second = linear_backward(dout, F.gelu(hidden), weight2, dtype, weight_grads)
    dhidden = torch.ops.aten.gelu_backward(dhidden.to(compute), hidden)
    dnormed, *of_first = linear_backward(dhidden, normed, weight1, dtype, weight_grads)
    dz = torch.empty_like(z)
    of_norm = norm.normed_backward(dnormed, z, norm_weight, eps, dout, weight_grads, dz)
    dy, *of_linear = linear_backward(dz, y, weight, dtype, weight_grads)
    outputs[0].flatten(2).copy_(dy)
    outputs[1].flatten(2).copy_(dz)
    if not weight_grads:
        return tuple(outputs)
    return (*outputs[:2], *of_linear, *of_norm, *of_first, *of_second)


# --- Registered --------------------------------------------------------------------------------


@kernel("linear_norm_mlp", "triton", limit(norm.MAX_CHANNELS))
def linear_norm_mlp(y: Tensor, x: Tensor, *others) -> Tensor:
    *weights, eps, dtype = others
    if max(y.shape[1], x.shape[1]) > MAX_CHANNELS:
        return _wide(columns(y), columns(x), *others).to(x.dtype).unflatten(2, x.shape[2:])
    weights = [w.contiguous() for w in weights]
    out = empty_map(x)
    y, x = columns(y), columns(x)
    constants = _constants(y, x, weights[4].shape[0], dtype, EXACT_FORWARD if exact(dtype) else FORWARD)
    launch(
        linear_norm_mlp_kernel, tiles_of(x, constants["VOXELS"]), x,
        y, y.stride()[:2], x, x.stride()[:2], *weights, out, x.shape[2], eps, **constants,
    )  # fmt: skip
    return out


@kernel("linear_norm_mlp_backward", "triton", limit(norm.MAX_CHANNELS))
def linear_norm_mlp_backward(dout: Tensor, y: Tensor, x: Tensor, *others) -> tuple[Tensor, ...]:
    *weights, eps, dtype, weight_grads = others
    *weights, bias2 = (w.contiguous() for w in weights)
    dy, dx, *dweights = gradients_like([y, x], [*weights, bias2], weight_grads)
    dout, y, x = columns(dout), columns(y), columns(x)
    if max(y.shape[1], x.shape[1]) > MAX_CHANNELS:
        return _wide_backward([dy, dx, *dweights], dout, y, x, *others)
    maps = (dout, dout.stride()[:2], y, y.stride()[:2], x, x.stride()[:2])
    hidden, channels = weights[4].shape
    constants = _constants(y, x, hidden, dtype, EXACT_BACKWARD if exact(dtype) else BACKWARD)
    launch(
        linear_norm_mlp_backward_kernel, tiles_of(x, constants["VOXELS"]), x,
        *maps, *weights, dy, dx, x.shape[2], eps, **constants,
    )  # fmt: skip
    if not weight_grads:
        return dy, dx, *dweights
    constants = _constants(y, x, hidden, dtype, EXACT_SUMS if exact(dtype) else SUMS)
    blocks = cdiv(hidden, constants["H_BLOCK"])
    programs = programs_of(tiles_of(x, constants["VOXELS"]), blocks)
    shares = empty_shares(x, programs, (hidden, channels), (hidden,), (hidden, channels), (channels,))
    launch(
        mlp_sums_kernel, (programs, blocks), x,
        *maps, *weights, *shares, x.shape[0], x.shape[2], eps, **constants,
    )  # fmt: skip
    sums1, dbias1, sums2, dbias2 = (share.sum(0) for share in shares)
    _, _, norm_weight, norm_bias, weight1, *_ = weights
    dscale, dshift, dweight1 = weights_before(sums1, dbias1, norm_weight, norm_bias, weight1)
    dweight, dbias = linear_sums(dx.flatten(2), y, None, dtype)
    return dy, dx, dweight, dbias, dscale, dshift, dweight1, dbias1, sums2.mT.contiguous(), dbias2
