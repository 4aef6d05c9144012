"""Feature maps as batches of matrices, and back."""

import pytest
import torch
import torch.nn.functional as F

from factorizer import (
    Matricize,
    SWMatricize,
)

SWIN = {"head_dim": 4, "patch_size": 4}


@pytest.mark.golden_kind("matricize")
def test_matricize_golden(golden, backend, rel):
    meta = golden["meta"]
    options = {k: meta[k] for k in ("head_dim", "num_heads", "patch_size", "grid_size") if k in meta}
    size = (None, *meta["size"][1:])
    if meta["kind"] == "matricize":
        module = Matricize(size, shifts=meta["shifts"], **options)
    else:
        module = SWMatricize(size, shifts=meta["shifts"], **options)
    assert module.output_size[1:] == tuple(golden["y"].shape[1:])
    assert torch.equal(module(golden["x"]), golden["y"])
    assert rel(module.inverse_forward(golden["z"]), golden["inverse_z"]) < 1e-15


def test_default_shifts_are_none_and_half_a_patch():
    x = torch.randn(1, 4, 8, 12)
    plain = SWMatricize((None, 4, 8, 12), head_dim=2, patch_size=(4, 6))
    named = SWMatricize((None, 4, 8, 12), head_dim=2, patch_size=(4, 6), shifts=[None, (2, 3)])
    assert torch.equal(plain(x), named(x))


def test_matricize_has_one_shift():
    x = torch.randn(1, 4, 8, 8)
    module = Matricize((None, 4, 8, 8), num_heads=2, grid_size=2, shifts=1)
    rolled = Matricize((None, 4, 8, 8), num_heads=2, grid_size=2)(x.roll((1, 1), (2, 3)))
    assert torch.equal(module(x), rolled)
    assert torch.equal(module.inverse_forward(module(x)), x)


@pytest.mark.parametrize("options", [SWIN, {"num_heads": 2, "grid_size": 3}])
@pytest.mark.parametrize("size", [(6, 6), (7, 13), (3, 12)])
def test_matricize_takes_any_size(options, size, rel):
    x = torch.randn(2, 8, *size)
    module = SWMatricize((None, 8, 12, 12), **options)
    assert rel(module.inverse_forward(module(x), size), x) < 1e-7
    fitted = module.fitted_size(size)
    assert torch.equal(module(x), module(F.pad(x, (0, fitted[1] - size[1], 0, fitted[0] - size[0]))))
