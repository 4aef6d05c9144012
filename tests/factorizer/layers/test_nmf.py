"""Matrix factorisation as a layer: the rank rule, iterations, dtypes, and what it refuses."""

import inspect

import pytest
import torch

from factorizer import NMF, MatrixFactorization, set_num_iters, set_rank
from factorizer.layers.factorization.solvers import (
    HALS,
    SOLVERS,
)


def problem(*size, nonnegative=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x.abs() if nonnegative else x


@pytest.mark.golden_kind("nmf")
def test_golden(golden, backend, rel):
    meta = golden["meta"]
    solver = (SOLVERS[meta["solver"]], {"eps": meta["eps"]})
    keywords = {k: meta[k] for k in ("rank", "num_iters", "num_grad_steps")}
    module = NMF(golden["x"].shape[-2:], solver=solver, **keywords).double()
    module.load_state_dict({"init.u0": golden["u0"], "init.v0": golden["v0"]}, strict=True)
    x = golden["x"].requires_grad_()
    y = module(x)
    if meta["num_iters"]:  # else y does not depend on x
        y.backward(golden["dy"])
        assert rel(x.grad, golden["dx"]) < 1e-8
    u, v = module.decompose(x)
    assert rel(y, golden["y"]) < 1e-9
    assert rel(u, golden["u"]) < 1e-9
    assert rel(v, golden["v"]) < 1e-9
    assert rel(module.reconstruct(u, v), golden["y"]) < 1e-9


@pytest.mark.parametrize("cls", [NMF, MatrixFactorization])
def test_arguments_are_the_published_ones(cls):
    nmf = cls is NMF
    expected = {
        "size": inspect.Parameter.empty,
        "rank": None,
        "compression": 10,
        "num_iters": 5,
        "num_grad_steps": None,
        "init": "uniform" if nmf else "normal",
        "solver": "hals" if nmf else "cd",
        "verbose": False,
    }
    parameters = inspect.signature(cls).parameters
    assert {name: p.default for name, p in parameters.items()} == expected


@pytest.mark.parametrize(
    ("size", "compression", "rank"),
    [((8, 512), 10, 1), ((8, 2**21), 10, 1), ((64, 64), 10, 4), ((64, 64), 1, 32), ((2, 2), 99, 1)],
)
def test_rank_rule(size, compression, rank):
    assert MatrixFactorization(size, compression=compression, init="svd").rank == rank
    assert MatrixFactorization(size, rank=2, compression=compression, init="svd").rank == 2


def test_loss_is_the_relative_error_of_each_item():
    module = NMF((3, 4), rank=2)
    x, w = problem(2, 5, 3, 4), problem(2, 5, 3, 4, seed=1)
    u, v = problem(2, 5, 3, 2), problem(2, 5, 4, 2)
    difference = x - u @ v.mT
    plain = [(difference[i].norm() / x[i].norm()).item() for i in range(2)]
    assert module.loss(x, u, v).tolist() == pytest.approx(plain)
    root = w.sqrt()
    weighted = [((root * difference)[i].norm() / (root * x)[i].norm()).item() for i in range(2)]
    assert module.loss(x, u, v, w).tolist() == pytest.approx(weighted)
    assert module.loss(x[0, 0], u[0, 0], v[0, 0]).shape == ()
    zero = torch.zeros(1, 3, 4)
    assert module.loss(zero, torch.zeros(1, 3, 2), torch.zeros(1, 4, 2)).item() == 0


def test_factors_are_kept_in_the_state_dict_and_are_no_parameters():
    module = NMF((8, 64), rank=2)
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == {
        "init.u0": (8, 2),
        "init.v0": (64, 2),
    }
    assert not list(module.parameters())


def test_start_replaces_the_init(backend):
    torch.manual_seed(0)
    module, x = NMF((4, 6), rank=2).double(), problem(3, 4, 6)
    start = torch.rand(4, 2).double(), torch.rand(6, 2).double()
    expected = NMF((4, 6), rank=2).double()
    expected.init.u0, expected.init.v0 = start
    torch.testing.assert_close(module(x, start=start), expected(x))
    # Ten iterations are five and another five.
    module.num_iters = 10
    once = module.decompose(x)
    module.num_iters = 5
    twice = module.decompose(x, start=module.decompose(x))
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("solver", ["hals", "mu", "cd", "smu", ("hals-0", "mu-1")])
def test_only_the_last_steps_are_differentiated(solver, rel):
    x = problem(2, 6, 9).requires_grad_()
    module = NMF((6, 9), rank=2, num_iters=5, num_grad_steps=2, solver=solver).double()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    module.num_iters = 3
    with torch.no_grad():
        start = module.decompose(x)
    module.num_iters, module.num_grad_steps = 2, None
    (expected,) = torch.autograd.grad(module(x, start=start).square().sum(), x)
    assert rel(gradient, expected) < 1e-12


def test_set_num_iters_reaches_every_factorisation():
    network = torch.nn.Sequential(NMF((4, 6)), torch.nn.Sequential(MatrixFactorization((4, 6))))
    set_num_iters(network, 2)
    assert [network[0].num_iters, network[1][0].num_iters] == [2, 2]
    with pytest.raises(ValueError, match="num_iters must be at least 0, got -1"):
        set_num_iters(network, -1)


def test_verbose_prints_the_error_of_every_iteration(capsys):
    torch.manual_seed(0)
    quiet, loud = NMF((4, 6), num_iters=2), NMF((4, 6), num_iters=2, verbose=True)
    loud.load_state_dict(quiet.state_dict())
    x = problem(1, 4, 6).float()
    torch.testing.assert_close(loud(x), quiet(x))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    text, error = lines[1].rsplit(" ", 1)
    assert text == "iteration 2: relative error"
    assert float(error) == pytest.approx(quiet.loss(x, *quiet.decompose(x)).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", list(SOLVERS))
def test_half_precision_is_computed_in_float32(solver, dtype, backend):
    torch.manual_seed(0)
    module = NMF((4, 6), rank=2, solver=solver)
    x = problem(3, 4, 6).to(dtype)
    x[1] = 0
    x.requires_grad_()
    expected = module(x.float())
    for autocast in (False, True):
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = module(x)
        assert y.dtype == dtype
        assert torch.equal(y, expected.to(dtype))
        (gradient,) = torch.autograd.grad(y.float().sum(), x)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: NMF(4), TypeError, "size must be a sequence of integers, got 4"),
        (lambda: NMF((4, 5, 6)), ValueError, "size must have 2 entries"),
        (lambda: NMF((4, 0)), ValueError, r"size\[1\] must be at least 1, got 0"),
        (lambda: NMF((4, 5), rank=0), ValueError, "rank must be at least 1, got 0"),
        (lambda: NMF((4, 5), rank=1.5), TypeError, "rank must be an integer, got 1.5"),
        (lambda: NMF((4, 5), rank=True), TypeError, "rank must be an integer, got True"),
        (lambda: NMF((4, 5), compression=0), ValueError, "compression must be positive, got 0"),
        (lambda: NMF((4, 5), num_iters=-1), ValueError, "num_iters must be at least 0, got -1"),
        (lambda: NMF((4, 5), num_grad_steps=-1), ValueError, "num_grad_steps must be at least 0"),
        (lambda: NMF((4, 5), init="zeros"), ValueError, "init must be one of .* got 'zeros'"),
        (lambda: NMF((4, 5), init=("uniform", "svd")), ValueError, "init must be one of"),
        (lambda: NMF((4, 5), init=3), TypeError, "init must be .* got 3"),
        (lambda: NMF((4, 5), rank=5, init="svd"), ValueError, "rank must be at most 4 .* got 5"),
        (lambda: NMF((4, 5), solver="als"), ValueError, "solver must be one of ls, .* got 'als'"),
        (lambda: NMF((4, 5), solver="mu-2"), ValueError, "solver must be one of"),
        (lambda: NMF((4, 5), solver="mu-"), ValueError, "solver must be one of"),
        (lambda: NMF((4, 5), solver=3), TypeError, "solver must be a name, a class"),
        (lambda: NMF((4, 5), solver=()), TypeError, "solver must be a name, a class"),
        (lambda: NMF((4, 5), solver=(HALS, {"factor": 2})), ValueError, "factor must be 0, 1"),
        (lambda: NMF((4, 5), solver=(HALS, {"eps": 0})), ValueError, "eps must be positive"),
        (lambda: NMF((4, 5))([[1.0]]), TypeError, "x must be a floating-point tensor, got list"),
        (lambda: NMF((4, 5))(torch.ones(4, 5).int()), TypeError, "got torch.int32"),
        (lambda: NMF((4, 5))(torch.ones(5, 4)), ValueError, r"x must be \(\.\.\., 4, 5\), got"),
        (lambda: NMF((4, 5), init="svd")(torch.ones(5)), ValueError, r"x must be \(\.\.\., 4, 5\)"),
        (
            lambda: NMF((4, 5)).decompose(torch.ones(4, 5), torch.ones(4, 5)),
            ValueError,
            "w must be None for the solvers",
        ),
        (
            lambda: NMF((4, 5), solver="wmu").decompose(torch.ones(4, 5), torch.ones(4)),
            ValueError,
            r"w must have x's shape \(4, 5\), got \(4,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(build_it, error, message):
    with pytest.raises(error, match=message):
        build_it()


def test_set_rank_keeps_the_columns_that_are_there():
    layer = NMF((8, 27), rank=2)
    u0, v0 = layer.init.u0, layer.init.v0
    set_rank(layer, 4)
    assert layer.rank == 4
    assert torch.equal(layer.init.u0[:, :2], u0)
    assert layer.init.v0.shape == (27, 4)
    assert not torch.equal(layer.init.v0[:, 2], layer.init.v0[:, 3])
    again = NMF((8, 27), rank=2)
    again.init.u0, again.init.v0 = u0, v0
    set_rank(again, 4)
    assert torch.equal(again.init.v0, layer.init.v0)
    set_rank(layer, 1)
    assert torch.equal(layer.init.u0, u0[:, :1])
    assert layer(torch.rand(3, 8, 27)).shape == (3, 8, 27)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        set_rank(layer, 0)


def test_set_rank_draws_on_the_cpu_whatever_the_default_device_is():
    layer, same = (NMF((8, 27), rank=2) for _ in range(2))
    same.load_state_dict(layer.state_dict())
    with torch.device("meta"):
        set_rank(layer, 4)
    set_rank(same, 4)
    assert torch.equal(layer.init.v0, same.init.v0)
