"""Matrix factorisation as a layer: solvers, inits, the rank rule, and what it refuses."""

import inspect

import numpy as np
import pytest
import torch

from factorizer import NMF, MatrixFactorization, set_num_iters, set_rank
from factorizer.layers.factorization.solvers import (
    HALS,
    SOLVERS,
    FastMultiplicativeUpdate,
    MultiplicativeUpdate,
    Solver,
)


def problem(*size, nonnegative=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x.abs() if nonnegative else x


def losses(module, x, steps, w=None):
    """The error after every iteration, from the same start."""
    errors = []
    for num_iters in range(steps + 1):
        module.num_iters = num_iters
        errors.append(module.loss(x, *module.decompose(x, w), w))
    return torch.stack(errors)


# --- the layer -----------------------------------------------------------------------------------


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


# --- solvers -------------------------------------------------------------------------------------


# nnls is missing: a projection of the least-squares solution may raise the error.
@pytest.mark.parametrize("solver", ["ls", "cd", "hals", "nncd", "mu", "fmu", "wmu", "smu"])
@pytest.mark.parametrize("suffix", ["", "-0", "-1"])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_never_rises(solver, suffix, rank):
    torch.manual_seed(0)
    module = NMF((8, 20), rank=rank, solver=solver + suffix).double()
    errors = losses(module, problem(6, 8, 20), 8)
    assert (errors.diff(dim=0) <= 1e-12).all()
    assert (errors[-1] < 0.999 * errors[0]).all()


@pytest.mark.parametrize("solver", ["ls", "cd", "smu"])
def test_the_error_never_rises_for_matrices_of_any_sign(solver):
    torch.manual_seed(0)
    module = NMF((8, 20), rank=3, solver=solver).double()
    errors = losses(module, problem(6, 8, 20, nonnegative=False), 8)
    assert (errors.diff(dim=0) <= 1e-12).all()


def test_the_weighted_error_never_rises():
    torch.manual_seed(0)
    module = NMF((8, 20), rank=3, solver="wmu").double()
    w = (problem(6, 8, 20, seed=1) > 0.5).double()
    errors = losses(module, problem(6, 8, 20), 20, w)
    assert (errors.diff(dim=0) <= 1e-12).all()
    # Entries of weight zero are not looked at.
    x, spoilt = problem(6, 8, 20), problem(6, 8, 20)
    spoilt[w == 0] = 99
    torch.testing.assert_close(module.decompose(x, w), module.decompose(spoilt, w))


@pytest.mark.parametrize("solver", ["nnls", "hals", "nncd", "mu", "fmu", "wmu", "smu"])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_factors_are_nonnegative(solver, nonnegative):
    if solver in ("mu", "fmu", "wmu") and not nonnegative:
        return  # these want nonnegative matrices
    torch.manual_seed(0)
    module = NMF((8, 20), rank=3, solver=solver).double()
    u, v = module.decompose(problem(6, 8, 20, nonnegative=nonnegative))
    assert u.min() >= 0
    assert v.min() >= 0


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_one_factor_only(solver):
    torch.manual_seed(0)
    x = problem(2, 6, 9)
    both = NMF((6, 9), rank=2, num_iters=1, solver=solver).double()
    for factor in (0, 1):
        one = NMF((6, 9), rank=2, num_iters=1, solver=f"{solver}-{factor}").double()
        one.load_state_dict(both.state_dict())
        result, start = one.decompose(x), (both.init.u0, both.init.v0)
        other = 1 - factor
        assert torch.equal(result[other], start[other].expand_as(result[other]))
        assert not torch.equal(result[factor], start[factor].expand_as(result[factor]))
    # U first, then V with the new U.
    u, _ = (one := NMF((6, 9), 2, num_iters=1, solver=f"{solver}-0").double()).decompose(
        x, start=(both.init.u0, both.init.v0)
    )
    one = NMF((6, 9), 2, num_iters=1, solver=f"{solver}-1").double()
    torch.testing.assert_close(one.decompose(x, start=(u, both.init.v0)), both.decompose(x))


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_a_sequence_of_halves_is_the_whole(solver):
    torch.manual_seed(0)
    x = problem(2, 6, 9)
    whole = NMF((6, 9), rank=2, solver=solver).double()
    halves = NMF((6, 9), rank=2, solver=(f"{solver}-0", f"{solver}-1")).double()
    halves.load_state_dict(whole.state_dict())
    torch.testing.assert_close(halves(x), whole(x))


@pytest.mark.parametrize("rank", [1, 2])
def test_least_squares_solve_the_least_squares_problem(rank, rel):
    x, v = problem(5, 6, 9, nonnegative=False), problem(5, 9, rank, nonnegative=False)
    expected = torch.linalg.lstsq(v, x.mT).solution.mT
    start = (torch.zeros(5, 6, rank).double(), v)
    u, _ = NMF((6, 9), rank, num_iters=1, solver="ls-0").decompose(x, start=start)
    assert rel(u, expected) < 1e-12
    u, _ = NMF((6, 9), rank, num_iters=1, solver="nnls-0").decompose(x, start=start)
    assert rel(u, expected.relu()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_squares_survive_a_rank_deficient_factor(dtype):
    x = problem(3, 6, 9, nonnegative=False).to(dtype)
    x[2] = 0
    column = torch.rand(9, 1, dtype=dtype)
    v = column.expand(9, 2)
    best = (x @ column) / column.square().sum()
    solver = NMF((6, 9), 2, num_iters=1, solver="ls-0")
    u, _ = solver.decompose(x, start=(torch.zeros(6, 2, dtype=dtype), v))
    # The two columns share the solution; what they miss by is the ridge, some rounding errors.
    torch.testing.assert_close(u.sum(-1, keepdim=True), best, rtol=0, atol=300 * torch.finfo(dtype).eps)
    u, _ = solver.decompose(x, start=(torch.zeros(6, 2, dtype=dtype), torch.zeros(9, 2, dtype=dtype)))
    assert u.isfinite().all()


def test_least_squares_reach_the_best_approximation(rel):
    torch.manual_seed(0)
    x = problem(4, 6, 30, nonnegative=False)
    module = MatrixFactorization((6, 30), 2, num_iters=300, solver="ls").double()
    assert rel(module(x), MatrixFactorization((6, 30), 2, num_iters=0, init="svd")(x)) < 1e-6


def test_coordinate_descent_leaves_no_slope_along_the_last_column():
    x = problem(5, 6, 9, nonnegative=False)
    start = problem(5, 6, 3, nonnegative=False), problem(5, 9, 3, nonnegative=False)
    u, v = NMF((6, 9), 3, num_iters=1, solver="cd-0").decompose(x, start=start)
    slope = (u @ (v.mT @ v) - x @ v)[..., -1]
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("x", [problem(2, 6, 9)])
def test_relatives_of_mu(x):
    torch.manual_seed(0)
    mu = NMF((6, 9), rank=2, num_iters=3, solver="mu").double()
    for solver, w in (
        ((FastMultiplicativeUpdate, {"num_inner": 1}), None),
        ("wmu", None),
        ("wmu", torch.ones_like(x)),
        (MultiplicativeUpdate, None),
        ((MultiplicativeUpdate, {"factor": [0, 1]}), None),
    ):
        other = NMF((6, 9), rank=2, num_iters=3, solver=solver).double()
        other.load_state_dict(mu.state_dict())
        torch.testing.assert_close(other(x, w), mu(x))
    # Several inner updates of one factor are several iterations of it alone.
    slow = NMF((6, 9), 2, num_iters=3, solver="mu-0").double()
    fast = NMF((6, 9), 2, num_iters=1, solver=(FastMultiplicativeUpdate, {"factor": 0})).double()
    fast.load_state_dict(slow.state_dict())
    torch.testing.assert_close(fast(x), slow(x))


def test_semi_mu_is_the_published_formula():
    x, u, v = (problem(*s, nonnegative=n) for s, n in (((5, 6), 0), ((5, 2), 1), ((6, 2), 0)))
    a, b = x @ v, v.T @ v
    parts = [((m.abs() + m) / 2, (m.abs() - m) / 2) for m in (a, b)]
    (a_plus, a_minus), (b_plus, b_minus) = parts
    expected = u * ((a_plus + u @ b_minus) / (a_minus + u @ b_plus)).sqrt()
    got, _ = NMF((5, 6), 2, num_iters=1, solver="smu-0").decompose(x, start=(u, v))
    torch.testing.assert_close(got, expected)


def test_zero_stays_zero_under_mu(backend, published_mu):
    """A column of zeros: its factor is zero and stays so, where published MU lets it jump to 1."""
    torch.manual_seed(0)
    x = problem(1, 4, 6)
    x[..., 2] = 0
    x.requires_grad_()
    module = NMF((4, 6), solver="mu").double()
    for num_iters in (1, 2, 3, 4, 5):
        module.num_iters = num_iters
        _, v = module.decompose(x)
        assert v[0, 2, 0] == 0
        (gradient,) = torch.autograd.grad(module(x).sum(), x)
        assert gradient.abs().max() < 1e3
    published = NMF((4, 6), solver=published_mu, num_iters=4).double()
    assert published.decompose(x)[1][0, 2, 0] > 0.1  # what the test would miss if it saw nothing


def test_mu_is_the_published_one_where_no_column_is_zero(backend, rel, published_mu):
    torch.manual_seed(0)
    ours = NMF((4, 6), rank=2, solver="mu").double()
    published = NMF((4, 6), rank=2, solver=published_mu).double()
    published.load_state_dict(ours.state_dict())
    x = problem(7, 4, 6) + 0.1
    assert rel(ours(x), published(x)) < 1e-13


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_gradients_of_all_solvers(solver):
    torch.manual_seed(0)
    module = NMF((3, 4), rank=2, num_iters=2, solver=solver).double()
    x = (problem(3, 4) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(module, x)


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_zeros_give_no_nan(solver, backend):
    torch.manual_seed(0)
    x = torch.zeros(2, 4, 6)
    x[0, 1] = torch.rand(6)
    x.requires_grad_()
    module = NMF((4, 6), rank=2, solver=solver)
    y = module(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


def test_solvers_of_ones_own():
    class Halve(Solver):
        def update(self, x, u, v, w):
            return u / 2

    torch.manual_seed(0)
    module = NMF((4, 6), rank=2, num_iters=3, solver=(Halve, HALS))
    assert module.kernel_options is None
    u, v = NMF((4, 6), rank=2, num_iters=3, solver=Halve).decompose(torch.rand(4, 6))
    assert u.shape == (4, 2)
    assert v.max() < 1 / 8


def test_which_solvers_run_on_the_kernels():
    def kernel(solver):
        options = NMF((4, 6), solver=solver).kernel_options
        return options and (options["solver"], options["eps"])

    assert kernel("hals") == kernel("nncd") == kernel(HALS) == kernel(["hals"]) == ("hals", 1e-16)
    assert kernel((MultiplicativeUpdate, {"eps": 1e-8})) == ("mu", 1e-8)
    for solver in ("hals-0", ("hals", "mu"), "cd", "fmu", (HALS, {"factor": (1, 0)})):
        assert kernel(solver) is None


# --- inits ---------------------------------------------------------------------------------------


def test_draws():
    torch.manual_seed(0)
    uniform = NMF((50, 60), 4).init
    assert 0 <= uniform.u0.min() < 0.1
    assert 0.9 < uniform.v0.max() < 1
    normal = NMF((50, 60), 4, init="normal").init
    assert normal.u0.min() < -1
    assert normal.v0.std() == pytest.approx(1, abs=0.2)
    mixed = NMF((50, 60), 4, init=("normal", "uniform")).init
    assert mixed.u0.min() < -1
    assert mixed.v0.min() >= 0


def test_svd_is_the_best_approximation_and_is_no_buffer():
    x = problem(3, 6, 9, nonnegative=False)
    module = MatrixFactorization((6, 9), rank=2, num_iters=0, init="svd")
    singular = torch.linalg.svdvals(x)
    error = singular[:, 2:].norm(dim=1) / singular.norm(dim=1)
    torch.testing.assert_close(module.loss(x, *module.decompose(x)), error)
    assert not module.state_dict()


def test_nndsvd_is_the_published_algorithm(rel):
    x = problem(6, 9)
    u, s, vt = np.linalg.svd(x.numpy())
    expected_u, expected_v = np.zeros((6, 4)), np.zeros((9, 4))
    for j in range(4):
        a, b = u[:, j], vt[j]
        halves = [(np.maximum(sign * a, 0), np.maximum(sign * b, 0)) for sign in (1, -1)]
        p, q = max(halves, key=lambda h: np.linalg.norm(h[0]) * np.linalg.norm(h[1]))
        norms = np.linalg.norm(p), np.linalg.norm(q)
        scale = np.sqrt(s[j] * norms[0] * norms[1])
        expected_u[:, j], expected_v[:, j] = scale * p / norms[0], scale * q / norms[1]
    got = NMF((6, 9), rank=4, num_iters=0, init="nndsvd").decompose(x)
    assert rel(got[0], torch.from_numpy(expected_u)) < 1e-12
    assert rel(got[1], torch.from_numpy(expected_v)) < 1e-12


@pytest.mark.parametrize("init", ["uniform", "normal", ("uniform", "normal"), "svd", "nndsvd"])
@pytest.mark.parametrize("solver", ["hals", "cd", "ls"])
def test_every_init_converges_to_a_good_approximation(init, solver):
    torch.manual_seed(0)
    x = problem(3, 8, 2) @ problem(3, 2, 12, seed=1)
    module = MatrixFactorization((8, 12), 2, init=init, solver=solver, num_iters=300).double()
    assert module.loss(x, *module.decompose(x)).max() < 0.02


@pytest.mark.parametrize("init", ["svd", "nndsvd"])
def test_inits_from_the_matrices(init, backend):
    x = problem(3, 4, 5).float()
    x[0] = 0
    x.requires_grad_()
    module = NMF((4, 5), rank=2, init=init)
    module(x).sum().backward()
    assert x.grad.isfinite().all()
    # They are made for each matrix, so other sizes do as well.
    assert module(torch.rand(2, 6, 7)).shape == (2, 6, 7)
    assert module.half()(torch.rand(2, 4, 5).half()).isfinite().all()


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: NMF(4), TypeError, "size must be a sequence of ints, got 4"),
        (lambda: NMF((4, 5, 6)), ValueError, "size must have 2 entries"),
        (lambda: NMF((4, 0)), ValueError, r"size\[1\] must be at least 1, got 0"),
        (lambda: NMF((4, 5), rank=0), ValueError, "rank must be at least 1, got 0"),
        (lambda: NMF((4, 5), rank=1.5), TypeError, "rank must be an int, got 1.5"),
        (lambda: NMF((4, 5), rank=True), TypeError, "rank must be an int, got True"),
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
