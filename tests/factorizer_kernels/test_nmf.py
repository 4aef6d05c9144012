"""nmf and nmf_factors: golden cases, backends against the reference, gradients, edges, properties."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import away_from_dead_components, grads_of

import factorizer_kernels as fk
from factorizer_kernels.choice import choose
from factorizer_kernels.ops.nmf.spec import MatrixSizes

# (batch, M, N): odd, tiny, one row, one column, beyond one vector, beyond the cache (long tiles).
SHAPES = [
    ((), 1, 1), ((2,), 1, 7), ((2,), 7, 1), ((3,), 8, 64), ((2, 3), 5, 33), ((2,), 16, 16), ((), 33, 20),
    ((2,), 48, 130), ((2,), 8, 16411), ((1,), 300, 257),
]  # fmt: skip


@pytest.mark.golden_kind("nmf")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_golden(golden, backend, dtype, rel):
    # float32: 2e-5 is some hundred roundings; HALS gradients are conditioned a hundred times worse.
    value_tol, grad_tol = (1e-9, 1e-8) if dtype == torch.float64 else (2e-5, 2e-3)
    meta = golden["meta"]
    options = {k: meta[k] for k in ("num_iters", "solver", "num_grad_steps", "eps")}
    x, u0, v0 = (golden[k].to(dtype) for k in ("x", "u0", "v0"))
    x.requires_grad_()
    y = fk.nmf(x, u0, v0, **options)
    u, v = fk.nmf_factors(x, u0, v0, **options)
    assert rel(y, golden["y"]) < value_tol
    assert rel(u, golden["u"]) < value_tol
    assert rel(v, golden["v"]) < value_tol
    if meta["num_iters"] > 0:
        (dx,) = torch.autograd.grad(y, x, golden["dy"].to(dtype))
        assert rel(dx, golden["dx"]) < grad_tol


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_cpu_meets_reference(shape, rank, solver, poisoned, rel):
    """Values and all gradients in float64; the draws' reference result is stable under a perturbation."""
    batch, rows, columns = shape
    rank = min(rank, rows, columns)  # components beyond the matrix' rank die, see docs/numerics.md
    torch.manual_seed(rows * columns + rank)
    x = torch.rand(*batch, rows, columns, dtype=torch.float64)
    u0, v0 = (
        torch.rand(rows, rank, dtype=torch.float64),
        torch.rand(columns, rank, dtype=torch.float64),
    )
    dy = torch.randn_like(x.nan_to_num())
    du = torch.randn(*batch, rows, rank, dtype=torch.float64)
    dv = torch.randn(*batch, columns, rank, dtype=torch.float64)
    for num_grad_steps in (None, 1, 2):
        options = {"solver": solver, "num_iters": 4, "num_grad_steps": num_grad_steps}
        for function, losses in ((fk.nmf, (dy,)), (fk.nmf_factors, (du, dv))):
            expected = grads_of("reference", function, (x, u0, v0), losses, options)
            assert away_from_dead_components(expected, function, (x, u0, v0), losses, options)
            result = grads_of("cpu", function, (x, u0, v0), losses, options)
            scale = expected.gradients[0].norm()
            for ours, theirs in zip(result.values, expected.values, strict=True):
                assert rel(ours, theirs) < 1e-10
            for ours, theirs in zip(result.gradients, expected.gradients, strict=True):
                # A gradient that vanishes up to rounding (u0's at rank 1) is compared on dx's scale.
                assert (ours - theirs).norm() < 1e-8 * max(theirs.norm(), scale)


@pytest.mark.parametrize("rank", [4, 8, 9, 17, 64])
@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_ranks(rank, solver, rel):
    """Compile-time ranks and the general path, from a start where no component dies."""
    torch.manual_seed(rank)
    u, v = torch.rand(80, rank, dtype=torch.float64), torch.rand(96, rank, dtype=torch.float64)
    x = u @ v.mT + 0.1 * torch.rand(2, 80, 96, dtype=torch.float64)
    u0, v0 = (f * (0.8 + 0.4 * torch.rand_like(f)) for f in (u, v))
    options = {"solver": solver, "num_iters": 3}
    dy = torch.randn_like(x)
    expected = grads_of("reference", fk.nmf, (x, u0, v0), (dy,), options)
    assert away_from_dead_components(expected, fk.nmf, (x, u0, v0), (dy,), options)
    result = grads_of("cpu", fk.nmf, (x, u0, v0), (dy,), options)
    assert rel(result.values[0], expected.values[0]) < 1e-9
    scale = expected.gradients[0].norm()
    for ours, theirs in zip(result.gradients, expected.gradients, strict=True):
        assert (ours - theirs).norm() < 1e-8 * max(theirs.norm(), scale)


