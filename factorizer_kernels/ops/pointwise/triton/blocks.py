"""Triton kernels of ``join`` and ``patch_conv``: linear maps between a grid and one coarser by whole numbers.

A place is where a fine voxel lies in its block, (p1, p2, p3) of the kernel's k1 x k2 x k3. ``gather`` maps a
block's voxels to the coarse one, Σ_p A_p fine_p; ``spread`` does the reverse, fine_p = A_p coarse, beside a
linear map of another fine map; ``block_sums`` has the weights' gradients, Σ coarse fine_pᵀ. A program has a
tile of coarse voxels and goes through the places. Where blocks are two voxels wide, the two places of a row
go together: their fine voxels lie side by side, and are moved so.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.pointwise.spec import coarse_size, fine_size, gradients_like
from factorizer_kernels.ops.pointwise.triton.norm_linear import data_gradient, linear_sums
from factorizer_kernels.ops.pointwise.triton.tiles import (
    MAX_CHANNELS,
    channel_block,
    columns,
    empty_shares,
    exact,
    limit,
    load_matrix,
    load_vector,
    products,
    programs_of,
)
from factorizer_kernels.shared.launches import cdiv, launch, padded
from factorizer_kernels.shared.maps import three_axes
from factorizer_kernels.shared.registry import kernel

# Channels of a product's result at a time; voxels of a coarse tile at most, of exact products and of others.
ROWS = 64
VOXELS, EXACT_VOXELS = 64, 32
WARPS = 4


@triton.jit
def _tile(at, sizes, VOXELS: tl.constexpr):
    """(item, i1, i2, i3) where tile ``at`` of a coarse map begins: VOXELS of one of its rows."""
    blocks = tl.cdiv(sizes[2], VOXELS)
    row = at // blocks
    return row // (sizes[0] * sizes[1]), row // sizes[1] % sizes[0], row % sizes[1], at % blocks * VOXELS


@triton.jit
def _coarse(i1, i2, i3, sizes, VOXELS: tl.constexpr):
    """The coarse voxels of a tile, and which of them are in its row."""
    n = i3 + tl.arange(0, VOXELS)
    return (i1 * sizes[1] + i2) * sizes[2] + n, n < sizes[2]


@triton.jit
def _fine(i1, i2, i3, place, sizes, KERNEL: tl.constexpr, WIDTH: tl.constexpr, VOXELS: tl.constexpr):
    """The fine voxels of a tile at WIDTH places from ``place`` on, and which of them are in its row."""
    at_1 = i1 * KERNEL[0] + place // (KERNEL[1] * KERNEL[2])
    at_2 = i2 * KERNEL[1] + place // KERNEL[2] % KERNEL[1]
    row = (at_1 * (sizes[1] * KERNEL[1]) + at_2) * (sizes[2] * KERNEL[2])
    n = tl.arange(0, WIDTH * VOXELS)
    if KERNEL[2] == WIDTH:  # noqa: SIM108 (the compiler takes one)
        fine = row + i3 * WIDTH + n  # side by side, and known to be
    else:
        fine = row + (i3 + n) * KERNEL[2] + place % KERNEL[2]
    return fine, i3 + n // WIDTH < sizes[2]


@triton.jit
def _halves(tile, ROWS: tl.constexpr, VOXELS: tl.constexpr):
    """The voxels of a tile at even places, and those at odd ones."""
    return tl.split(tl.reshape(tile, [ROWS, VOXELS, 2]))


@triton.jit
def _load(x, strides, item, c, v, inside, C: tl.constexpr):
    """Channels c and voxels v of an item of x (B, C, V), whose voxels lie side by side."""
    at = item.to(tl.int64) * strides[0] + c.to(tl.int64)[:, None] * strides[1] + v[None, :]
    return tl.load(x + at, mask=(c < C)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _store(y, item, d, v, voxels, inside, tile, D: tl.constexpr):
    """The same of the contiguous y (B, D, voxels)."""
    at = (item.to(tl.int64) * D + d)[:, None] * voxels + v[None, :]
    tl.store(y + at, tile, mask=(d < D)[:, None] & inside[None, :])


@triton.jit
def _load_place(
    weight, place, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRODUCT: tl.constexpr
):
    """A block of the matrix of a place, of the contiguous weight (places, ROWS, COLUMNS)."""
    return load_matrix(weight + place * (ROWS * COLUMNS), rows, columns, ROWS, COLUMNS, PRODUCT)


@triton.jit
def gather_kernel(
    x, x_strides, weight, bias, y, sizes,
    BIAS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr, WIDTH: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    C_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """D_BLOCK channels of a tile of the contiguous coarse y (B, D, V), from the fine x (B, C, ..)."""
    item, i1, i2, i3 = _tile(tl.program_id(0), sizes, VOXELS)
    c, d = tl.arange(0, C_BLOCK), tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    total = tl.zeros([D_BLOCK, VOXELS], tl.float32)
    if BIAS:
        total += load_vector(bias, d, D)[:, None]
    for place in range(0, KERNEL[0] * KERNEL[1] * KERNEL[2], WIDTH):
        fine, inside = _fine(i1, i2, i3, place, sizes, KERNEL, WIDTH, VOXELS)
        operand = _load(x, x_strides, item, c, fine, inside, C).to(PRODUCT)
        block = _load_place(weight, place, d, c, D, C, PRODUCT)
        if WIDTH == 2:
            operand, second = _halves(operand, C_BLOCK, VOXELS)
            other = _load_place(weight, place + 1, d, c, D, C, PRODUCT)
            total = tl.dot(other, second, total, input_precision=PRECISION)
        total = tl.dot(block, operand, total, input_precision=PRECISION)
    v, near = _coarse(i1, i2, i3, sizes, VOXELS)
    _store(y, item, d, v, sizes[0] * sizes[1] * sizes[2], near, total, D)


@triton.jit
def spread_kernel(
    x, x_strides, weight, skip, skip_strides, weight_skip, bias, y, sizes,
    SKIP: tl.constexpr, C: tl.constexpr, E: tl.constexpr, D: tl.constexpr, KERNEL: tl.constexpr,
    WIDTH: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    C_BLOCK: tl.constexpr, E_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """D_BLOCK channels of the contiguous fine y (B, D, ..) in the blocks of a tile of the coarse x (B, E, V).

    With SKIP beside W_s skip + bias of the fine skip (B, C, ..).
    """
    PLACES: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    item, i1, i2, i3 = _tile(tl.program_id(0), sizes, VOXELS)
    v, near = _coarse(i1, i2, i3, sizes, VOXELS)
    c, d = tl.arange(0, C_BLOCK), tl.program_id(1) * D_BLOCK + tl.arange(0, D_BLOCK)
    e = tl.arange(0, E_BLOCK)
    operand = _load(x, x_strides, item, e, v, near, E).to(PRODUCT)
    for place in range(0, PLACES, WIDTH):
        total = tl.dot(_load_place(weight, place, d, e, D, E, PRODUCT), operand, input_precision=PRECISION)
        if WIDTH == 2:
            block = _load_place(weight, place + 1, d, e, D, E, PRODUCT)
            total = tl.interleave(total, tl.dot(block, operand, input_precision=PRECISION))
        fine, inside = _fine(i1, i2, i3, place, sizes, KERNEL, WIDTH, VOXELS)
        if SKIP:
            total += load_vector(bias, d, D)[:, None]
            beside = _load(skip, skip_strides, item, c, fine, inside, C).to(PRODUCT)
            block = load_matrix(weight_skip, d, c, D, C, PRODUCT)
            total = tl.dot(block, beside, total, input_precision=PRECISION)
        _store(y, item, d, fine, sizes[0] * sizes[1] * sizes[2] * PLACES, inside, total, D)


@triton.jit
def block_sums_kernel(
    coarse, coarse_strides, fine_map, fine_strides, shares, batch, sizes,
    D: tl.constexpr, C: tl.constexpr, KERNEL: tl.constexpr, WIDTH: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, D_BLOCK: tl.constexpr, C_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Shares (programs, D, C, places) of Σ coarse fine_pᵀ of WIDTH places, D_BLOCK by C_BLOCK channels."""
    PLACES: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    column_blocks: tl.constexpr = (C + C_BLOCK - 1) // C_BLOCK
    rows: tl.constexpr = PLACES // WIDTH
    # On the first axis, since a grid has 65535 on the second.
    place = tl.program_id(0) % rows * WIDTH
    d = tl.program_id(0) // rows // column_blocks * D_BLOCK + tl.arange(0, D_BLOCK)
    c = tl.program_id(0) // rows % column_blocks * C_BLOCK + tl.arange(0, C_BLOCK)
    total = tl.zeros([D_BLOCK, C_BLOCK], tl.float32)
    other = tl.zeros([D_BLOCK, C_BLOCK], tl.float32)
    tiles = batch * sizes[0] * sizes[1] * tl.cdiv(sizes[2], VOXELS)
    for at in range(tl.program_id(1), tiles, tl.num_programs(1)):
        item, i1, i2, i3 = _tile(at, sizes, VOXELS)
        v, near = _coarse(i1, i2, i3, sizes, VOXELS)
        fine, inside = _fine(i1, i2, i3, place, sizes, KERNEL, WIDTH, VOXELS)
        first = _load(coarse, coarse_strides, item, d, v, near, D).to(PRODUCT)
        second = _load(fine_map, fine_strides, item, c, fine, inside, C).to(PRODUCT)
        if WIDTH == 2:
            second, odd = _halves(second, C_BLOCK, VOXELS)
            other = tl.dot(first, tl.trans(odd), other, input_precision=PRECISION)
        total = tl.dot(first, tl.trans(second), total, input_precision=PRECISION)
    at = ((tl.program_id(1) * D + d)[:, None] * C + c[None, :]) * PLACES + place
    inside = (d < D)[:, None] & (c < C)[None, :]
    tl.store(shares + at, total, mask=inside)
    if WIDTH == 2:
        tl.store(shares + at + 1, other, mask=inside)


