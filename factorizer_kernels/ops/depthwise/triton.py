"""Triton kernels of depthwise convolution: two maps moved, what the filter sees again comes from cache.

A program has a block of rows and columns of one channel and goes through planes: each plane that it reads
adds to as many planes of the result as the filter is deep. So an element is loaded once for each tap of one
plane of the filter. The weights' gradient has a sum for each tap, over a chunk, then over the chunks.
"""
# Triton knows no unpacking inside a tuple, and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment,misc"

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.depthwise.spec import gradients_like, small_filters
from factorizer_kernels.shared.launches import cdiv, compute_type, launch, padded
from factorizer_kernels.shared.maps import empty_map, spatial_3d, three_axes
from factorizer_kernels.shared.registry import kernel

# Elements of a program's block, and the planes that it goes through.
BLOCK = 512
PLANES = 32
# Elements of a block of the weights' gradient, with a sum for every tap of a plane, and blocks of a chunk.
SUMS_BLOCK = 1024
CHUNK = 32


@triton.jit
def _load(x, strides, sizes, channel, plane, rows, columns, COMPUTE: tl.constexpr):
    """Rows and columns of a plane of channel (b, c), zero outside of the map."""
    batch, c = channel
    at = x + batch.to(tl.int64) * strides[0] + c.to(tl.int64) * strides[1] + plane.to(tl.int64) * strides[2]
    offsets = rows.to(tl.int64)[:, None] * strides[3] + columns.to(tl.int64)[None, :] * strides[4]
    inside = ((rows >= 0) & (rows < sizes[1]))[:, None] & ((columns >= 0) & (columns < sizes[2]))[None, :]
    return tl.load(at + offsets, mask=inside & (plane >= 0) & (plane < sizes[0]), other=0.0).to(COMPUTE)


