"""Zeros, single entries, subnormals, huge values, NaN and infinity: see docs/numerics.md."""

import pytest
import torch
from tests_support import CUT, MAP, SPECIAL, check_special, check_spoiled_voxel

import factorizer_kernels as fk


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [1, 2])
def test_special_windows(backend, name, solver, rank):
    check_special(backend, name, solver, rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [1, 2])
def test_spoiled_voxel(backend, value, solver, rank):
    check_spoiled_voxel(backend, value, solver, rank)
    check_spoiled_voxel(backend, value, solver, rank, act=None)


def test_relu_takes_negative_infinity_for_zero(backend):
    x, u0, v0 = torch.rand(MAP), torch.rand(4, 1), torch.rand(16, 1)
    x[0, 1, 3, 6] = 0
    clean = fk.swin_nmf(x, u0, v0, **CUT)
    x[0, 1, 3, 6] = -float("inf")
    assert torch.equal(fk.swin_nmf(x, u0, v0, **CUT), clean)


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_spoiled_columns_of_a_long_matrix(solver):
    """Of several matrices that are worked on in tiles, a NaN spoils its own."""
    x, u0, v0 = torch.rand(3, 8, 20_000), torch.rand(8, 1), torch.rand(20_000, 1)
    clean = fk.nmf(x, u0, v0, solver=solver)
    x[1, 4, 12_345] = float("nan")
    spoiled = fk.nmf(x, u0, v0, solver=solver)
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", [1, 2])
def test_half_precision_of_zero_and_sparse_windows(backend, dtype, solver, rank):
    """What was NaN in the published code: eps rounds to zero in half precision."""
    x = torch.zeros(MAP, dtype=dtype)
    x[..., 5, 5] = 1.0
    x.requires_grad_()
    u0, v0 = torch.rand(4, rank), torch.rand(16, rank)
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.swin_nmf(x, u0, v0, solver=solver, **CUT)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