def _places(kernel_size: Sequence[int]) -> dict[str, Any]:
    """The constants of a block: its voxels, and how many of its last axis' go together."""
    kernel = three_axes(kernel_size, 1)
    return {"KERNEL": kernel, "WIDTH": 2 if kernel[2] == 2 else 1}


def _tiles(batch: int, size: Sequence[int], dtype: torch.dtype) -> tuple[int, dict[str, Any]]:
    """The tiles of a coarse map of that spatial size, each in one row, and their constants."""
    rows, columns = prod(three_axes(size, 1)[:2]), size[-1]
    voxels = min(max(padded(columns), 16), EXACT_VOXELS if exact(dtype) else VOXELS)
    return batch * rows * cdiv(columns, voxels), {"VOXELS": voxels, "num_warps": WARPS}


def _by_place(weight: Tensor, transposed: bool) -> Tensor:
    """The matrices (places, D, C) of a weight (D, C, k1..kp), or transposed (C, D, k1..kp)."""
    return weight.flatten(2).permute((2, 1, 0) if transposed else (2, 0, 1)).contiguous()


def _gather(
    x: Tensor, weight: Tensor, transposed: bool, bias: Tensor | None, dtype: torch.dtype, y: Tensor
) -> None:
    """Write the coarse y, of x (B, C, V) and weight (D, C, k1..kp), or transposed (C, D, k1..kp)."""
    channels, rows = x.shape[1], y.shape[1]
    block = channel_block(rows, ROWS)
    tiles, tile = _tiles(y.shape[0], y.shape[2:], dtype)
    launch(
        gather_kernel, (tiles, cdiv(rows, block)), x,
        x, x.stride()[:2], _by_place(weight, transposed), weight if bias is None else bias, y,
        three_axes(y.shape[2:], 1),
        BIAS=bias is not None, C=channels, D=rows, **_places(weight.shape[2:]), **products(dtype),
        C_BLOCK=channel_block(channels), D_BLOCK=block, **tile,
    )  # fmt: skip


