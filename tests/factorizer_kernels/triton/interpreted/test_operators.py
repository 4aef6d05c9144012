"""The Triton kernels, interpreted on the CPU, against the golden cases and the reference.

Interpreting costs milliseconds for each program, so the shapes are small; blocks are made small too, so
that they still take several programs, blocks and strips.
"""

import pytest
import torch
from tests_support import grads_of

import factorizer_kernels as fk
from factorizer_kernels.ops.nmf.triton import problem, strips, sweep
from factorizer_kernels.ops.nmf.triton.operators import kernels_for

pytestmark = pytest.mark.usefixtures("poisoned")

# Relative L2. float64: rounding, amplified by the iterations. float32: some hundred roundings, and HALS
# gradients are conditioned a hundred times worse. Half precisions round the result once, and the
# interpreter truncates bfloat16 where a device rounds: at most 2^-7.
VALUES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENTS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def small_blocks(monkeypatch):
    """Every matrix of more than 64 elements is long, and passes over it take several blocks and strips."""
    monkeypatch.setattr(problem, "MAX_ELEMENTS", 64)
    monkeypatch.setattr(strips, "BLOCK_ELEMENTS", 32)
    monkeypatch.setattr(strips, "MAX_STRIPS", 3)


def compare(function, inputs, rel, **options):
    """Values and gradients under Triton against the reference in float64; inputs stay as they are."""
    torch.manual_seed(0)
    dtype = inputs[0].dtype
    exact = tuple(t.detach().double() for t in inputs)
    with fk.use_backend("reference"):
        values = function(*exact, **options)
    values = values if isinstance(values, tuple) else (values,)
    losses = [torch.randn(v.shape, dtype=torch.float64).to(dtype) for v in values]
    before = [t.clone() for t in inputs]
    expected = grads_of("reference", function, exact, [loss.double() for loss in losses], options)
    result = grads_of("triton", function, inputs, losses, options)
    scale = expected.gradients[0].norm()
    for value, wanted in zip(result.values, expected.values, strict=True):
        assert value.dtype == dtype
        assert rel(value, wanted) < VALUES[dtype]
    for gradient, wanted, given in zip(result.gradients, expected.gradients, inputs, strict=True):
        assert gradient.dtype == given.dtype
        # The gradients of u0 and v0 may cancel to nothing at rank 1: the distance is to x's gradient too.
        assert (gradient.double() - wanted).norm() <= GRADIENTS[dtype] * max(wanted.norm(), 0.1 * scale)
    for given, kept in zip(inputs, before, strict=True):
        assert torch.equal(given, kept)
    return losses, result


def draw(batch, rows, columns, rank, dtype=torch.float64):
    """A draw in which no component of HALS dies: X near UVᵀ, the first factors near U and V."""
    torch.manual_seed(rows + columns + rank)
    u = torch.rand(rows, rank) + 2 * torch.eye(rows, rank)
    v = torch.rand(columns, rank) + 2 * torch.eye(columns, rank)
    x = u @ v.mT + 0.1 * torch.rand(*batch, rows, columns)
    u0, v0 = u * (1 + 0.1 * torch.rand_like(u)), v * (1 + 0.1 * torch.rand_like(v))
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), u0.to(factors), v0.to(factors)


@pytest.mark.golden_kind("nmf")
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_golden_nmf(golden, dtype, rel):
    meta = golden["meta"]
    options = {k: meta[k] for k in ("num_iters", "solver", "num_grad_steps", "eps")}
    # One matrix of each case.
    first = {k: golden[k].reshape(-1, *golden[k].shape[-2:])[:1] for k in ("x", "y", "u", "v", "dy", "dx")}
    x = first["x"].to(dtype).requires_grad_()
    u0, v0 = golden["u0"].to(dtype), golden["v0"].to(dtype)
    with fk.use_backend("triton"):
        y = fk.nmf(x, u0, v0, **options)
        u, v = fk.nmf_factors(x, u0, v0, **options)
    value_tol, grad_tol = (1e-9, 1e-8) if dtype == torch.float64 else (2e-5, 2e-3)
    assert rel(y, first["y"]) < value_tol
    assert rel(u, first["u"]) < value_tol
    assert rel(v, first["v"]) < value_tol
    if meta["num_iters"] > 0:
        (dx,) = torch.autograd.grad(y, x, first["dy"].to(dtype))
        assert rel(dx, first["dx"]) < grad_tol


