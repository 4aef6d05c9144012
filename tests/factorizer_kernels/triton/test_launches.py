"""Which compiled kernel a launch takes: the one that Triton itself would, found anew or remembered.

Triton binds and specialises as on a card; its compiler and its driver are stand-ins.
"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from factorizer_kernels.ops.pointwise.spec import Sizes
from factorizer_kernels.shared import launches as loader
from factorizer_kernels.shared import registry
from factorizer_kernels.shared.triton import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


@triton.jit(do_not_specialize=["count"])
def first_kernel(x, strides, n, count, scale, y, BLOCK: tl.constexpr, SHIFTS: tl.constexpr):
    pass


@triton.jit
def second_kernel(x, strides, n, count, scale, y, BLOCK: tl.constexpr, SHIFTS: tl.constexpr):
    pass


class Compiled(CompiledKernel):
    """Without code: a launch is noted in ``started``."""

    started: ClassVar[list] = []

    def __init__(self, src, target=None, options=None, **_):
        self.src, self.name, self.module, self.function = src, src.fn.__name__, object(), object()
        self.packed_metadata, self.metadata = (), SimpleNamespace(**options)

    def _run(self, *launch):
        x, y, z, stream, function, _, _, _, _, *args = launch
        Compiled.started.append(((x, y, z), stream, function, args))


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """Two cards that start nothing: ``card.index`` is where tensors are, ``card.current`` the current one."""
    state = SimpleNamespace(index=0, current=0, bound=0)

    @contextmanager
    def device(index):
        before, state.current = state.current, index
        yield
        state.current = before

    run = triton.JITFunction.run

    def counted(*args, **kwargs):
        state.bound += 1
        return run(*args, **kwargs)

    driver = SimpleNamespace(
        get_current_device=lambda: state.current,
        get_current_stream=lambda index: 100 + index,
        get_current_target=lambda: GPUTarget("cuda", 80, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton.compiler, "compile", Compiled)
    monkeypatch.setattr(triton.JITFunction, "run", counted)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(loader, "cuda_index", lambda x: state.index)
    monkeypatch.setattr(loader, "_LAUNCHES", {})
    monkeypatch.setattr(Compiled, "started", [])
    for kernel in (first_kernel, second_kernel):
        kernel.device_caches.clear()
    return state


X, HALF = torch.zeros(64), torch.zeros(64, dtype=torch.float16)
DEFAULTS = {
    "x": X,
    "strides": (64, 8),
    "n": 7,
    "count": 5,
    "scale": 0.5,
    "y": X,
    "BLOCK": 8,
    "SHIFTS": ((0, 4),),
}
# One change each; some of them need another kernel, some do not.
CHANGES = [
    {},
    {"x": X[1:]},
    {"y": X[1:]},
    {"x": X[4:]},
    {"x": X[1:], "y": X[3:]},
    {"x": HALF},
    {"x": HALF, "y": HALF},
    {"x": HALF[1:]},
    {"x": torch.nn.Parameter(X)},
    {"strides": (64, 1)},
    {"strides": (64, 16)},
    {"strides": (1, 8)},
    {"strides": (2**40, 8)},
    {"n": 1},
    {"n": True},
    {"n": 1.0},
    {"n": 16},
    {"n": 17},
    {"n": 2**31},
    {"count": 1},
    {"count": 2**31},
    {"count": 2**63},
    {"scale": 1.0},
    {"scale": 1},
    {"BLOCK": 16},
    {"SHIFTS": ((0, 5),)},
    {"SHIFTS": ((0, 4), (0, 0))},
    {"num_warps": 2},
    {"num_warps": 8, "num_stages": 1},
]
POSITIONAL = ("x", "strides", "n", "count", "scale", "y")


def started(kernel, change, programs=3):
    """(what was launched, the function that Triton takes) of a launch with that change."""
    values = DEFAULTS | change
    args = [values.pop(name) for name in POSITIONAL]
    loader.launch(kernel, programs, X, *args, **values)
    with torch.cuda.device(loader.cuda_index(X)):
        wanted = kernel.warmup(*args, **values, enable_fp_fusion=True, grid=(1,))
    return Compiled.started[-1], wanted.function, args


@pytest.mark.parametrize("kernel", [first_kernel, second_kernel])
def test_take_the_kernel_that_triton_takes(kernel, card):
    """Whatever came before, and on both cards."""
    seen = set()
    for _ in range(2):
        for change in CHANGES:
            for card.index in (0, 1):
                (grid, stream, function, passed), wanted, args = started(kernel, change)
                assert function is wanted, change
                assert grid == (3, 1, 1)
                assert stream == 100 + card.index
                assert all(a is b for a, b in zip(passed, args, strict=False))
                seen.add(function)
    assert len(seen) >= 2 * 12
    assert card.current == 0


def test_bind_the_arguments_once(card):
    for change in CHANGES:
        started(first_kernel, change)
    before, card.bound = len(Compiled.started), 0
    for change in CHANGES:
        started(first_kernel, change)
    assert len(Compiled.started) == before + len(CHANGES)
    assert card.bound == len(CHANGES)  # by the question which kernel Triton takes


def test_two_kernels_of_the_same_arguments_are_two():
    first, second = (started(kernel, {})[0][2] for kernel in (first_kernel, second_kernel))
    assert first is not second
    assert started(first_kernel, {})[0][2] is first


def test_constants_are_known_by_their_names():
    """Given in another order they are the same; swapped values are not."""

    def compiled(**constants):
        loader.launch(first_kernel, 1, X, X, (64, 8), 7, 5, 0.5, X, **constants)
        return Compiled.started[-1][3][-2:]

    assert compiled(BLOCK=8, SHIFTS=4) == [8, 4]
    assert compiled(SHIFTS=8, BLOCK=4) == [4, 8]
    assert compiled(SHIFTS=4, BLOCK=8) == [8, 4]


def test_grids_of_each_shape():
    for programs in (1, 2, (2, 3), (4, 3, 2), 2):
        (grid, *_), _, _ = started(first_kernel, {}, programs)
        assert grid == (*(programs if isinstance(programs, tuple) else (programs,)), 1, 1)[:3]
    loader.launch(first_kernel, (2, 0), X)  # nothing to start


def test_from_several_threads():
    def one(i):
        values = DEFAULTS | CHANGES[i % len(CHANGES)]
        args = [values.pop(name) for name in POSITIONAL]
        loader.launch(first_kernel, i + 1, X, *args, **values)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(4 * len(CHANGES))))
    launches = {grid[0] - 1: function for grid, _, function, _ in Compiled.started}
    assert len(launches) == 4 * len(CHANGES)
    for i, function in launches.items():
        assert function is started(first_kernel, CHANGES[i % len(CHANGES)])[1]


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(loader, "_MOST_LAUNCHES", 4)
    for count in range(20):
        assert started(first_kernel, {"count": count})[0][3][3] == count
        assert len(loader._LAUNCHES) <= 4


PRECISIONS = {
    "nothing": ("", "tf32x3"),
    "high": ("torch.set_float32_matmul_precision('high')", "tf32"),
    "highest": ("torch.set_float32_matmul_precision('highest')", "tf32x3"),
    "allow_tf32": ("torch.backends.cuda.matmul.allow_tf32 = True", "tf32"),
    "tf32": ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "tf32"),
    "tf32 everywhere": ("torch.backends.fp32_precision = 'tf32'", "tf32"),
    "of the CPU": ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "tf32x3"),
    "ieee after all": (
        "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
        "tf32x3",
    ),
}


@pytest.mark.parametrize("setting", PRECISIONS)
def test_products_are_as_precise_as_torch_s(setting):
    """By either of torch's ways, in a process of its own: torch does not forget that both were taken."""
    statement, wanted = PRECISIONS[setting]
    if "fp32_precision" in statement and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this PyTorch has one way")
    script = f"""
import torch
{statement}
from factorizer_kernels.shared.launches import product_precision
print(product_precision())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == wanted


def test_a_channel_of_more_voxels_than_32_bits_count():
    """Nothing is allocated: the shapes alone."""
    for family in ("pointwise", "swin_nmf", "windows"):
        import_module(f"factorizer_kernels.ops.{family}.triton")
    beside = Sizes(8, blocked=1300**3)
    for operator, sizes in (
        ("join", beside),
        ("patch_conv", beside),
        ("swin_nmf", None),
        ("sw_matricize", None),
    ):
        x = torch.empty(1, 8, 1300, 1300, 1300, device="meta")
        limit = registry.find(operator, "triton").limit
        assert "2147418112 voxels of a channel, got 2197000000" in limit(x, sizes)
        assert limit(x[..., :1200, :], sizes and Sizes(8, blocked=1200 * 1300**2)) is None
    z = torch.empty(1, 1300**3 // 125, 8, 125, device="meta")
    assert "got 2197000000" in registry.find("sw_dematricize", "triton").limit(z, None)