def _spread(
    x: Tensor, weight: Tensor, transposed: bool, size: Sequence[int], skip: tuple[Tensor, ...] | None,
    dtype: torch.dtype, y: Tensor,
) -> None:  # fmt: skip
    """Write the fine y, of x (B, E, V) of that spatial size and weight (D, E, k1..kp), or (E, D, k1..kp).

    Args:
        skip: (skip (B, C, ..), its weight, the bias), or None for none.
    """
    rows, block = y.shape[1], channel_block(y.shape[1], ROWS)
    fine, weight_skip, bias = skip or (x, weight, weight)
    tiles, tile = _tiles(x.shape[0], size, dtype)
    launch(
        spread_kernel, (tiles, cdiv(rows, block)), x,
        x, x.stride()[:2], _by_place(weight, transposed), fine, fine.stride()[:2], weight_skip, bias,
        y, three_axes(size, 1),
        SKIP=skip is not None, C=fine.shape[1], E=x.shape[1], D=rows, **_places(weight.shape[2:]),
        **products(dtype), C_BLOCK=channel_block(fine.shape[1]), E_BLOCK=channel_block(x.shape[1]),
        D_BLOCK=block, **tile,
    )  # fmt: skip


def _block_sums(
    coarse: Tensor, fine: Tensor, size: Sequence[int], weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Σ coarse fine_pᵀ in weight's shape (D, C, k1..kp), of coarse (B, D, V), of that size, and fine."""
    rows, channels, *kernel_size = weight.shape
    row_block, column_block = channel_block(rows, ROWS), channel_block(channels, ROWS)
    places = _places(kernel_size)
    rows_of_places = prod(kernel_size) // places["WIDTH"]
    blocks = cdiv(rows, row_block) * cdiv(channels, column_block) * rows_of_places
    tiles, tile = _tiles(coarse.shape[0], size, dtype)
    programs = programs_of(tiles, blocks)
    (shares,) = empty_shares(coarse, programs, weight.shape)
    launch(
        block_sums_kernel, (blocks, programs), coarse,
        coarse, coarse.stride()[:2], fine, fine.stride()[:2], shares, coarse.shape[0], three_axes(size, 1),
        D=rows, C=channels, **places, **products(dtype), D_BLOCK=row_block, C_BLOCK=column_block, **tile,
    )  # fmt: skip
    return shares.sum(0)


@kernel("join", "triton", limit(MAX_CHANNELS))
def join(
    skip: Tensor, x: Tensor, weight_skip: Tensor, weight_x: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    y = x.new_empty((x.shape[0], weight_skip.shape[0], *fine_size(x, weight_x)), dtype=dtype)
    of_skip = (columns(skip), weight_skip.contiguous(), bias.contiguous())
    _spread(columns(x), weight_x.contiguous(), True, x.shape[2:], of_skip, dtype, y)
    return y


@kernel("join_backward", "triton", limit(MAX_CHANNELS))
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
    weight_skip, weight_x = weight_skip.contiguous(), weight_x.contiguous()
    dskip, dx, *dweights = gradients_like([skip, x], [weight_skip, weight_x, bias], weight_grads)
    size, dy, skip, x = x.shape[2:], columns(dy), columns(skip), columns(x)
    data_gradient(dy, skip, None, weight_skip, 0.0, dtype, dskip)
    _gather(dy, weight_x, False, None, dtype, dx)
    if weight_grads:
        dweight_skip, dbias = linear_sums(dy, skip, None, dtype)
        dweights = [dweight_skip, _block_sums(x, dy, size, weight_x, dtype), dbias]
    return dskip, dx, *dweights


@kernel("patch_conv", "triton", limit(MAX_CHANNELS))
def patch_conv(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    y = x.new_empty((x.shape[0], weight.shape[0], *coarse_size(x, weight)), dtype=dtype)
    _gather(columns(x), weight.contiguous(), False, bias.contiguous(), dtype, y)
    return y


@kernel("patch_conv_backward", "triton", limit(MAX_CHANNELS))
def patch_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype, weight_grads: bool
) -> tuple[Tensor, ...]:
    weight = weight.contiguous()
    dx, dweight, dbias = gradients_like([x], [weight, bias], weight_grads)
    size, dy = dy.shape[2:], columns(dy)
    _spread(dy, weight, True, size, None, dtype, dx)
    if weight_grads:
        dweight = _block_sums(dy, columns(x), size, weight, dtype)
        dbias = dy.sum((0, 2), dtype=torch.float32)
    return dx, dweight, dbias
