"""The Triton backend on a card: the interpreted comparisons at full size, and what only a device shows."""

import pytest
import torch
from tests_support import grads_of

import factorizer_kernels as fk

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# Relative L2 against the reference in float64. float32: sums of 512 to 2^21 terms, divisions to 2 ulp, and
# HALS gradients conditioned a hundred times worse. Half precisions: one rounding of the result.
VALUES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw(batch, rows, columns, rank, dtype, device="cuda"):
    """A draw in which no component of HALS dies: X near UVᵀ, the first factors near U and V."""
    generator = torch.Generator().manual_seed(rows + columns + rank)
    u = torch.rand(rows, rank, generator=generator) + 2 * torch.eye(rows, rank)
    v = torch.rand(columns, rank, generator=generator) + 2 * torch.eye(columns, rank)
    x = u @ v.mT + 0.1 * torch.rand(*batch, rows, columns, generator=generator)
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    u0, v0 = 1.1 * u, 0.9 * v + 0.01
    return x.to(device, dtype), u0.to(device, factors), v0.to(device, factors)


def compare(function, inputs, rel, **options):
    dtype = inputs[0].dtype
    exact = [t.detach().double() for t in inputs]
    with fk.use_backend("reference"):
        value = function(*exact, **options)
    dy = torch.randn(value.shape, device=value.device).to(dtype)
    expected = grads_of("reference", function, exact, [dy.double()], options)
    result = grads_of("triton", function, inputs, [dy], options)
    again = grads_of("triton", function, inputs, [dy], options)
    assert rel(result.values[0], expected.values[0]) < VALUES[dtype]
    scale = expected.gradients[0].norm()
    for gradient, wanted in zip(result.gradients, expected.gradients, strict=True):
        # The gradients of u0 and v0 may cancel to nothing at rank 1: the distance is to x's gradient too.
        assert (gradient.double() - wanted).norm() <= GRADIENTS[dtype] * max(wanted.norm(), 0.1 * scale)
    for a, b in zip(result.values + result.gradients, again.values + again.gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("shape", [(8, 512), (13, 77), (8, 20011)], ids=str)
def test_nmf(shape, rank, solver, dtype, poisoned, rel):
    compare(fk.nmf, draw((3,), *shape, rank, dtype), rel, solver=solver)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifts", [[None], [None, 4], [0, 2, 4, 6], [(1, 2, 3), 5]], ids=str)
@pytest.mark.parametrize("patch_size", [8, (4, 8, 16), (32, 32, 32)], ids=str)
def test_swin_nmf_rank1(patch_size, shifts, dtype, poisoned, rel):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 32, 32, 32, device="cuda").to(dtype)
    x[0, :8, :8] = -1  # empty windows
    columns = 8**3 if patch_size == 8 else torch.Size(patch_size).numel()
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    u0, v0 = (torch.rand(n, 1, device="cuda", dtype=factors) for n in (8, columns))
    compare(fk.swin_nmf, (x, u0, v0), rel, head_dim=8, patch_size=patch_size, shifts=shifts)


def test_offsets_pass_32_bits(rel):
    """A map of more than 2^31 elements: its last channels against the same channels alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    x = torch.rand(1, 1040, 128, 128, 128, device="cuda", dtype=torch.float16)
    u0, v0 = torch.rand(8, 1, device="cuda"), torch.rand(512, 1, device="cuda")
    options = {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}
    with fk.use_backend("triton"):
        whole = fk.swin_nmf(x, u0, v0, **options)[:, -8:]
        alone = fk.swin_nmf(x[:, -8:].clone(), u0, v0, **options)
    assert torch.equal(whole, alone)


def test_graph_and_stream():
    x, u0, v0 = (
        torch.rand(1, 8, 16, 16, 16, device="cuda"),
        torch.rand(8, 1).cuda(),
        torch.rand(512, 1).cuda(),
    )
    options = {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}
    with fk.use_backend("triton"):
        expected = fk.swin_nmf(x, u0, v0, **options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            beside = fk.swin_nmf(x, u0, v0, **options)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fk.swin_nmf(x, u0, v0, **options)
    captured.zero_()
    graph.replay()
    assert torch.equal(beside, expected)
    assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device(rel):
    inputs = draw((2,), 8, 512, 1, torch.float32, "cuda:1")
    compare(fk.nmf, inputs, rel)
