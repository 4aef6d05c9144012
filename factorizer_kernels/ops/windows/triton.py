"""Triton kernels of ``sw_matricize`` and ``sw_dematricize``: one pass, each output element written once."""

from math import prod

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.ops.windows.address import column_offsets, row_offsets, window_at, window_of
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared.launches import cdiv, compute_type, launch, padded, too_many
from factorizer_kernels.shared.maps import spatial_3d
from factorizer_kernels.shared.registry import kernel

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
    row_blocks: tl.constexpr = (M + M_BLOCK - 1) // M_BLOCK
    column_blocks: tl.constexpr = (N + N_BLOCK - 1) // N_BLOCK
    block, item = (
        tl.program_id(0) % (row_blocks * column_blocks),
        tl.program_id(0) // (row_blocks * column_blocks),
    )
    copy, map_window = item % len(SHIFTS), item // len(SHIFTS)
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
        values = values.to(COMPUTE) * (1.0 / len(SHIFTS))
    at = copy.to(tl.int64) * map_windows + map_window
    tl.store(z + (at * M + m)[:, None] * N + n[None, :], values, mask=mask)


@triton.jit(do_not_specialize=["map_windows"])
def dematricize_kernel(
    z, z_strides, sizes, map_windows, x,
    M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr,
    MEAN: tl.constexpr, COMPUTE: tl.constexpr, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of channels and voxels of the contiguous map x: the sum, or mean, over the shifts in z.

    z has strides (copy and batch and head, cell, m, n).
    """
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
    for copy in tl.static_range(len(SHIFTS)):
        cell, n = window_at(copy, voxel, sizes, PATCH, SHIFTS)
        columns = (channel_block + channel_blocks * copy).to(tl.int64) * z_strides[0]
        columns += cell.to(tl.int64) * z_strides[1] + n.to(tl.int64) * z_strides[3]
        rows = m.to(tl.int64) * z_strides[2]
        total += tl.load(z + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(COMPUTE)
    if MEAN:
        total = total * (1.0 / len(SHIFTS))
    rows = (channel_block * M + m).to(tl.int64) * voxels
    tl.store(x + rows[:, None] + voxel[None, :], total, mask=mask)


def blocks(rows: int) -> tuple[int, int]:
    """(M_BLOCK, N_BLOCK) for ``rows`` rows."""
    m_block = min(padded(rows), BLOCK_ROWS)
    return m_block, BLOCK_ELEMENTS // m_block


@kernel("sw_matricize", "triton", lambda x, _: too_many(prod(x.shape[2:])))
def sw_matricize(x: Tensor, head_dim, patch_size, shifts, mean: bool) -> Tensor:
    windows = Windows(x.shape, head_dim, patch_size, shifts)
    z = x.new_empty(windows.matrices_shape)
    rows, columns = windows.rows, windows.columns
    m_block, n_block = blocks(rows)
    n_block = min(n_block, padded(columns))
    map_windows = x.numel() // (rows * columns)
    x = spatial_3d(x)
    launch(
        matricize_kernel,
        map_windows * windows.num_shifts * cdiv(rows, m_block) * cdiv(columns, n_block), x,
        x, x.stride(), windows.size_3d, windows.heads, map_windows, z,
        M=rows, N=columns, PATCH=windows.patch_3d, SHIFTS=windows.shifts_3d,
        MEAN=mean, COMPUTE=compute_type(x), M_BLOCK=m_block, N_BLOCK=n_block,
    )  # fmt: skip
    return z


@kernel("sw_dematricize", "triton", lambda z, _: too_many(z.shape[1] * z.shape[3]))
def sw_dematricize(z: Tensor, size, head_dim, patch_size, shifts, mean: bool) -> Tensor:
    windows = Windows(size, head_dim, patch_size, shifts)
    x = z.new_empty(size)
    rows, columns = windows.rows, windows.columns
    m_block, n_block = blocks(rows)
    map_windows, voxels = x.numel() // (rows * columns), prod(windows.size_3d)
    launch(
        dematricize_kernel,
        windows.size[0] * windows.heads * cdiv(voxels, n_block) * cdiv(rows, m_block), x,
        z, z.stride(), windows.size_3d, map_windows, x,
        M=rows, PATCH=windows.patch_3d, SHIFTS=windows.shifts_3d,
        MEAN=mean, COMPUTE=compute_type(x), M_BLOCK=m_block, N_BLOCK=n_block,
    )  # fmt: skip
    return x
