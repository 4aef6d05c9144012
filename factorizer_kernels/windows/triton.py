"""Triton kernels of ``sw_matricize`` and ``sw_dematricize``: one pass, each output element written once."""

import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels import _ops
from factorizer_kernels._triton.address import column_offsets, row_offsets, window_at, window_of
from factorizer_kernels._triton.launch import axes_3d, launch, padded, spatial_3d
from factorizer_kernels.windows.geometry import matricized_shape

# Elements of one program's block.
BLOCK_ELEMENTS = 4096
BLOCK_ROWS = 64


@triton.jit(do_not_specialize=["map_windows", "scale"])
def matricize_kernel(
    x, x_strides, sizes, heads, map_windows, z, scale,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one window of one copy, from the map x to the contiguous z; scale: x's weight."""
    copies: tl.constexpr = len(SHIFTS) // 3
    copy = tl.program_id(0) % copies
    map_window = tl.program_id(0) // copies
    window = window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)
    column_blocks: tl.constexpr = (N + N_BLOCK - 1) // N_BLOCK
    m = tl.program_id(1) // column_blocks * M_BLOCK + tl.arange(0, M_BLOCK)
    n = tl.program_id(1) % column_blocks * N_BLOCK + tl.arange(0, N_BLOCK)
    mask = (m < M)[:, None] & (n < N)[None, :]
    rows, columns = row_offsets(m, window, x_strides), column_offsets(n, window, sizes, x_strides, PATCH)
    block = tl.load(x + rows[:, None] + columns[None, :], mask=mask)
    if scale is not None:
        block = block * scale
    at = copy.to(tl.int64) * map_windows + map_window
    tl.store(z + (at * M + m)[:, None] * N + n[None, :], block, mask=mask)


@triton.jit(do_not_specialize=["map_windows", "scale"])
def dematricize_kernel(
    z, z_strides, sizes, heads, map_windows, x, scale,
    M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr,
    M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of channels and voxels of the contiguous map x: the sum over the copies in z, times scale.

    z has strides (window, m, n).
    """
    voxels = sizes[0].to(tl.int64) * sizes[1] * sizes[2]
    voxel_blocks = tl.cdiv(voxels, N_BLOCK)
    channel_block = tl.program_id(0) // voxel_blocks
    voxel = tl.program_id(0) % voxel_blocks * N_BLOCK + tl.arange(0, N_BLOCK)
    m = tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)
    mask = (m < M)[:, None] & (voxel < voxels)[None, :]
    total = tl.zeros([M_BLOCK, N_BLOCK], tl.float64 if z.dtype.element_ty == tl.float64 else tl.float32)
    for copy in tl.static_range(len(SHIFTS) // 3):
        window, n = window_at(copy, channel_block, voxel, sizes, PATCH, SHIFTS)
        columns = (window + map_windows * copy) * z_strides[0] + n * z_strides[2]
        rows = m.to(tl.int64) * z_strides[1]
        total += tl.load(z + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(total.dtype)
    tl.store(x + (channel_block * M + m)[:, None] * voxels + voxel[None, :], total * scale, mask=mask)
