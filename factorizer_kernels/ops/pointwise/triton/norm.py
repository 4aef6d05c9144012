"""Triton kernels of the norm over the channels alone, for any width: two maps moved, backward three.

What is wider than a product's tile is normed here, and multiplied by the library that comes with torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.pointwise.triton.tiles import (
    PROGRAMS,
    channel_block,
    empty_shares,
    load_tile,
    load_vector,
    standardised,
    standardised_backward,
    store_tile,
    tile_of,
    tiles_of,
)
from factorizer_kernels.shared.launches import launch

# The most channels, and the elements of a tile, of which the voxels are the rest.
MAX_CHANNELS = 1024
ELEMENTS = 4096
LEAST_VOXELS = 16
WARPS = 4


@triton.jit
def norm_kernel(
    x, x_strides, norm_weight, norm_bias, y, voxels, eps,
    C: tl.constexpr, C_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous y (B, C, V)."""
    item, v = tile_of(tl.program_id(0), voxels, VOXELS)
    c = tl.arange(0, C_BLOCK)
    tile = load_tile(x, x_strides, item, c, v, voxels, C).to(tl.float32)
    tile, _scale = standardised(tile, c, v < voxels, eps, C)
    tile = tile * load_vector(norm_weight, c, C)[:, None] + load_vector(norm_bias, c, C)[:, None]
    store_tile(y, item, c, v, voxels, tile, C)


@triton.jit
def norm_backward_kernel(
    dy, dy_strides, x, x_strides, addend, addend_strides, norm_weight, dx, shares, bias_shares, batch, voxels,
    eps,
    ADDEND: tl.constexpr, SUMS: tl.constexpr, C: tl.constexpr, C_BLOCK: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """The contiguous dx (B, C, V), with ADDEND the sum with that map.

    With SUMS beside it shares (programs, C) of Σ dy x̂ and Σ dy, voxel by voxel.
    """
    c = tl.arange(0, C_BLOCK)
    norm_scale = load_vector(norm_weight, c, C)[:, None]
    total, bias_total = tl.zeros([C_BLOCK], tl.float32), tl.zeros([C_BLOCK], tl.float32)
    for at in range(tl.program_id(0), batch * tl.cdiv(voxels, VOXELS), tl.num_programs(0)):
        item, v = tile_of(at, voxels, VOXELS)
        tile = load_tile(x, x_strides, item, c, v, voxels, C).to(tl.float32)
        gradient = load_tile(dy, dy_strides, item, c, v, voxels, C).to(tl.float32)
        tile, scale = standardised(tile, c, v < voxels, eps, C)
        if SUMS:
            total += tl.sum(gradient * tile, axis=1)
            bias_total += tl.sum(gradient, axis=1)
        gradient = standardised_backward(gradient * norm_scale, tile, scale, C)
        if ADDEND:
            gradient += load_tile(addend, addend_strides, item, c, v, voxels, C).to(tl.float32)
        store_tile(dx, item, c, v, voxels, gradient, C)
    if SUMS:
        at = tl.program_id(0) * C + c
        tl.store(shares + at, total, mask=c < C)
        tl.store(bias_shares + at, bias_total, mask=c < C)


def _tile(channels: int) -> dict[str, int]:
    block = channel_block(channels, MAX_CHANNELS)
    voxels = max(ELEMENTS // block, LEAST_VOXELS)
    return {"C_BLOCK": block, "VOXELS": voxels, "num_warps": WARPS}


def normed(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """n(x) of x (B, C, V) in that dtype, with the norm's scale and shift; x itself where there is no norm."""
    if norm_weight is None or norm_bias is None:
        return x
    y, tile = x.new_empty(x.shape, dtype=dtype), _tile(x.shape[1])
    launch(
        norm_kernel, tiles_of(x, tile["VOXELS"]), x,
        x, x.stride()[:2], norm_weight.contiguous(), norm_bias.contiguous(), y, x.shape[2], eps,
        C=x.shape[1], **tile,
    )  # fmt: skip
    return y


def normed_backward(
    dy: Tensor, x: Tensor, norm_weight: Tensor, eps: float, addend: Tensor | None, sums: bool, dx: Tensor
) -> tuple[Tensor, ...]:
    """Write the contiguous dx (+ addend); with ``sums`` the gradients of the norm's scale and shift.

    dy, x and addend (B, C, V), whose voxels lie side by side.
    """
    tile = _tile(x.shape[1])
    tiles = tiles_of(x, tile["VOXELS"])
    programs = min(PROGRAMS, tiles) if sums else tiles
    shares, bias_shares = empty_shares(x, programs if sums else 0, (x.shape[1],), (x.shape[1],))
    added = dy if addend is None else addend
    launch(
        norm_backward_kernel, programs, x,
        dy, dy.stride()[:2], x, x.stride()[:2], added, added.stride()[:2], norm_weight.contiguous(), dx,
        shares, bias_shares, x.shape[0], x.shape[2], eps,
        ADDEND=addend is not None, SUMS=sums, C=x.shape[1], **tile,
    )  # fmt: skip
    return (shares.sum(0), bias_shares.sum(0)) if sums else ()