@pytest.mark.golden_kind("matricize")
def test_golden_matricize(golden):
    meta = golden["meta"]
    names = ("num_heads", "head_dim", "grid_size", "patch_size", "shifts")
    options = {name: meta[name] for name in names if meta.get(name) is not None}
    with fk.use_backend("triton"):
        y = fk.sw_matricize(golden["x"], **options)
        x = fk.sw_dematricize(golden["z"], meta["size"], **options)
    assert torch.equal(y.reshape(golden["y"].shape), golden["y"])
    torch.testing.assert_close(x, golden["inverse_z"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "rank"),
    [((), 1, 1, 1), ((2,), 1, 7, 1), ((2,), 7, 1, 1), ((3,), 5, 11, 2), ((), 17, 6, 3), ((1, 2), 5, 9, 4)],
)  # fmt: skip
def test_windows_on_chip(batch, rows, columns, rank, solver, rel):
    inputs = draw(batch, rows, columns, rank)
    for function in (fk.nmf, fk.nmf_factors):
        compare(function, inputs, rel, num_iters=3, solver=solver)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_specialised_rank(rank, solver, dtype, rel):
    compare(fk.nmf, draw((2,), 9, 21, rank, dtype), rel, num_iters=3, solver=solver)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize(("rank", "grad_steps"), [(1, None), (2, 2)])
def test_long_matrices(rank, grad_steps, solver, small_blocks, rel):
    # Blocks of 8 columns: four of them, the last one partial, in two strips.
    inputs = draw((2,), 3, 29, rank)
    compare(fk.nmf, inputs, rel, num_iters=3, solver=solver, num_grad_steps=grad_steps)
    compare(fk.nmf_factors, inputs, rel, num_iters=1, solver=solver)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [9, pytest.param(64, marks=pytest.mark.slow)])
def test_any_rank(rank, solver, rel):
    compare(fk.nmf, draw((2,), rank + 3, rank + 8, rank), rel, num_iters=2, solver=solver)
    compare(fk.nmf_factors, draw((1,), rank, rank, rank), rel, num_iters=1, solver=solver)


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_any_rank_in_several_blocks(solver, rel, monkeypatch):
    """Blocks of rows and, in MU, of columns; matrices and dy that no product takes as they lie."""
    monkeypatch.setattr(sweep, "BLOCK_ELEMENTS", 128)
    monkeypatch.setattr(sweep, "MU_COLUMNS", 16)
    x, u0, v0 = draw((2,), 17, 22, 18 if solver == "mu" else 9)
    x, u0 = x.repeat_interleave(2, -1)[..., ::2], torch.stack((u0, 0.5 * u0)).mT.contiguous().mT
    compare(fk.nmf, (x, u0, v0), rel, num_iters=3, num_grad_steps=2, solver=solver)
    compare(fk.nmf, (x.mT, v0, u0), rel, num_iters=1, solver=solver)
    leaf = x.clone().requires_grad_()
    with fk.use_backend("triton"):
        fk.nmf(leaf, u0, v0, num_iters=1, solver=solver).sum().backward()
    copy = x.clone().requires_grad_()
    with fk.use_backend("reference"):
        fk.nmf(copy, u0, v0, num_iters=1, solver=solver).sum().backward()
    assert rel(leaf.grad, copy.grad) < GRADIENTS[torch.float64]


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_any_rank_under_autocast(solver):
    """The factorisation is in float32, whatever autocast asks of products."""
    leaves = [t.requires_grad_() for t in draw((), 10, 12, 9, torch.float32)]

    def call():
        with fk.use_backend("triton"):
            y = fk.nmf(*leaves, num_iters=1, solver=solver)
            return y, *torch.autograd.grad(y.square().sum(), leaves)

    plain = call()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize(("num_iters", "grad_steps"), [(0, None), (0, 0), (1, None), (3, 1), (2, 9)])
@pytest.mark.parametrize("rank", [1, 2])
def test_iterations_and_grad_steps(num_iters, grad_steps, rank, rel):
    inputs = draw((), 4, 8, rank)
    for solver in ("mu", "hals"):
        compare(fk.nmf, inputs, rel, num_iters=num_iters, num_grad_steps=grad_steps, solver=solver)


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_no_grad_steps(rank):
    leaves = [t.requires_grad_() for t in draw((), 10, 12, rank)]
    with fk.use_backend("triton"):
        y = fk.nmf(*leaves, num_iters=2, num_grad_steps=0)
    gradients = torch.autograd.grad(y.sum(), leaves) if y.requires_grad else ()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("long", [False, True], ids=["on chip", "passes"])
