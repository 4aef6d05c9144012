"""Whole products on the CPU, which other kernels stand on: against float64, on any number of threads."""

import pytest
import torch

from factorizer_kernels.shared import native

pytestmark = pytest.mark.skipif(native.native is None, reason="the compiled module is not installed")

# (batch, rows, depth, columns): nothing, one, odd, beyond a block of the depth, few columns and many rows; of
# a product with a transpose more rows than a block has, and a depth that fills no vectors.
SIZES = [
    (1, 1, 1, 1), (2, 3, 5, 7), (3, 8, 8, 1024), (2, 17, 9, 1001), (1, 40, 33, 3000), (1, 13, 600, 100),
    (2, 130, 300, 70), (1, 133, 23, 515), (0, 4, 4, 4), (2, 4, 0, 20), (1, 3, 4, 0), (1, 0, 4, 9),
]  # fmt: skip

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def assert_sums(result, a, b, arithmetic):
    """result is a @ b, of terms of either sign; it is rounded once more where its dtype is a smaller one."""
    expected, squares = a.double() @ b.double(), a.double() ** 2 @ b.double() ** 2
    # Partial sums grow with the root of their number of terms, and so do their roundings, added up.
    bound = 2 * torch.finfo(arithmetic).eps * (squares * a.shape[-1]).sqrt()
    if result.dtype != arithmetic:
        bound += torch.finfo(result.dtype).eps * expected.abs()
    assert ((result.double() - expected).abs() <= bound).all()


def spread(x, gap):
    """x in memory whose rows lie ``gap`` elements apart, and that memory: NaN between the rows."""
    memory = torch.full((*x.shape[:-1], x.shape[-1] + gap), float("nan"), dtype=x.dtype)
    view = memory[..., : x.shape[-1]]
    view.copy_(x)
    return view, memory


def multiply(w, x, y, threads):
    native.native.multiply(
        native.DTYPE_CODES[x.dtype], (len(x), *w.shape, x.shape[2]), native.memory(w), w.stride(),
        native.memory(x), x.stride()[:2], native.memory(y), y.stride()[:2], threads,
    )  # fmt: skip


def multiply_by_transpose(a, b, out, threads):
    native.native.multiply_by_transpose(
        native.DTYPE_CODES[a.dtype], (*a.shape[:2], b.shape[1], a.shape[2]), native.memory(a), a.stride()[:2],
        native.memory(b), b.stride()[:2], native.memory(out), threads,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gap", [0, 5])
def test_against_float64(size, dtype, gap):
    batch, rows, depth, columns = size
    generator = torch.Generator().manual_seed(rows + depth)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.randn(rows, depth, generator=generator, dtype=arithmetic)
    x, _ = spread(torch.randn(batch, depth, columns, generator=generator).to(dtype), gap)
    for weights in (w, w.T.contiguous().T):
        results = []
        for threads in (1, 3):
            y, memory = spread(torch.full((batch, rows, columns), float("nan"), dtype=dtype), gap)
            multiply(weights, x, y, threads)
            assert_sums(y, w, x, arithmetic)
            assert memory[..., columns:].isnan().all()
            results.append(y)
        assert torch.equal(*results)

    a, _ = spread(torch.randn(batch, rows, columns, generator=generator).to(dtype), gap)
    sums = [torch.full((rows, depth), float("nan"), dtype=arithmetic) for _ in range(2)]
    for threads, out in zip((1, 3), sums, strict=True):
        multiply_by_transpose(a, x, out, threads)
    assert torch.equal(*sums)
    assert_sums(sums[0], a.movedim(0, 1).flatten(1), x.movedim(0, 1).flatten(1).T, arithmetic)