@pytest.mark.parametrize("u_batch", [(), (3,), (2, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("v_batch", [(), (2, 3)], ids=str)
def test_factors_broadcast(u_batch, v_batch, rel):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6, 20, dtype=torch.float64)
    u0 = torch.rand(*u_batch, 6, 2, dtype=torch.float64)
    v0 = torch.rand(*v_batch, 20, 2, dtype=torch.float64)
    dy = torch.randn_like(x)
    expected = grads_of("reference", fk.nmf, (x, u0, v0), (dy,), {"solver": "mu"})
    result = grads_of("cpu", fk.nmf, (x, u0, v0), (dy,), {"solver": "mu"})
    assert rel(result.values[0], expected.values[0]) < 1e-12
    for ours, theirs in zip(result.gradients, expected.gradients, strict=True):
        assert rel(ours, theirs) < 1e-9


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_gradcheck(solver, rank, backend):
    torch.manual_seed(rank)
    x = (torch.rand(2, 4, 6, dtype=torch.float64) + 0.2).requires_grad_()
    u0 = (torch.rand(4, rank, dtype=torch.float64) + 0.2).requires_grad_()
    v0 = (torch.rand(6, rank, dtype=torch.float64) + 0.2).requires_grad_()
    options = {"solver": solver, "num_iters": 2}
    assert torch.autograd.gradcheck(lambda *t: fk.nmf(*t, **options), (x, u0, v0))
    assert torch.autograd.gradcheck(lambda *t: fk.nmf_factors(*t, **options), (x, u0, v0))


def test_gradcheck_of_any_sign(backend):
    """HALS on a real x, where the projections act."""
    torch.manual_seed(5)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    u0, v0 = torch.rand(4, 2, dtype=torch.float64), torch.rand(6, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fk.nmf(x, u0, v0, num_iters=2), (x,))


def test_no_gradient_steps(backend):
    x, u0, v0 = (
        torch.rand(4, 6, requires_grad=True),
        torch.rand(4, 1),
        torch.rand(6, 1, requires_grad=True),
    )
    assert not fk.nmf(x, u0, v0, num_grad_steps=0).requires_grad
    # Without iterations there is nothing to leave out: u0 v0ᵀ is differentiated.
    (dv0,) = torch.autograd.grad(fk.nmf(x, u0, v0, num_iters=0, num_grad_steps=0).sum(), v0)
    torch.testing.assert_close(dv0, u0.sum().expand_as(v0))


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [1, 2])
def test_operator_without_gradient_steps(solver, rank):
    """The operator itself, which autograd does not call then: every factor is a constant."""
    x, u0, v0 = torch.rand(2, 4, 6), torch.rand(4, rank), torch.rand(6, rank)
    gradients = torch.ops.factorizer_kernels.nmf_backward(x, x, u0, v0, True, 2, solver, 0, 1e-16, "cpu")
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("shape", [(0, 8, 16), (2, 0, 3, 4), (2, 8, 0), (0, 0)], ids=str)
def test_empty(shape, solver, backend):
    x = torch.rand(shape, requires_grad=True)
    rows, columns = shape[-2:]
    u0, v0 = torch.rand(rows, 2, requires_grad=True), torch.rand(columns, 2, requires_grad=True)
    y = fk.nmf(x, u0, v0, solver=solver)
    assert y.shape == shape
    y.sum().backward()
    for tensor in (x, u0, v0):
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.isfinite().all()


def _layouts(x):
    """The same numbers at other addresses: permuted, with gaps, reversed storage order, expanded."""
    yield "transposed", x.mT.contiguous().mT
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    padded[..., ::2] = x
    yield "every second", padded[..., ::2]
    offset = torch.full((x.numel() + 5,), float("nan"), dtype=x.dtype)
    offset[5:] = x.flatten()
    yield "offset", offset[5:].view(x.shape)
    yield "batch last", x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("rank", [1, 3])
def test_layouts(rank, backend, rel):
    torch.manual_seed(0)
    x, dy = torch.rand(4, 6, 40, dtype=torch.float64), torch.randn(4, 6, 40, dtype=torch.float64)
    u0, v0 = torch.rand(6, rank, dtype=torch.float64), torch.rand(40, rank, dtype=torch.float64)
    expected = grads_of("reference", fk.nmf, (x, u0, v0), (dy,), {})
    for name, same_x in _layouts(x):
        for _, same_dy in _layouts(dy):
            leaf = same_x.detach().requires_grad_()
            y = fk.nmf(leaf, u0, v0)
            (dx,) = torch.autograd.grad(y, leaf, same_dy)
            assert rel(y, expected.values[0]) < 1e-12, name
            assert rel(dx, expected.gradients[0]) < 1e-10, name


@pytest.mark.parametrize(
    ("solver", "rank", "num_iters", "requires_grad", "chosen"),
    [
        ("mu", 9, 1, False, "reference"), ("mu", 8, 1, False, "cpu"), ("hals", 9, 1, False, "cpu"),
        ("mu", 96, 2, False, "cpu"), ("mu", 96, 2, True, "reference"), ("mu", 96, 3, True, "cpu"),
    ],
)  # fmt: skip
def test_the_open_choice_leaves_few_iterations_to_plain_pytorch(
    solver, rank, num_iters, requires_grad, chosen
):
    """It is faster there; who asks for the kernels by name gets them."""
    x, sizes = torch.rand(8, 16, requires_grad=requires_grad), MatrixSizes(8, 16, rank, 1, num_iters, solver)
    for operator in ("nmf", "nmf_factors"):
        assert choose(operator, x, sizes) == chosen
        with fk.use_backend("cpu"):
            assert choose(operator, x, sizes) == "cpu"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_half_precision(dtype, tolerance, solver, backend, rel):
    """Rounding of input and output only: half an ulp is 2e-3 (bfloat16) and 2.4e-4 (float16)."""
    torch.manual_seed(0)
    x = torch.rand(3, 8, 64).to(dtype)
    x[1] = 0  # eps would round to zero in half precision
    u0, v0 = torch.rand(8, 2), torch.rand(64, 2)
    with fk.use_backend("reference"):
        expected = fk.nmf(x.double(), u0, v0, solver=solver)
    leaf = x.clone().requires_grad_()
    y = fk.nmf(leaf, u0, v0, solver=solver)
    assert y.dtype == dtype
    assert rel(y, expected) < tolerance
    y.float().square().sum().backward()
    assert leaf.grad.dtype == dtype
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_arithmetic_alone(dtype, backend):
    torch.manual_seed(0)
    x, u0, v0 = torch.rand(3, 8, 64), torch.rand(8, 2), torch.rand(64, 2)
    x[0] = 0
    expected = fk.nmf(x, u0, v0)
    with torch.autocast("cpu", dtype):
        assert torch.equal(fk.nmf(x, u0, v0), expected)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_zero_windows_columns_and_rows(solver, rank, backend):
    torch.manual_seed(0)
    x = torch.rand(4, 8, 32)
    x[0] = 0
    x[1, :, 5:9] = 0
    x[2, 3] = 0
    x[3] = 0
    x[3, 2, 7] = 1.0
    x.requires_grad_()
    y = fk.nmf(x, torch.rand(8, rank), torch.rand(32, rank), solver=solver)
    assert y.isfinite().all()
    assert (y >= 0).all()
    assert y[0].abs().max() < 1e-12
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_tiny_values_meet_reference(solver, rel):
    """Where eps is of the order of the sums, the rank-1 identity must give way or carry eps exactly."""
    torch.manual_seed(0)
    u0, v0 = torch.rand(8, 1, dtype=torch.float64), torch.rand(64, 1, dtype=torch.float64)
    for scale in (1e-3, 1e-6, 1e-8, 1e-10, 1e-14):
        x = scale * torch.rand(2, 8, 64, dtype=torch.float64)
        dy = torch.randn_like(x)
        expected = grads_of("reference", fk.nmf, (x, u0, v0), (dy,), {"solver": solver})
        result = grads_of("cpu", fk.nmf, (x, u0, v0), (dy,), {"solver": solver})
        assert rel(result.values[0], expected.values[0]) < 1e-9, scale
        assert rel(result.gradients[0], expected.gradients[0]) < 1e-8, scale


def test_spoiled_matrix_spoils_no_other(backend):
    torch.manual_seed(0)
    x = torch.rand(4, 8, 32)
    u0, v0 = torch.rand(8, 1), torch.rand(32, 1)
    clean = fk.nmf(x, u0, v0)
    x[1, 0, 0], x[2, 3, 4] = float("nan"), float("inf")
    spoiled = fk.nmf(x, u0, v0)
    torch.testing.assert_close(spoiled[[0, 3]], clean[[0, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 8, 512), (2, 8, 200_000)], ids=str)
@pytest.mark.parametrize("rank", [1, 2])
def test_same_bits_for_any_number_of_threads(shape, rank):
    torch.manual_seed(0)
    x, dy = torch.rand(shape), torch.randn(shape)
    u0, v0 = torch.rand(shape[-2], rank), torch.rand(shape[-1], rank)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = grads_of("cpu", fk.nmf, (x, u0, v0), (dy,), {})
            results.append((*result.values, *result.gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


MATRICES = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**31))


@settings(deadline=None, max_examples=40)
@given(MATRICES)
def test_mu_objective_never_rises(case):
    rows, columns, rank, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, u, v = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in
               ((rows, columns), (rows, rank), (columns, rank)))  # fmt: skip
    losses = [(x - fk.nmf(x, u, v, num_iters=t, solver="mu")).norm().item() for t in range(6)]
    for before, after in pairwise(losses):
        assert after <= before + 1e-12 * x.norm().item()


@settings(deadline=None, max_examples=40)
@given(MATRICES, st.sampled_from(["mu", "hals"]), st.booleans())
def test_factors_are_nonnegative_and_make_y(case, solver, signed):
    rows, columns, rank, seed = case
    generator = torch.Generator().manual_seed(seed)
    x, u0, v0 = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in
                 ((2, rows, columns), (rows, rank), (columns, rank)))  # fmt: skip
    if signed and solver == "hals":
        x = x - 0.5
    u, v = fk.nmf_factors(x, u0, v0, solver=solver)
    assert (u >= 0).all()
    assert (v >= 0).all()
    y = fk.nmf(x, u0, v0, solver=solver)
    torch.testing.assert_close(y, u @ v.mT, rtol=1e-10, atol=1e-13)
