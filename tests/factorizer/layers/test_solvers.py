"""The solvers: errors that never rise, published formulas, gradients."""

import pytest
import torch

from factorizer import NMF, MatrixFactorization
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