@pytest.mark.parametrize(
    ("num_iters", "grad_steps", "eps"),
    # The identity is exact in eps; one that can be seen shows that every term of it is there.
    [(1, None, 1e-16), (4, None, 1e-16), (4, None, 1e-2), (5, 3, 1e-2)],
)
def test_rank1_identity(long, num_iters, grad_steps, eps, request, rel):
    """Rank 1 of HALS after a ReLU, on a map with empty windows, empty columns and empty rows."""
    if long:
        request.getfixturevalue("small_blocks")
    torch.manual_seed(1)
    x = torch.randn(2, 4, 4, 12, dtype=torch.float64)
    x[0] = -1
    x[1, 2] = -1
    x[1, :, 1] = 0
    x[1, :, :, :4] *= 1e-3
    options = {"num_heads": 1, "patch_size": (4, 12) if long else 4, "shifts": [None, (1, 3)], "eps": eps}
    v0 = torch.rand(48 if long else 16, 1, dtype=torch.float64)
    u0 = torch.rand(4, 1, dtype=torch.float64)
    compare(fk.swin_nmf, (x, u0, v0), rel, num_iters=num_iters, num_grad_steps=grad_steps, **options)


MAPS = {
    "1-D": ((2, 4, 8), {"head_dim": 2, "patch_size": 4, "shifts": [None, 3]}),
    "2-D odd": ((1, 3, 6, 10), {"head_dim": 3, "patch_size": (3, 5), "shifts": [None, (1, 7)]}),
    "3-D": ((1, 2, 4, 2, 8), {"head_dim": 2, "patch_size": (4, 2, 4), "shifts": [2, (0, 1, 5), 3]}),
    "one copy": ((1, 4, 4, 8), {"head_dim": 4, "patch_size": 4, "shifts": [(1, 2)]}),
}


@pytest.mark.parametrize("size", MAPS)
@pytest.mark.parametrize(
    ("solver", "rank", "act"), [("hals", 1, "relu"), ("hals", 2, None), ("mu", 2, "relu")]
)
def test_swin_nmf(size, solver, rank, act, rel):
    shape, options = MAPS[size]
    torch.manual_seed(len(shape))
    columns = torch.Size(options["patch_size"] if isinstance(options["patch_size"], tuple) else ()).numel()
    columns = columns if columns > 1 else options["patch_size"] ** (len(shape) - 2)
    x = torch.randn(shape, dtype=torch.float64) if act else torch.rand(shape, dtype=torch.float64)
    u0, v0 = (torch.rand(n, rank, dtype=torch.float64) for n in (options["head_dim"], columns))
    compare(fk.swin_nmf, (x, u0, v0), rel, act=act, solver=solver, num_iters=2, **options)


@pytest.mark.parametrize("size", MAPS)
def test_matricize_and_back(size, rel):
    shape, options = MAPS[size]
    x = torch.randn(shape, dtype=torch.float64)
    compare(lambda x: fk.sw_matricize(x, **options), (x,), rel)
    z = fk.sw_matricize(x, **options)
    compare(lambda z: fk.sw_dematricize(z, shape, **options), (torch.randn_like(x.new_zeros(z.shape)),), rel)


