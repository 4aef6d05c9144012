"""depthwise_conv in Triton, interpreted: values and gradients against the reference, in every layout."""

import itertools

import pytest
import torch
from tests_support import grads_of

import factorizer_kernels as fk
from factorizer_kernels.ops.depthwise import triton as depthwise

pytestmark = pytest.mark.usefixtures("poisoned")

# Relative L2: rounding in float64 and float32; half types round the result once, the interpreter truncates.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows, runs of planes and chunks on small maps."""
    monkeypatch.setattr(depthwise, "BLOCK", 32)
    monkeypatch.setattr(depthwise, "PLANES", 4)
    monkeypatch.setattr(depthwise, "SUMS_BLOCK", 32)
    monkeypatch.setattr(depthwise, "CHUNK", 3)


def problem(size, kernel_size, dtype=torch.float64):
    torch.manual_seed(sum(size))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy = (torch.randn(size, dtype=torch.float64).to(dtype) for _ in range(2))
    return (x, torch.randn(size[1], *kernel_size, dtype=compute), torch.randn(size[1], dtype=compute)), dy


def compare(inputs, dy, rel):
    exact = grads_of("reference", fk.depthwise_conv, [t.double() for t in inputs], (dy.double(),), {})
    before = [t.clone() for t in inputs]
    ours = grads_of("triton", fk.depthwise_conv, inputs, (dy,), {})
    results, expected = (*ours.values, *ours.gradients), (*exact.values, *exact.gradients)
    dtypes = (inputs[0].dtype, *(t.dtype for t in inputs))
    for result, wanted, dtype in zip(results, expected, dtypes, strict=True):
        assert result.dtype == dtype
        assert result.is_contiguous()
        assert rel(result, wanted) < TOLERANCES[dtype]
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# Every tap of every block takes some milliseconds: the maps are a few blocks, planes and channels.
CASES = [
    ((2, 2, 9), (3,)), ((1, 1, 1), (7,)), ((1, 1, 3, 20), (3, 5)), ((1, 2, 5, 3), (1, 3)),
    ((1, 1, 6, 2, 5), (3, 3, 3)), ((2, 1, 1, 1, 1), (3, 1, 3)), ((1, 1, 5, 1, 3), (7, 1, 1)),
]  # fmt: skip
SLOW_CASES = [((2, 2, 6, 7, 9), (3, 3, 3)), ((1, 2, 9, 10, 8), (5, 3, 7)), ((2, 3, 13, 20), (3, 5))]


@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)],
    ids=str,
)
def test_float64(size, kernel_size, rel):
    compare(*problem(size, kernel_size), rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, rel):
    compare(*problem((1, 2, 3, 5), (3, 3), dtype), rel)


def test_strides(rel):
    """x and dy read where they lie: channels last, every other voxel, expanded."""
    (x, weight, bias), dy = problem((2, 2, 3, 4), (3, 3))
    x, weight = x.to(memory_format=torch.channels_last), weight.mT.contiguous().mT
    compare((x, weight, bias), dy.mT.contiguous().mT, rel)
    compare((x[..., ::2], weight, bias), dy[..., :1].expand(2, 2, 3, 2), rel)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_what_is_wanted(mask):
    inputs, dy = problem((1, 2, 4, 5), (3, 1))
    expected = grads_of("reference", fk.depthwise_conv, inputs, (dy,), {}).gradients
    leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(inputs, mask, strict=True)]
    with fk.use_backend("triton"):
        fk.depthwise_conv(*leaves).backward(dy)
    for leaf, wanted, gradient in zip(leaves, mask, expected, strict=True):
        if wanted:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def test_second_derivatives():
    leaves = [t.requires_grad_() for t in problem((1, 2, 3, 4), (3, 1))[0]]
    with fk.use_backend("triton"):
        assert torch.autograd.gradgradcheck(fk.depthwise_conv, leaves, fast_mode=True)


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty_operators(size):
    """The operators themselves, which a graph that was traced with other sizes may call with none."""
    ops = torch.ops.factorizer_kernels
    (x, weight, bias), dy = problem(size, (3, 3))
    assert ops.depthwise_conv(x, weight, bias, "triton").shape == size
    dx, dweight, dbias = ops.depthwise_conv_backward(dy, x, weight, (True, True, True), "triton")
    assert dx.shape == size
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


def test_spoiled_voxel():
    """A NaN spoils what the filter sees it from, and no more."""
    (x, weight, bias), _ = problem((1, 2, 3, 9), (3, 3))
    with fk.use_backend("triton"):
        clean = fk.depthwise_conv(x, weight, bias)
        x[0, 1, 2, 4] = float("nan")
        y = fk.depthwise_conv(x, weight, bias)
    reached = torch.zeros(y.shape, dtype=torch.bool)
    reached[0, 1, 1:, 3:6] = True
    assert torch.equal(y.isnan(), reached)
    assert torch.equal(y[~reached], clean[~reached])


def test_large_filters_are_refused_by_name():
    (x, weight, bias), _ = problem((1, 2, 12, 12), (9, 3))
    with fk.use_backend("triton"), pytest.raises(ValueError, match=r"kernels of 1, 3, 5 or 7.*got \(9, 3\)"):
        fk.depthwise_conv(x, weight, bias)
