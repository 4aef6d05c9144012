"""Triton kernels of ``sw_matricize`` and ``sw_dematricize``: one pass, each output element written once."""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.windows.address import column_offsets, row_offsets, window_at, window_of
from factorizer_kernels.ops.windows.geometry import matricized_shape, rolls
from factorizer_kernels.shared import registry
from factorizer_kernels.shared.triton import axes_3d, compute_type, launch, padded, spatial_3d

# Elements and rows of one program's block, at most.
BLOCK_ELEMENTS = 4096
BLOCK_ROWS = 64


@triton.jit(do_not_specialize=["map_windows"])
def matricize_kernel(
    x, x_strides, sizes, heads, map_windows, z,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr,
    MEAN: tl.constexpr, COMPUTE: tl.constexpr, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one window of one copy, from the map x (strides b, c, 1, 2, 3) to the contiguous z."""
    copies: tl.constexpr = len(SHIFTS) // 3
    row_blocks: tl.constexpr = (M + M_BLOCK - 1) // M_BLOCK
    column_blocks: tl.constexpr = (N + N_BLOCK - 1) // N_BLOCK
    block, item = (
        tl.program_id(0) % (row_blocks * column_blocks),
        tl.program_id(0) // (row_blocks * column_blocks),
    )
    copy, map_window = item % copies, item // copies
    m = block // column_blocks * M_BLOCK + tl.arange(0, M_BLOCK)
    n = block % column_blocks * N_BLOCK + tl.arange(0, N_BLOCK)
    mask = (m < M)[:, None] & (n < N)[None, :]
    window = window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)
    rows, columns = (
        row_offsets(m, window, x_strides),
        column_offsets(n, window, sizes, x_strides, PATCH),
    )
    values = tl.load(x + rows[:, None] + columns[None, :], mask=mask)
    if MEAN:
        values = values.to(COMPUTE) * (1.0 / copies)
    at = copy.to(tl.int64) * map_windows + map_window
    tl.store(z + (at * M + m)[:, None] * N + n[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["map_windows"])
def dematricize_kernel(
    z, z_strides, sizes, map_windows, x,
    M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr,
    MEAN: tl.constexpr, COMPUTE: tl.constexpr, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of channels and voxels of the contiguous map x: the sum, or mean, over the copies in z.

    z has strides (copy and batch and head, cell, m, n).
    """
    copies: tl.constexpr = len(SHIFTS) // 3
    row_blocks: tl.constexpr = (M + M_BLOCK - 1) // M_BLOCK
    voxels = sizes[0] * sizes[1] * sizes[2]
    voxel_blocks = tl.cdiv(voxels, N_BLOCK)
    item = tl.program_id(0) // row_blocks
    channel_block = item // voxel_blocks
    voxel = item % voxel_blocks * N_BLOCK + tl.arange(0, N_BLOCK)
    m = tl.program_id(0) % row_blocks * M_BLOCK + tl.arange(0, M_BLOCK)
    mask = (m < M)[:, None] & (voxel < voxels)[None, :]
    cells = voxels // (PATCH[0] * PATCH[1] * PATCH[2])
    channel_blocks = map_windows // cells
    total = tl.zeros([M_BLOCK, N_BLOCK], COMPUTE)
    for copy in tl.static_range(copies):
        cell, n = window_at(copy, voxel, sizes, PATCH, SHIFTS)
        columns = (channel_block + channel_blocks * copy).to(tl.int64) * z_strides[0]
        columns += cell.to(tl.int64) * z_strides[1] + n.to(tl.int64) * z_strides[3]
        rows = m.to(tl.int64) * z_strides[2]
        total += tl.load(z + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(COMPUTE)
    if MEAN:
        total = total * (1.0 / copies)
    rows = (channel_block * M + m).to(tl.int64) * voxels
    tl.store(x + rows[:, None] + voxel[None, :], total, mask=mask)


def blocks(rows: int) -> tuple[int, int]:
    """(M_BLOCK, N_BLOCK) for ``rows`` rows."""
    m_block = min(padded(rows), BLOCK_ROWS)
    return m_block, BLOCK_ELEMENTS // m_block


@registry.kernel("sw_matricize", "triton")
def sw_matricize(x: Tensor, head_dim: int, patch_size: list[int], shifts: list[int], mean: bool) -> Tensor:
    shape = matricized_shape(x.shape, head_dim, patch_size, len(shifts))
    z = x.new_empty(shape)
    axes = len(patch_size)
    heads = x.shape[1] // head_dim
    columns = shape[-1]
    m_block, n_block = blocks(head_dim)
    n_block = min(n_block, padded(columns))
    windows = x.numel() // (head_dim * columns)
    copies = len(shifts) // axes
    steps = axes_3d(rolls(shifts, x.shape[2:]), axes, 0)
    x = spatial_3d(x)
    launch(
        matricize_kernel,
        windows * copies * triton.cdiv(head_dim, m_block) * triton.cdiv(columns, n_block), x,
        x, x.stride(), tuple(x.shape[2:]), heads, windows, z,
        M=head_dim, N=columns, PATCH=axes_3d(patch_size, axes, 1), SHIFTS=steps,
        MEAN=mean, COMPUTE=compute_type(x), M_BLOCK=m_block, N_BLOCK=n_block,
    )  # fmt: skip
    return z


@registry.kernel("sw_dematricize", "triton")
def sw_dematricize(
    z: Tensor, size: list[int], head_dim: int, patch_size: list[int], shifts: list[int], mean: bool
) -> Tensor:
    x = z.new_empty(size)
    axes = len(patch_size)
    m_block, n_block = blocks(head_dim)
    sizes = axes_3d(size[2:], axes, 1)
    steps = axes_3d(rolls(shifts, size[2:]), axes, 0)
    channel_blocks = size[0] * size[1] // head_dim
    launch(
        dematricize_kernel,
        channel_blocks * triton.cdiv(prod(sizes), n_block) * triton.cdiv(head_dim, m_block), x,
        z, z.stride(), sizes, x.numel() // (head_dim * prod(patch_size)), x,
        M=head_dim, PATCH=axes_3d(patch_size, axes, 1), SHIFTS=steps,
        MEAN=mean, COMPUTE=compute_type(x), M_BLOCK=m_block, N_BLOCK=n_block,
    )  # fmt: skip
    return x
