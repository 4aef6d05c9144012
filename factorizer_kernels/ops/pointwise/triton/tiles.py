"""What the pointwise kernels are made of: tiles of channels x voxels, and the plans of their launches.

A tile holds all channels of a run of voxels of one item, channels first, as the maps do: its rows are
contiguous. Channels are padded to a power of two, 16 at least, which ``tl.dot`` asks for; what is beyond the
map is zero. Products take operands of ``PRODUCT``, the dtype of the operator, and add in float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.pointwise.spec import Sizes
from factorizer_kernels.shared.launches import cdiv, padded, product_precision, too_many
from factorizer_kernels.shared.triton import INTERPRETED

# Voxels, warps and channels at a time are those that were fastest on an H100 (docs/performance.md).

# Programs of a kernel that sums over voxels, eight for each of its multiprocessors, and the tiles that each
# of them takes at least.
PROGRAMS = 1056
TILES_OF_A_PROGRAM = 8
# The most channels of a product's tile: of more, the registers do not hold it.
MAX_CHANNELS = 64

_HALF = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def limit(most: int) -> Callable[[Tensor, Sizes], str | None]:
    """The limit of kernels that take maps of so many channels."""

    def reason(x: Tensor, sizes: Sizes) -> str | None:
        if x.dtype == torch.float64:
            return "its products take no float64"
        if sizes.widest > most:
            return f"it takes at most {most} channels, got {sizes.widest}"
        return too_many(sizes.blocked)

    return reason


def columns(x: Tensor) -> Tensor:
    """x (B, C, S1..Sp) as (B, C, V) whose voxels lie side by side; a copy where they do not."""
    x = x.flatten(2)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def channel_block(channels: int, most: int = MAX_CHANNELS) -> int:
    """The rows of a tile of that many channels, or of one of several blocks of them."""
    return min(max(padded(channels), 16), most)


def exact(dtype: torch.dtype) -> bool:
    """Whether products in ``dtype`` are three of TF32, as exact as one of float32: torch's "highest"."""
    return dtype not in _HALF and product_precision() == "tf32x3"


def products(dtype: torch.dtype) -> dict[str, Any]:
    """The constants of products in ``dtype``, after torch's float32 matmul precision.

    Loops are not
    pipelined: the buffers would take the shared memory, and the registers, of two resident blocks.
    """
    # The interpreter multiplies the bits of bfloat16 as integers: there the operands stay in float32.
    half = _HALF.get(dtype, tl.float32)
    product = tl.float32 if INTERPRETED and half is tl.bfloat16 else half
    precision = "tf32x3" if exact(dtype) else "tf32"
    return {"PRODUCT": product, "PRECISION": precision, "num_stages": 1}


def tiles_of(x: Tensor, voxels: int) -> int:
    """The tiles of so many voxels of x (B, C, V)."""
    return x.shape[0] * cdiv(x.shape[2], voxels)


def programs_of(tiles: int, blocks: int) -> int:
    """How many programs share a sum over ``tiles`` tiles, each for ``blocks`` blocks of the result.

    It depends on sizes alone, so a result's bits do not depend on the card.
    """
    return max(min(PROGRAMS // blocks, tiles // TILES_OF_A_PROGRAM), 1)


def empty_shares(like: Tensor, shares: int, *shapes: Sequence[int]) -> list[Tensor]:
    """Uninitialised shares of sums of those shapes, in float32."""
    return [like.new_empty((shares, *shape), dtype=torch.float32) for shape in shapes]


@triton.jit
def tile_of(at, voxels, VOXELS: tl.constexpr):
    """(item, voxels) of tile ``at``."""
    blocks = tl.cdiv(voxels, VOXELS)
    return at // blocks, at % blocks * VOXELS + tl.arange(0, VOXELS)


@triton.jit
def load_tile(x, strides, item, c, v, voxels, C: tl.constexpr):
    """Channels c and voxels v of an item of x (B, C, V), whose voxels lie side by side."""
    at = item.to(tl.int64) * strides[0] + c.to(tl.int64)[:, None] * strides[1] + v[None, :]
    return tl.load(x + at, mask=(c < C)[:, None] & (v < voxels)[None, :], other=0.0)


@triton.jit
def store_tile(y, item, c, v, voxels, tile, C: tl.constexpr):
    """The same of the contiguous y (B, C, V)."""
    at = (item.to(tl.int64) * C + c)[:, None] * voxels + v[None, :]
    tl.store(y + at, tile, mask=(c < C)[:, None] & (v < voxels)[None, :])


@triton.jit
def load_vector(vector, i, LENGTH: tl.constexpr):
    return tl.load(vector + i, mask=i < LENGTH, other=0.0)


@triton.jit
def load_matrix(matrix, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRODUCT: tl.constexpr):
    """A block of the contiguous (ROWS, COLUMNS) matrix, as a product takes it."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(matrix + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0).to(PRODUCT)


@triton.jit
def standardised(x, c, inside, eps, C: tl.constexpr):
    """A tile in float32 with zero mean and unit variance over its channels, and the factor for the latter.

    Zero for voxels that are not ``inside``.
    """
    mean = tl.sum(x, axis=0) * (1.0 / C)
    centred = tl.where((c < C)[:, None], x - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, axis=0) * (1.0 / C)
    scale = tl.where(inside, tl.rsqrt(variance + eps), 0.0)
    return centred * scale[None, :], scale


@triton.jit
def standardised_backward(dy, y, scale, C: tl.constexpr):
    """The gradient of x from that of y, where y, scale = standardised(x)."""
    mean, product = tl.sum(dy, axis=0) * (1.0 / C), tl.sum(dy * y, axis=0) * (1.0 / C)
    return (dy - mean[None, :] - y * product[None, :]) * scale[None, :]


@triton.jit
def gelu(x):
    """The exact GELU, and its slope."""
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
