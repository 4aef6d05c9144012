"""The kernels' addresses: where a window's elements lie, and that they pass 2^31."""

import pytest
import torch
import triton
import triton.language as tl

from factorizer_kernels.ops.windows.address import column_offsets, row_offsets, window_at, window_of_matrix


@triton.jit
def offsets_kernel(
    out, at, map_windows, sizes, heads, strides,
    M: tl.constexpr, N: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    window = window_of_matrix(at, map_windows, sizes, heads, M, PATCH, SHIFTS)
    m, n = tl.arange(0, M), tl.arange(0, N)
    rows, columns = row_offsets(m, window, strides), column_offsets(n, window, sizes, strides, PATCH)
    tl.store(out + m[:, None] * N + n[None, :], rows[:, None] + columns[None, :])


@triton.jit
def inverse_kernel(
    cells, columns, sizes, copy, VOXELS: tl.constexpr, PATCH: tl.constexpr, SHIFTS: tl.constexpr
):
    voxel = tl.arange(0, VOXELS)
    cell, column = window_at(copy, voxel, sizes, PATCH, SHIFTS)
    tl.store(cells + voxel, cell)
    tl.store(columns + voxel, column)


SIZES, PATCH, SHIFTS, HEADS, M = (4, 8, 4), (2, 4, 2), ((0, 0, 0), (1, 3, 2)), 2, 4
N = 16
CELLS = 8


def expected_offsets(at, batch, strides):
    """In Python's integers, which do not overflow."""
    copy, rest = divmod(at, batch * HEADS * CELLS)
    batch_head, cell = divmod(rest, CELLS)
    item, head = divmod(batch_head, HEADS)
    grid = (cell // 4, cell // 2 % 2, cell % 2)
    shift = SHIFTS[copy]
    rows = []
    for m in range(M):
        row = []
        for n in range(N):
            position = (n // 8, n // 2 % 4, n % 2)
            voxel = [
                (g * p + i - s) % size
                for g, p, i, s, size in zip(grid, PATCH, position, shift, SIZES, strict=True)
            ]
            index = (item, head * M + m, *voxel)
            row.append(sum(i * stride for i, stride in zip(index, strides, strict=True)))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    "strides",
    [
        (1024, 128, 32, 4, 1),
        # An item of more than 2^31 elements, channels far apart, voxels far apart.
        (2**36, 2**33, 2**31 + 7, 2**30 + 3, 2**29 + 1),
        (2**30, 1, 2**31 - 1, 2**31 - 1, 2**31 - 1),
    ],
)
def test_offsets_pass_32_bits(strides):
    batch = 2
    windows = batch * HEADS * CELLS
    for at in (0, 5, windows - 1, windows, 2 * windows - 1):
        out = torch.full((M, N), -1)
        offsets_kernel[(1,)](
            out, torch.tensor(at).item(), windows, SIZES, HEADS, strides, M=M, N=N, PATCH=PATCH, SHIFTS=SHIFTS
        )
        assert torch.equal(out, expected_offsets(at, batch, strides))


@pytest.mark.parametrize("copy", [0, 1])
def test_a_voxel_finds_its_window(copy):
    voxels = 4 * 8 * 4
    cells, columns = torch.empty(voxels, dtype=torch.int32), torch.empty(voxels, dtype=torch.int32)
    inverse_kernel[(1,)](cells, columns, SIZES, copy, VOXELS=voxels, PATCH=PATCH, SHIFTS=SHIFTS)
    batch, strides = 1, (0, 0, 32, 4, 1)
    for cell in range(CELLS):
        lies_at = expected_offsets(copy * HEADS * CELLS + cell, batch, strides)[0]
        assert (cells[lies_at] == cell).all()
        assert torch.equal(columns[lies_at].long(), torch.arange(N))
