"""The GPU backends on a card: the comparisons of the CPU at full size, and what only a device shows."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from functools import partial
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


# Relative L2 against the reference in float64. float32: sums of 512 to 32768 terms, divisions to 2 ulp, and
# HALS gradients conditioned a hundred times worse. Half precisions: one rounding of the result.
VALUES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
GRADIENTS = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}
OTHER_DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def draw(batch, rows, columns, rank, dtype, device="cuda"):
    """A draw in which no entry of HALS' factors comes near zero, where rounding decides the projection."""
    generator = torch.Generator().manual_seed(rows + columns + rank)
    rand = partial(torch.rand, generator=generator)
    u0, v0 = torch.eye(rows, rank) + 0.1 * (1 + rand(rows, rank)), 1 + 0.5 * rand(columns, rank)
    x = u0 @ (1 + 0.5 * rand(*batch, rank, columns)) + 0.1 * rand(*batch, rows, columns)
    factors = torch.float64 if dtype == torch.float64 else torch.float32
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
    dy = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value.device, dtype)
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


# Triton compiles each variant, at rank 8 for a minute: dtypes do not meet every rank and shape.
MATRICES = [
    *(
        (shape, rank, torch.float32)
        for shape in ((8, 512), (13, 77), (8, 20011))
        for rank in (1, 2, 3, 4, 12)
    ),
    *(((8, 512), rank, torch.float32) for rank in (5, 6, 7, 8)),
    *(
        (shape, rank, dtype)
        for shape, rank in (((8, 512), 1), ((8, 512), 2), ((13, 77), 3), ((8, 20011), 2), ((8, 512), 12))
        for dtype in OTHER_DTYPES
    ),
]


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize(("shape", "rank", "dtype"), MATRICES, ids=str)
def test_nmf(shape, rank, solver, dtype, gpu_backend, poisoned, rel):
    if gpu_backend == "triton" and rank in (5, 6, 7):
        pytest.skip("the code of rank 8, with fewer columns")
    compare(gpu_backend, fk.nmf, draw((3,), *shape, rank, dtype), rel, solver=solver)


MAPS = [
    *(
        (patch_size, shifts, torch.float32)
        for patch_size in (4, 8, (4, 8, 16), (32, 32, 32))
        for shifts in ([None], [None, 4], [0, 2, 4, 6], [(1, 2, 3), 5])
    ),
    *((patch_size, [None, 4], dtype) for patch_size in (8, (32, 32, 32)) for dtype in OTHER_DTYPES),
]


@pytest.mark.parametrize(("patch_size", "shifts", "dtype"), MAPS, ids=str)
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
@pytest.mark.parametrize(
    ("rank", "shifts"), [(2, [None, 4]), (2, [0, 2, 4, 6]), (4, [None, 4]), (8, [1, 4])], ids=str
)
def test_swin_nmf_of_more_components(rank, shifts, solver, gpu_backend, poisoned, rel):
    """More windows than blocks of the backward, at most eight a multiprocessor: tapes are used again."""
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    batch = 8 * processors // 64 + 1
    x, u0, v0 = draw((batch,), 8, 32**3, rank, torch.float32)
    options = {"head_dim": 8, "patch_size": 8, "shifts": shifts, "solver": solver, "num_iters": 3}
    compare(
        gpu_backend, fk.swin_nmf, (x.view(batch, 8, 32, 32, 32), u0, v0[:512].contiguous()), rel, **options
    )


@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 1), ("hals", 2), ("mu", 2)])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_maps(name, solver, rank, gpu_backend):
    check_special(gpu_backend, name, solver, rank, device="cuda")


def test_choice():
    """cuda where it serves, else triton, else the reference."""
    order = [name for name in ("cuda", "triton") if name not in REASONS] + ["reference"]
    from factorizer_kernels.choice import choose
    from factorizer_kernels.ops.nmf.spec import MatrixSizes

    x = torch.empty(1, 8, 16, device="cuda")
    assert choose("nmf", x, MatrixSizes(8, 16, 1, 1, 5, "hals")) == order[0]
    assert choose("nmf", x, MatrixSizes(8, 16, 9, 1, 5, "hals")) == next(
        name for name in order if name != "cuda"
    )
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


def test_graph_of_a_whole_network():
    """Captured after one call that loads all the kernels, and replayed on another image."""
    factorizer = pytest.importorskip("factorizer")
    torch.manual_seed(0)
    network = factorizer.preset("swin-brats", in_channels=4, out_channels=3, spatial_size=[32] * 3)
    network = network.cuda().eval()
    x = torch.randn(1, 4, 32, 32, 32, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            network(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = network(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(captured, network(x))


def test_compile_fullgraph(gpu_backend, rel):
    """One graph with the choice in it, compiled for the card; another batch takes the same one."""
    u0, v0 = torch.rand(8, 1, device="cuda"), torch.rand(512, 1, device="cuda")

    def network(x):
        y = fk.swin_nmf(x * 2, u0, v0, head_dim=8, patch_size=8, shifts=[None, 4])
        return (y + fk.nmf(y.view(-1, 8, 512), u0, v0).view(y.shape)).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True)
    with fk.use_backend(gpu_backend):
        for batch in (2, 3):
            x = torch.rand(batch, 8, 16, 16, 16, device="cuda", requires_grad=True)
            y, expected = compiled(x), network(x)
            assert rel(y, expected) < 1e-6
            dx, wanted = (torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected))
            assert rel(dx, wanted) < 1e-5


def test_forked_process():
    """It has no GPU, and says so; what needs none works."""
    torch.zeros(1, device="cuda")
    context = multiprocessing.get_context("fork")
    names, other = context.Pipe(duplex=False)

    def child():
        torch.set_num_threads(1)  # the parent's threads did not come along
        with fk.use_backend("reference"):
            fk.nmf(torch.rand(2, 4, 8), torch.rand(4, 1), torch.rand(8, 1))
        other.send([backend.name for backend in fk.backends() if backend.available])

    process = context.Process(target=child, daemon=True)
    process.start()
    assert names.poll(60)
    assert set(names.recv()) <= {"cpu", "torch", "reference"}
    process.join()


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
        "for rank, solver, shift in ((1, 'hals', 3), (1, 'hals', 4), (2, 'mu', 3), (2, 'hals', 4)):\n"
        "    x, u0, v0 = (torch.rand(size, device='cuda', requires_grad=True)\n"
        "                 for size in ((1, 8, 8, 8, 24), (8, rank), (512, rank)))\n"
        "    with fk.use_backend(sys.argv[1]):\n"
        "        y = fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8, shifts=[None, shift], solver=solver)\n"
        "    y.sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    tools = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
    command = [*tools, sys.executable, "-c", script, gpu_backend]
    root = str(Path(fk.__file__).parents[1])
    # Each tensor is an allocation of its own: of torch's large ones the tool would see the ends alone.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
