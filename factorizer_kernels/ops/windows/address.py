"""Triton: where a window's matrix lies in a feature map. Device functions.

A feature map is (B, C, S1, S2, S3); fewer spatial axes are leading axes of size 1, and a plain batch of
M x N matrices is the map (B, M, 1, 1, N) cut into one window each. Each shift cuts a copy of the map, rolled
by it. A window's element (m, n) lies at ``origin + m * channel_stride + column[n]``. Everything that a stride
multiplies is 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def shift_of(copy, AXIS: tl.constexpr, SHIFTS: tl.constexpr):
    """The roll of one axis in one copy; SHIFTS holds the shifts, of 3 axes each."""
    shift = SHIFTS[0][AXIS]
    for k in tl.static_range(1, len(SHIFTS)):
        shift = tl.where(copy == k, SHIFTS[k][AXIS], shift)
    return shift


@triton.jit
def window_of(copy, map_window, sizes, heads, M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr):
    """(batch, first channel, start1, start2, start3) of a window of one copy.

    ``map_window`` counts the windows of one copy, (batch, head, grid1, grid2, grid3) row-major.
    """
    grid_2, grid_3 = sizes[1] // PATCH[1], sizes[2] // PATCH[2]
    grid = (sizes[0] // PATCH[0]) * grid_2 * grid_3
    cell = map_window % grid
    batch_head = map_window // grid
    start_1 = _start(cell // (grid_2 * grid_3), shift_of(copy, 0, SHIFTS), sizes[0], PATCH[0])
    start_2 = _start(cell // grid_3 % grid_2, shift_of(copy, 1, SHIFTS), sizes[1], PATCH[1])
    start_3 = _start(cell % grid_3, shift_of(copy, 2, SHIFTS), sizes[2], PATCH[2])
    return batch_head // heads, batch_head % heads * M, start_1, start_2, start_3


@triton.jit
def _start(cell, shift, size, PATCH: tl.constexpr):
    # The map rolled by +shift holds voxel (i - shift) mod size at i; 0 <= shift < size.
    start = cell * PATCH - shift
    return tl.where(start < 0, start + size, start)


@triton.jit
def column_offsets(n, window, sizes, strides, PATCH: tl.constexpr):
    """Offset of each column n of a window from its channel's first element; strides of (B, C, S1, S2, S3)."""
    voxel_1 = _wrap(window[2] + n // (PATCH[1] * PATCH[2]), sizes[0])
    voxel_2 = _wrap(window[3] + n // PATCH[2] % PATCH[1], sizes[1])
    voxel_3 = _wrap(window[4] + n % PATCH[2], sizes[2])
    return (
        voxel_1.to(tl.int64) * strides[2]
        + voxel_2.to(tl.int64) * strides[3]
        + voxel_3.to(tl.int64) * strides[4]
    )


@triton.jit
def _wrap(voxel, size):
    return tl.where(voxel >= size, voxel - size, voxel)


@triton.jit
def row_offsets(m, window, strides):
    """Offset of the channel of each row m of a window from the map's first element."""
    return (window[0] + m * 0).to(tl.int64) * strides[0] + (window[1] + m).to(tl.int64) * strides[1]


@triton.jit
def window_of_matrix(
    at, map_windows, sizes, heads, M: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr
):
    """The window of matrix ``at``, counted over all the copies, copies outermost."""
    copy, map_window = (at // map_windows).to(tl.int32), (at % map_windows).to(tl.int32)
    return window_of(copy, map_window, sizes, heads, M, PATCH, SHIFTS)


@triton.jit
def _block(pointer, strides, window, sizes, m, n, PATCH: tl.constexpr):
    rows, columns = row_offsets(m, window, strides), column_offsets(n, window, sizes, strides, PATCH)
    return pointer + rows[:, None] + columns[None, :]


@triton.jit
def load_map(
    pointer, strides, window, sizes, m, n, like,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """Rows m and columns n of a window, zero outside it, in the dtype that the pointer ``like`` points to."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    block = tl.load(_block(pointer, strides, window, sizes, m, n, PATCH), mask=mask, other=0.0)
    return block.to(like.dtype.element_ty)


@triton.jit
def store_map(
    pointer, strides, window, sizes, m, n, block,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr,
):  # fmt: skip
    """Write rows m and columns n of a window."""
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(_block(pointer, strides, window, sizes, m, n, PATCH), block, mask=mask)


@triton.jit
def first_row_offsets(n, window, sizes, strides, PATCH: tl.constexpr):
    """Offset of each column n of a window's first row; the other rows follow at ``channel_stride``."""
    return row_offsets(0, window, strides) + column_offsets(n, window, sizes, strides, PATCH)


@triton.jit
def channel_stride(strides):
    return tl.cast(strides[1], tl.int64)


@triton.jit
def window_at(copy, voxel, sizes, PATCH: tl.constexpr, SHIFTS: tl.constexpr):
    """(grid cell, column) of the window that holds each voxel in one copy.

    ``voxel`` is a flat index into S1 x S2 x S3: the inverse of ``window_of`` and ``column_offsets``.
    """
    at_1 = _wrap(voxel // (sizes[1] * sizes[2]) + shift_of(copy, 0, SHIFTS), sizes[0])
    at_2 = _wrap(voxel // sizes[2] % sizes[1] + shift_of(copy, 1, SHIFTS), sizes[1])
    at_3 = _wrap(voxel % sizes[2] + shift_of(copy, 2, SHIFTS), sizes[2])
    grid_2, grid_3 = sizes[1] // PATCH[1], sizes[2] // PATCH[2]
    cell = (at_1 // PATCH[0] * grid_2 + at_2 // PATCH[1]) * grid_3 + at_3 // PATCH[2]
    column = (at_1 % PATCH[0] * PATCH[1] + at_2 % PATCH[1]) * PATCH[2] + at_3 % PATCH[2]
    return cell, column
