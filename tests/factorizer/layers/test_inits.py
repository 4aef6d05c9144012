"""Where a factorisation starts."""

import numpy as np
import pytest
import torch

from factorizer import NMF, MatrixFactorization


def problem(*size, nonnegative=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    return x.abs() if nonnegative else x


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


def test_draws_are_made_anew_in_memory_that_holds_nothing():
    """Those of a module that is built there: as after `to_empty`, of any dtype."""
    torch.manual_seed(0)
    made = NMF((50, 60), 4, init=("normal", "uniform")).init
    torch.manual_seed(0)
    u0, v0 = torch.randn(50, 4), torch.rand(60, 4)
    assert torch.equal(made.u0, u0)
    assert torch.equal(made.v0, v0)
    with torch.device("meta"):
        empty = NMF((50, 60), 4, init=("normal", "uniform")).init
    empty.to_empty(device="cpu")
    torch.manual_seed(0)
    empty.reset_parameters()
    assert torch.equal(empty.u0, u0)
    assert torch.equal(empty.v0, v0)
    empty.bfloat16().reset_parameters()
    assert empty.u0.dtype == torch.bfloat16