@triton.jit
def filter_kernel(
    x, x_strides, weight, bias, y, sizes, channels,
    KERNEL: tl.constexpr, MIRRORED: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of rows and columns in PLANES planes of one channel of the contiguous y (B, C, S1, S2, S3)."""
    K1: tl.constexpr = KERNEL[0]
    K2: tl.constexpr = KERNEL[1]
    K3: tl.constexpr = KERNEL[2]
    TAPS: tl.constexpr = K1 * K2 * K3
    column_blocks, row_blocks = tl.cdiv(sizes[2], COLUMNS), tl.cdiv(sizes[1], ROWS)
    runs = tl.cdiv(sizes[0], PLANES)
    column_block = tl.program_id(0) % column_blocks
    row_block = tl.program_id(0) // column_blocks % row_blocks
    first = tl.program_id(0) // (column_blocks * row_blocks) % runs * PLANES
    map_channel = tl.program_id(0) // (column_blocks * row_blocks * runs)
    c = map_channel % channels
    rows, columns = row_block * ROWS + tl.arange(0, ROWS), column_block * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < sizes[1])[:, None] & (columns < sizes[2])[None, :]
    zero = tl.zeros([ROWS, COLUMNS], COMPUTE)
    if BIAS:
        zero += tl.load(bias + c)
    last = tl.minimum(first + PLANES, sizes[0])
    sums = ()  # of the planes read - K1 // 2, .., read + K1 // 2
    for _ in tl.static_range(K1):
        sums = sums + (zero,)
    for read in range(first - K1 // 2, last + K1 // 2):
        for j in tl.static_range(K2):
            for k in tl.static_range(K3):
                block = _load(
                    x, x_strides, sizes, (map_channel // channels, c), read + first * 0,
                    rows + (j - K2 // 2), columns + (k - K3 // 2), COMPUTE,
                )  # fmt: skip
                moved = ()
                for i in tl.static_range(K1):
                    tap = ((K1 - 1 - i) * K2 + j) * K3 + k
                    if MIRRORED:
                        tap = TAPS - 1 - tap
                    moved = moved + (sums[i] + block * tl.load(weight + c * TAPS + tap),)
                sums = moved
        done = read - K1 // 2
        at = (map_channel.to(tl.int64) * sizes[0] + done) * sizes[1]
        at = (at + rows)[:, None] * sizes[2] + columns[None, :]
        tl.store(y + at, sums[0], mask=inside & (done >= first))
        sums = sums[1:] + (zero,)


@triton.jit
def filter_sums_kernel(
    dy, dy_strides, x, x_strides, weight_shares, bias_shares, sizes, channels, blocks,
    KERNEL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, COMPUTE: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Shares of dweight (chunks, C, taps), of one plane of the filter, and of dbias (chunks, C).

    A chunk is CHUNK blocks of dy, which are numbered (batch, plane, row block, column block).
    """
    K1: tl.constexpr = KERNEL[0]
    K2: tl.constexpr = KERNEL[1]
    K3: tl.constexpr = KERNEL[2]
    chunk, c, plane_tap = tl.program_id(0) // channels, tl.program_id(0) % channels, tl.program_id(1)
    column_blocks, row_blocks = tl.cdiv(sizes[2], COLUMNS), tl.cdiv(sizes[1], ROWS)
    zero = tl.zeros([ROWS, COLUMNS], COMPUTE)
    sums, bias_sum = (), zero
    for _ in tl.static_range(K2 * K3):
        sums = sums + (zero,)
    for at in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, blocks)):
        rows = at // column_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
        columns = at % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
        plane = at // (column_blocks * row_blocks) % sizes[0] + c * 0
        channel = (at // (column_blocks * row_blocks * sizes[0]) + c * 0, c)
        gradient = _load(dy, dy_strides, sizes, channel, plane, rows, columns, COMPUTE)
        if BIAS:
            bias_sum += gradient
        if WEIGHT:
            moved = ()
            for j in tl.static_range(K2):
                for k in tl.static_range(K3):
                    block = _load(
                        x, x_strides, sizes, channel, plane + (plane_tap - K1 // 2),
                        rows + (j - K2 // 2), columns + (k - K3 // 2), COMPUTE,
                    )  # fmt: skip
                    moved = moved + (sums[j * K3 + k] + gradient * block,)
            sums = moved
    share_of = tl.program_id(0)
    if BIAS:
        tl.store(bias_shares + share_of, tl.sum(bias_sum), mask=plane_tap == 0)
    if WEIGHT:
        for t in tl.static_range(K2 * K3):
            share = weight_shares + (share_of * K1 + plane_tap) * (K2 * K3) + t
            tl.store(share, tl.sum(sums[t]))


def _block(sizes: Sequence[int], elements: int) -> dict[str, int]:
    """The rows and columns of a block, at most ``elements`` of them, and the warps for them."""
    columns = min(padded(sizes[2]), 64, elements)
    rows = min(padded(sizes[1]), elements // columns)
    columns = min(padded(sizes[2]), elements // rows)
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": max(1, min(4, rows * columns // 64))}


def _filter(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, mirrored: bool) -> None:
    """Write the contiguous y."""
    x, weight = spatial_3d(x), weight.contiguous()
    batch, channels, *sizes = x.shape
    block = _block(sizes, BLOCK)
    planes = min(padded(sizes[0]), PLANES)
    programs = prod(map(cdiv, sizes, (planes, block["ROWS"], block["COLUMNS"])))
    launch(
        filter_kernel, batch * channels * programs, x,
        x, x.stride(), weight, weight if bias is None else bias.contiguous(), y, tuple(sizes), channels,
        KERNEL=three_axes(weight.shape[1:], 1), MIRRORED=mirrored, BIAS=bias is not None,
        COMPUTE=compute_type(x), PLANES=planes, **block,
    )  # fmt: skip


@kernel("depthwise_conv", "triton", small_filters)
def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = empty_map(x)
    _filter(x, weight, bias, y, mirrored=False)
    return y


@kernel("depthwise_conv_backward", "triton", small_filters)
def depthwise_conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = gradients_like(dy, weight, output_mask)
    dy = dy.contiguous()  # of y.sum() it has strides of 0, and would be read element by element
    if output_mask[0]:
        _filter(dy, weight, None, dx, mirrored=True)
    if output_mask[1] or output_mask[2]:
        dy, x = spatial_3d(dy), spatial_3d(x)
        batch, channels, *sizes = x.shape
        kernel_size = three_axes(weight.shape[1:], 1)
        block = _block(sizes, SUMS_BLOCK)
        blocks = batch * prod(map(cdiv, sizes, (1, block["ROWS"], block["COLUMNS"])))
        chunks = max(cdiv(blocks, CHUNK), 1)
        weight_shares = weight.new_empty((chunks, *dweight.shape))
        bias_shares = weight.new_empty((chunks, *dbias.shape))
        launch(
            filter_sums_kernel, (chunks * channels, kernel_size[0] if output_mask[1] else 1), x,
            dy, dy.stride(), x, x.stride(), weight_shares, bias_shares, tuple(sizes), channels, blocks,
            KERNEL=kernel_size, WEIGHT=output_mask[1], BIAS=output_mask[2], COMPUTE=compute_type(x),
            CHUNK=CHUNK, **block,
        )  # fmt: skip
        dweight, dbias = weight_shares.sum(0), bias_shares.sum(0)
    return dx, dweight, dbias
