"""sw_matricize and sw_dematricize: golden cases, inverse, adjoint, shift equivariance, layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import factorizer_kernels as fk

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

CASES = [
    ((2, 8, 24), {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}),
    ((1, 6, 15), {"num_heads": 3, "grid_size": 5, "shifts": [-1, 7, 30]}),
    ((2, 8, 12, 20), {"head_dim": 4, "patch_size": (4, 5), "shifts": [None, (1, -2)]}),
    ((1, 3, 5, 7), {"head_dim": 3, "grid_size": 1}),
    ((1, 16, 8, 8, 16), {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}),
    (
        (2, 4, 6, 4, 9),
        {"head_dim": 2, "patch_size": (3, 2, 3), "shifts": [(1, 1, 1), (5, -3, 2), 100]},
    ),
    ((1, 1, 1, 1, 1), {"head_dim": 1, "patch_size": 1}),
    ((0, 4, 8, 8), {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}),
    ((2, 4, 0), {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}),
]


@pytest.mark.golden_kind("matricize")
def test_golden(golden, backend):
    meta = golden["meta"]
    options = {
        k: meta[k] for k in ("head_dim", "num_heads", "patch_size", "grid_size", "shifts") if k in meta
    }
    assert torch.equal(fk.sw_matricize(golden["x"], **options), golden["y"])
    # One addition and one division per shift.
    torch.testing.assert_close(
        fk.sw_dematricize(golden["z"], meta["size"], **options),
        golden["inverse_z"],
        rtol=1e-15,
        atol=1e-15,
    )


@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_meets_reference(size, options, dtype, poisoned):
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype)
    with fk.use_backend("reference"):
        z = fk.sw_matricize(x, **options)
        expected = fk.sw_dematricize(z.double() * 1.5, size, **options)
    with fk.use_backend("cpu"):
        assert torch.equal(fk.sw_matricize(x, **options), z)
        joined = fk.sw_dematricize(z * 1.5, size, **options)
    torch.testing.assert_close(joined, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
def test_inverse_and_adjoint(size, options, backend):
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    z = fk.sw_matricize(x, **options)
    back = fk.sw_dematricize(z, size, **options)
    torch.testing.assert_close(back, x)
    # <dz, M x> = <Mᵀ dz, x>, for either operator.
    dz = torch.randn_like(z)
    (dx,) = torch.autograd.grad(z, x, dz, retain_graph=True)
    torch.testing.assert_close((dz * z).sum(), (dx * x).sum())
    leaf = torch.randn_like(z, requires_grad=True)
    y = fk.sw_dematricize(leaf, size, **options)
    dy = torch.randn_like(y)
    (dleaf,) = torch.autograd.grad(y, leaf, dy)
    torch.testing.assert_close((dy * y).sum(), (dleaf * leaf).sum())


def test_second_derivative(backend):
    x = torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True)
    options = {"head_dim": 2, "patch_size": 4, "shifts": [None, 1]}
    assert torch.autograd.gradgradcheck(lambda x: fk.sw_matricize(x, **options).pow(3), (x,))
    z = torch.randn(4, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda z: fk.sw_dematricize(z, (1, 4, 8), **options).pow(3), (z,))


@pytest.mark.parametrize("dim_order", [(0, 2, 3, 4, 1), (4, 3, 2, 1, 0)], ids=str)
def test_layouts(dim_order, backend):
    x = torch.randn(2, 4, 6, 4, 8)
    inverse = [dim_order.index(i) for i in range(5)]
    same = x.permute(dim_order).contiguous().permute(inverse)
    options = {"head_dim": 2, "patch_size": 2, "shifts": [None, 1]}
    z = fk.sw_matricize(same, **options)
    assert torch.equal(z, fk.sw_matricize(x, **options))
    strided = z.mT.contiguous().mT
    assert torch.equal(
        fk.sw_dematricize(strided, x.shape, **options), fk.sw_dematricize(z, x.shape, **options)
    )


@st.composite
def cuts(draw):
    axes = draw(st.integers(1, 3))
    patch = [draw(st.integers(1, 4)) for _ in range(axes)]
    grid = [draw(st.integers(1, 3)) for _ in range(axes)]
    head_dim, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shift = st.one_of(
        st.none(), st.integers(-20, 20), st.lists(st.integers(-9, 9), min_size=axes, max_size=axes)
    )
    options = {
        "head_dim": head_dim,
        "patch_size": patch,
        "shifts": draw(st.lists(shift, min_size=1, max_size=3)),
    }
    return (
        draw(st.integers(1, 2)),
        head_dim * heads,
        *(p * g for p, g in zip(patch, grid, strict=True)),
    ), options


@settings(deadline=None, max_examples=60)
@given(cuts(), st.integers(0, 2**31))
def test_inverse_of_any_cut(cut, seed):
    size, options = cut
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    z = fk.sw_matricize(x, **options)
    with fk.use_backend("reference"):
        assert torch.equal(z, fk.sw_matricize(x, **options))
    torch.testing.assert_close(fk.sw_dematricize(z, size, **options), x)


@settings(deadline=None, max_examples=30)
@given(cuts(), st.integers(-9, 9))
def test_shift_equivariance(cut, step):
    """Rolling x by s is the same as adding s to every shift."""
    size, options = cut
    axes = list(range(2, len(size)))
    x = torch.randn(size)
    moved = [
        step if s is None else s + step if isinstance(s, int) else [a + step for a in s]
        for s in options["shifts"]
    ]
    rolled = fk.sw_matricize(x.roll([step] * len(axes), axes), **options)
    assert torch.equal(rolled, fk.sw_matricize(x, **{**options, "shifts": moved}))
