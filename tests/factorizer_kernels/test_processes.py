"""Threads, processes and long runs: the GIL, fork, DistributedDataParallel, determinism, memory."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tests_support import grads_of
from torch.utils.data import DataLoader, Dataset

import factorizer_kernels as fk
from factorizer_kernels.shared import allocation

HERE = Path(__file__).parent
CUT = {"head_dim": 8, "patch_size": 4, "shifts": [None, 2]}


def _map_problem(size=(1, 16, 16, 16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(size, generator=generator) for _ in range(2))
    return (x, torch.rand(8, 1, generator=generator), torch.rand(64, 1, generator=generator)), (dy,)


def _outcome(backend, problem=None):
    values, gradients = grads_of(backend, fk.swin_nmf, *(problem or _map_problem()), CUT)
    return (*values, *gradients)


def _same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(deterministic, backend):
    """They are content with every operator, and two runs give the same bits."""
    assert _same(_outcome(backend), _outcome(backend))
    (x, *_), _ = _map_problem()
    z = fk.sw_matricize(x, **CUT)
    assert torch.equal(fk.sw_dematricize(z, x.shape, **CUT), fk.sw_dematricize(z, x.shape, **CUT))
    first, second = (fk.nmf_factors(z, torch.ones(8, 1), torch.ones(64, 1)) for _ in range(2))
    assert _same(first, second)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_memory_is_kept():
    """A block above 32 MiB that was freed is handed out again: its pages are not cleared anew.

    In a process of its own, for this cannot be undone; with the C library's own functions, and without torch.
    """
    script = """if True:
        import ctypes, os, resource, runpy, sys

        keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
        libc, size = ctypes.CDLL(None), 40 << 20
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

        def faults():  # pages that the system had to bring while a new block was filled
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = libc.malloc(size)
            libc.memset(block, 1, size)
            libc.free(block)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        faults()
        pages, anew = size // os.sysconf("SC_PAGE_SIZE"), faults()
        assert keep_freed_memory()
        faults()
        assert anew > pages / 2, (anew, pages)
        assert faults() < pages / 20
    """
    done = subprocess.run([sys.executable, "-c", script, allocation.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_one_thread(backend):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = _outcome(backend)
    finally:
        torch.set_num_threads(before)
    for ours, others in zip(first, _outcome(backend), strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-5)


def test_many_threads_forward_and_backward():
    """Each with its own problem and its own choice of the backend, all at once."""
    names = ["cpu", "reference"] * 3
    problems = [_map_problem((1, 8, 8, 8, 8), seed) for seed in range(len(names))]
    expected = [_outcome(*pair) for pair in zip(names, problems, strict=True)]
    outcomes = [[] for _ in names]

    def work(i):
        outcomes[i] += [_same(_outcome(names[i], problems[i]), expected[i]) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(names))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert outcomes == [[True] * 5] * len(names)


def test_another_python_thread_runs_beside_a_kernel():
    """The kernel lets go of the interpreter's lock: a thread that wants it every millisecond gets it."""
    x, u0, v0 = torch.rand(64, 32, 4096), torch.rand(32, 8), torch.rand(4096, 8)
    operator = torch.ops.factorizer_kernels.nmf.default

    def seconds(iterations):
        begin = time.perf_counter()
        operator(x, u0, v0, iterations, "mu", iterations, 1e-16, "cpu")
        return time.perf_counter() - begin

    iterations = 20
    while seconds(iterations) < 0.1:  # long enough to tell, on any machine
        iterations *= 2
    ticks, done = [], threading.Event()

    def tick():
        while not done.is_set():
            time.sleep(0.001)
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        begin = time.perf_counter()
        operator(x, u0, v0, iterations, "mu", iterations, 1e-16, "cpu")
        end = time.perf_counter()
    finally:
        done.set()
        thread.join()
    inside = sum(begin < t < end for t in ticks)
    # A thread that waits for the lock ticks only before and after. A busy machine may be slow to wake it.
    assert inside >= 5


class _Windows(Dataset):
    """Every item is computed by the kernels, in whatever process asks for it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        (x, u0, v0), _ = _map_problem(seed=index)
        with fk.use_backend("cpu"):
            return fk.swin_nmf(x, u0, v0, **CUT)[0]


def test_after_fork():
    """DataLoader's workers, forked from a process whose team of threads has worked already."""
    dataset = _Windows()
    expected = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(loader)), expected)
    assert torch.equal(dataset[0], expected[0])


def test_distributed_data_parallel(tmp_path):
    """Two gloo processes: the gradients are the means of those of the two batches."""
    sys.path.insert(0, str(HERE))
    try:
        from ddp_worker import Layer, batch
    finally:
        sys.path.remove(str(HERE))
    environment = {**os.environ, "PYTHONPATH": str(Path(fk.__file__).parents[1])}
    command = [sys.executable, str(HERE / "ddp_worker.py")]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous"), str(tmp_path / "gradients.pt")],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    layer = Layer()
    (sum(layer(batch(rank)).square().mean() for rank in range(2)) / 2).backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_thousands_of_calls_leave_nothing():
    """Forward, backward and a refused call; 64 bytes lost in each would be 0.3 MiB in every round.

    In one round the memory of what ran before in this process may move.
    """
    x, u0, v0 = torch.rand(1, 8, 64, requires_grad=True), torch.rand(8, 1), torch.rand(64, 1)
    options = {"head_dim": 8, "patch_size": 64}

    def call(i):
        function = (fk.nmf, lambda *t: fk.swin_nmf(*t, **options))[i % 2]
        torch.autograd.grad(function(x, u0, v0).sum(), x)
        if i % 10 == 0:
            with pytest.raises(ValueError, match="rows"):
                fk.nmf(x, v0, u0)

    with fk.use_backend("cpu"):
        for i in range(1000):
            call(i)
        grown = []
        for _ in range(3):
            gc.collect()
            before = _resident()
            for i in range(5000):
                call(i)
            gc.collect()
            grown.append(_resident() - before)
        assert min(grown) < 256 * 1024
