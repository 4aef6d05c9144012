"""The GPU backends on a card: the comparisons of the CPU at full size, and what only a device shows."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests_support import SPECIAL, check_special, grads_of

import factorizer_kernels as fk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

REASONS = {b.name: b.reason for b in fk.backends() if not b.available}


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request):
    if request.param in REASONS:
        pytest.skip(REASONS[request.param])
    return request.param


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


def not_served(inputs, **options):
    """The rule of docs/cuda.md, in the test's own words."""
    x, u0, v0 = inputs
    return x.dtype == torch.float64 or u0.shape[-2] > 8 or v0.shape[-2] > 1024 or u0.shape[-1] > 8


def compare(backend, function, inputs, rel, **options):
    """Values and gradients against the reference in float64, twice to the same bits; or an error by name."""
    if backend == "cuda" and not_served(inputs, **options):
        with fk.use_backend(backend), pytest.raises(ValueError, match="does not run"):
            function(*inputs, **options)
        pytest.skip("not served by cuda, and it says so")
    dtype = inputs[0].dtype
    exact = [t.detach().double() for t in inputs]
    with fk.use_backend("reference"):
        value = function(*exact, **options)
    dy = torch.randn(value.shape, device=value.device).to(dtype)
    expected = grads_of("reference", function, exact, [dy.double()], options)
    result = grads_of(backend, function, inputs, [dy], options)
    again = grads_of(backend, function, inputs, [dy], options)
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
def test_nmf(shape, rank, solver, dtype, gpu_backend, poisoned, rel):
    compare(gpu_backend, fk.nmf, draw((3,), *shape, rank, dtype), rel, solver=solver)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifts", [[None], [None, 4], [0, 2, 4, 6], [(1, 2, 3), 5]], ids=str)
@pytest.mark.parametrize("patch_size", [8, (4, 8, 16), (32, 32, 32)], ids=str)
def test_swin_nmf_rank1(patch_size, shifts, dtype, gpu_backend, poisoned, rel):
    torch.manual_seed(0)
    x = torch.randn(2, 16, 32, 32, 32, device="cuda").to(dtype)
    x[0, :8, :8] = -1  # empty windows
    columns = 8**3 if patch_size == 8 else torch.Size(patch_size).numel()
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    u0, v0 = (torch.rand(n, 1, device="cuda", dtype=factors) for n in (8, columns))
    options = {"head_dim": 8, "patch_size": patch_size, "shifts": shifts}
    compare(gpu_backend, fk.swin_nmf, (x, u0, v0), rel, **options)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("shifts", [[None, 4], [0, 2, 4, 6]], ids=str)
def test_swin_nmf_of_more_components(shifts, rank, solver, gpu_backend, poisoned, rel):
    """More windows than blocks of the backward, so that its tapes are used again."""
    x, u0, v0 = draw((512,), 8, 512, rank, torch.float32)
    x = x.view(64, 8, 8, 8, 8, 8).permute(1, 2, 0, 3, 4, 5).reshape(8, 8, 64, 64, 8)[:2].contiguous()
    options = {"head_dim": 8, "patch_size": 8, "shifts": shifts, "solver": solver, "num_iters": 3}
    compare(gpu_backend, fk.swin_nmf, (x, u0, v0), rel, **options)


@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 1), ("hals", 2), ("mu", 2)])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_maps(name, solver, rank, gpu_backend):
    check_special(gpu_backend, name, solver, rank, device="cuda")


def test_choice():
    """cuda where it serves, else triton, else the reference."""
    order = [name for name in ("cuda", "triton") if name not in REASONS] + ["reference"]
    from factorizer_kernels._ops import Matrices
    from factorizer_kernels.backends import choose

    x = torch.empty(1, 8, 16, device="cuda")
    assert choose("nmf", x, Matrices(8, 16, 1, 1)) == order[0]
    assert choose("nmf", x, Matrices(8, 16, 9, 1)) == next(name for name in order if name != "cuda")
    assert choose("sw_matricize", x) == next(name for name in order if name != "cuda")


def test_offsets_pass_32_bits(gpu_backend):
    """A map of more than 2^31 elements: its last channels against the same channels alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    x = torch.rand(1, 1040, 128, 128, 128, device="cuda", dtype=torch.float16)
    u0, v0 = torch.rand(8, 1, device="cuda"), torch.rand(512, 1, device="cuda")
    options = {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}
    with fk.use_backend(gpu_backend):
        whole = fk.swin_nmf(x, u0, v0, **options)[:, -8:]
        alone = fk.swin_nmf(x[:, -8:].clone(), u0, v0, **options)
    assert torch.equal(whole, alone)


@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 2)])
def test_graph_and_stream(solver, rank, gpu_backend):
    """Forward and backward on another stream, and captured in a graph and replayed on other numbers."""
    x, u0, v0 = (torch.rand(shape, device="cuda") for shape in ((1, 8, 16, 16, 16), (8, rank), (512, rank)))
    x.requires_grad_()

    def run():
        y = fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8, shifts=[None, 4], solver=solver)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    with fk.use_backend(gpu_backend):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            beside = run()
        torch.cuda.current_stream().wait_stream(stream)
        expected = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        for results in (beside, captured):
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
        with torch.no_grad():
            x.copy_(torch.rand_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_second_device(gpu_backend, rel):
    """While the first one is current, and stays it."""
    inputs = draw((2,), 8, 512, 1, torch.float32, "cuda:1")
    compare(gpu_backend, fk.nmf, inputs, rel)
    assert torch.cuda.current_device() == 0


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer(tool, gpu_backend):
    """No access out of bounds, no race in shared memory, nothing read before it is written."""
    script = (
        "import sys, torch, factorizer_kernels as fk\n"
        "for rank, solver in ((1, 'hals'), (2, 'mu')):\n"
        "    x = torch.rand(1, 8, 8, 8, 24, device='cuda', requires_grad=True)\n"
        "    u0, v0 = torch.rand(8, rank, device='cuda'), torch.rand(512, rank, device='cuda')\n"
        "    with fk.use_backend(sys.argv[1]):\n"
        "        y = fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8, shifts=[None, 3], solver=solver)\n"
        "    y.sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3", sys.executable, "-c", script]
    root = str(Path(fk.__file__).parents[1])
    done = subprocess.run([*command, gpu_backend], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