def test_strides_and_broadcast_factors(rel):
    """Channels-last x, an expanded dy, factors for every window: read where they lie."""
    torch.manual_seed(2)
    x = torch.rand(2, 4, 8, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    u0 = torch.rand(2, 1, 4, 1, dtype=torch.float64)
    v0 = torch.rand(1, 2, 16, 1, dtype=torch.float64)
    compare(fk.swin_nmf, (x, u0, v0), rel, head_dim=4, patch_size=4, num_iters=2)
    matrices = x.permute(0, 3, 2, 1)[:, :2, :, ::2]  # (2, 2, 8, 2)
    u0, v0 = torch.rand(2, 1, 8, 1, dtype=torch.float64), torch.rand(2, 2, 1, dtype=torch.float64)
    compare(fk.nmf, (matrices, u0, v0), rel, num_iters=2)
    gradients = []
    for backend in ("reference", "triton"):
        leaf = matrices.clone().requires_grad_()
        with fk.use_backend(backend):
            fk.nmf(leaf, u0, v0, num_iters=2).sum().backward()
        gradients.append(leaf.grad)
    assert rel(gradients[1], gradients[0]) < 1e-11


@pytest.mark.parametrize("long", [False, True], ids=["on chip", "passes"])
def test_bitwise_the_same_again(long, request, rel):
    if long:
        request.getfixturevalue("small_blocks")
    inputs = draw((2,), 4, 20, 2, torch.float32)
    options = {"solver": "mu", "num_iters": 2}
    losses, first = compare(fk.nmf, inputs, rel, **options)
    second = grads_of("triton", fk.nmf, inputs, losses, options)
    for a, b in zip(first.values + first.gradients, second.values + second.gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype, rel):
    torch.manual_seed(3)
    x = torch.randn(1, 4, 4, 8).to(dtype)
    x[:, :, :, :4] = -1  # an empty window
    factors = torch.rand(4, 1), torch.rand(16, 1)
    options = {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}
    compare(fk.swin_nmf, (x, *factors), rel, num_iters=2, **options)
    compare(fk.nmf, draw((), 5, 12, 2, dtype), rel, num_iters=3)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("long", [False, True], ids=["on chip", "passes"])
def test_half_precision_over_three_shifts(long, rank, request, rel):
    """Their shares of dx are summed in float32, and the last launch writes dx in its own dtype."""
    if long:
        request.getfixturevalue("small_blocks")
    torch.manual_seed(4)
    x, factors = torch.rand(1, 4, 4, 16).to(torch.bfloat16), (torch.rand(4, rank), torch.rand(32, rank))
    options = {"head_dim": 4, "patch_size": (4, 8), "shifts": [None, 2, (1, 3)]}
    compare(fk.swin_nmf, (x, *factors), rel, num_iters=2, **options)


def test_dead_components_stay_finite():
    """Zero matrices, zero columns, components that die: finite, nonnegative values, finite gradients."""
    torch.manual_seed(4)
    x = torch.rand(3, 4, 12)
    x[0] = 0
    x[1, :, ::2] = 0
    x[2] = x[2, :1].clone()
    for solver in ("mu", "hals"):
        leaves = [t.requires_grad_() for t in (x.clone(), torch.rand(4, 3), torch.rand(12, 3))]
        with fk.use_backend("triton"):
            y = fk.nmf(*leaves, solver=solver, num_iters=3)
            y.sum().backward()
        assert (y >= 0).all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_finite_differences(rank, solver):
    """The gradient along a direction, against central differences in float64."""
    torch.manual_seed(5)
    inputs = torch.rand(1, 4, 4, 4, dtype=torch.float64), *draw((), 4, 16, rank)[1:]
    directions = [torch.randn_like(t.new_zeros(t.shape)) * 0.1 for t in inputs]
    options = {"head_dim": 4, "patch_size": 4, "shifts": [None, 1], "solver": solver, "num_iters": 2}
    dy = torch.randn(inputs[0].shape, dtype=torch.float64)

    def along(step):
        moved = [t + step * d for t, d in zip(inputs, directions, strict=True)]
        with fk.use_backend("triton"):
            return (fk.swin_nmf(*moved, **options) * dy).sum()

    gradients = grads_of("triton", fk.swin_nmf, inputs, [dy], options).gradients
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    step = 1e-5
    torch.testing.assert_close(slope, (along(step) - along(-step)) / (2 * step), rtol=1e-6, atol=1e-8)


def test_empty():
    with fk.use_backend("triton"):
        assert fk.nmf(torch.rand(0, 4, 5), torch.rand(4, 1), torch.rand(5, 1)).shape == (0, 4, 5)
        x = torch.rand(0, 4, 4, 4)
        y = fk.swin_nmf(x, torch.rand(4, 1), torch.rand(16, 1), head_dim=4, patch_size=4)
        assert y.shape == x.shape


def test_only_by_choice():
    """The interpreter never takes a CPU tensor unless it was asked for."""
    from factorizer_kernels.choice import choose

    assert choose("nmf", torch.rand(2, 2)) != "triton"
    with fk.use_backend("triton"):
        assert choose("nmf", torch.rand(2, 2)) == "triton"


def test_more_iterations_than_the_identity_keeps(rel):
    options = {"head_dim": 4, "patch_size": 16, "num_iters": 257, "num_grad_steps": 2}
    torch.manual_seed(0)
    compare(fk.swin_nmf, (torch.randn(1, 4, 16), torch.rand(4, 1), torch.rand(16, 1)), rel, **options)


@pytest.mark.parametrize(
    ("rows", "columns", "rank", "relu", "num_iters", "kernels"),
    [
        (8, 512, 1, True, 5, "resident_rank1"), (16, 512, 1, True, 5, "resident_rank1"),
        (12, 64, 1, True, 5, "resident"), (8, 512, 1, False, 5, "resident"), (8, 512, 2, True, 5, "resident"),
        (8, 2**21, 1, True, 256, "streaming_rank1"),
        (8, 2**21, 1, True, 257, "streaming"), (8, 2**21, 1, False, 5, "streaming"),
        (8, 2**21, 4, True, 5, "streaming"), (8, 512, 9, True, 5, "sweep"), (512, 4096, 2, True, 5, "sweep"),
    ],
)  # fmt: skip
def test_paths(rows, columns, rank, relu, num_iters, kernels):
    shifts, eps = ((0, 0, 0),), 1e-16
    one = problem.Problem(rows, (1, 1, columns), shifts, rank, True, eps, relu, num_iters, num_iters)
    assert kernels_for(one).__name__.rsplit(".", 1)[-1] == kernels
