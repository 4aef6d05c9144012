"""The kernels' index arithmetic against Python's integers, which do not overflow."""

import ctypes
from math import prod

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Numbers = ctypes.c_int64 * 64

# batch, heads, head_dim, size, patch, shifts: small, and with more than 2^31 elements.
SMALL = (2, 2, 4, (4, 8, 4), (2, 4, 2), ((0, 0, 0), (1, 3, 2)))
LARGE = (3, 130, 8, (128, 128, 256), (8, 8, 8), ((0, 0, 0), (4, 4, 4), (127, 1, 255)))
LONG = (1, 2, 3, (1, 1, 2**30 - 8), (1, 1, 8), ((0, 0, 0), (0, 0, 2**30 - 9)))


@pytest.fixture
def library(device):
    device.library.emulation_offset.restype = ctypes.c_int64
    device.library.emulation_matrix_at.restype = ctypes.c_int64
    device.library.emulation_quotient.restype = ctypes.c_uint32
    return device.library


def numbers(cut):
    batch, heads, rows, size, patch, shifts = cut
    return Numbers(batch, heads, rows, *size, *patch, len(shifts), *(s for shift in shifts for s in shift))


def expected(cut, copy, index, n, shift):
    """(matrix, batch, first channel, voxel) of column n of window ``index`` of a copy."""
    batch, heads, rows, size, patch, _ = cut
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    matrix = copy * batch * heads * prod(grid) + index
    cells, places = [], []
    for g, p in zip(grid[::-1], patch[::-1], strict=True):
        index, cell = divmod(index, g)
        n, place = divmod(n, p)
        cells.insert(0, cell)
        places.insert(0, place)
    voxel = [(c * p + q - s) % e for c, p, q, s, e in zip(cells, patch, places, shift, size, strict=True)]
    return matrix, index // heads, index % heads * rows, voxel


@pytest.mark.parametrize("cut", [SMALL, LARGE, LONG], ids=["small", "large", "long"])
def test_offsets_pass_32_bits(cut, library):
    batch, heads, rows, size, patch, shifts = cut
    windows, columns = batch * heads * prod(size) // prod(patch), prod(patch)
    contiguous = (heads * rows * prod(size), prod(size), size[1] * size[2], size[2], 1)
    far_apart = (2**40, 2**36 + 1, 2**32 + 7, 2**31 - 1, 2**30 + 3)
    passed = False
    for strides in (contiguous, far_apart, contiguous[::-1]):
        for copy, shift in enumerate(shifts):
            for index in {0, 1, windows // 2 + 1, windows - 1}:
                for m, n in ((0, 0), (rows - 1, columns - 1), (1, columns // 2)):
                    matrix, item, channel, voxel = expected(cut, copy, index, n, shift)
                    wanted = sum(i * s for i, s in zip((item, channel + m, *voxel), strides, strict=True))
                    offset = ctypes.c_int64()
                    found = library.emulation_offset(
                        numbers(cut), ctypes.c_int64(copy), ctypes.c_int64(index), ctypes.c_int64(m),
                        ctypes.c_int64(n), (ctypes.c_int64 * 5)(*strides), ctypes.byref(offset),
                    )  # fmt: skip
                    assert (found, offset.value) == (matrix, wanted)
                    passed |= wanted > 2**31
    assert passed


@pytest.mark.parametrize("cut", [SMALL, LARGE, LONG], ids=["small", "large", "long"])
@pytest.mark.parametrize("line", [1, 64, 128])
def test_a_voxel_of_a_box_finds_its_windows(cut, line, library):
    """From a box of windows of the map as it lies to a window of a copy, which must hold the same voxel."""
    batch, heads, _, size, patch, shifts = cut
    windows = batch * heads * prod(size) // prod(patch)
    column, joined = ctypes.c_int64(), ctypes.c_int64()

    def found(copy, index, n):
        return library.emulation_matrix_at(
            numbers(cut), ctypes.c_int64(line), ctypes.c_int64(copy), ctypes.c_int64(index),
            ctypes.c_int64(n), ctypes.byref(column), ctypes.byref(joined),
        )  # fmt: skip

    found(0, 0, 0)
    count = joined.value
    assert count * patch[2] <= max(line, patch[2])
    assert size[2] // patch[2] % count == 0
    box = (batch, heads, cut[2], size, (*patch[:2], count * patch[2]), ((0, 0, 0),))
    boxes, columns = windows // count, prod(patch) * count
    for copy, shift in enumerate(shifts):
        for index in {0, boxes // 2, boxes - 1}:
            for n in {*range(0, columns, max(columns // 16, 1)), columns - 1}:
                matrix = found(copy, index, n)
                assert matrix // windows == copy
                there = expected(cut, copy, matrix % windows, column.value, shift)
                here = expected(box, 0, index, n, (0, 0, 0))
                assert there[1:] == here[1:]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31 - 1), st.one_of(st.integers(1, 4096), st.integers(1, 2**30)))
def test_division(library, n, divisor):
    for number in (n, n - n % divisor, max(n - n % divisor - 1, 0)):
        assert (
            library.emulation_quotient(ctypes.c_uint32(number), ctypes.c_int64(divisor)) == number // divisor
        )
