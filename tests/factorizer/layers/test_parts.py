"""Exchangeable parts, wrong arguments of all layers, and resizing."""

import pytest
import torch
from torch import nn

from factorizer import (
    MLP,
    NMF,
    FactMixer,
    FactorizerBlock,
    FactorizerStage,
    LayerNorm,
    Linear,
    Matricize,
    PositionalEmbedding,
    SWMatricize,
    preset,
)
from factorizer.layers.factorization.solvers import HALS
from factorizer.layers.parts import build
from factorizer.layers.resize import crop_to, pad_to

SWIN = {"head_dim": 4, "patch_size": 4}


def test_build_takes_the_three_forms():
    assert isinstance(build("act", nn.ReLU), nn.ReLU)
    assert build("act", (nn.LeakyReLU, {"negative_slope": 0.3})).negative_slope == 0.3
    assert build("act", [nn.LeakyReLU, [0.3]]).negative_slope == 0.3
    conv = build("stem", (nn.Conv2d, (5,)), 2, 3, kernel_size=1)
    assert (conv.in_channels, conv.kernel_size) == (2, (5, 5))
    assert build("stem", (nn.Conv2d, {"bias": False}), 2, 3, kernel_size=1).bias is None


@pytest.mark.parametrize("part", ["ReLU", None, (nn.ReLU,), (nn.ReLU, "x"), (nn.ReLU, {}, {})])
def test_build_refuses_the_rest(part):
    with pytest.raises(TypeError, match=r"act must be a class, or a pair"):
        build("act", part)


SWIN_MIXER = (8, 8, (8, 8), (SWMatricize, SWIN))


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: Linear(0, 3), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: Linear(3, 2.0), TypeError, "out_channels must be an integer, got 2.0"),
        (lambda: Linear(3, 2)(torch.zeros(1, 4, 5)), ValueError, "must have 3 channels.* got 4"),
        (lambda: Linear(3, 2)(torch.zeros(1, 3)), ValueError, r"p = 1, 2 or 3, got shape \(1, 3\)"),
        (lambda: Linear(3, 2)(torch.zeros(1, 3, 5).int()), TypeError, "float32.*got torch.int32"),
        (lambda: Linear(3, 2)(torch.zeros(1, 3, 5).double()), TypeError, "float32.*got.*float64"),
        (lambda: Linear(3, 2)([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: LayerNorm(3)(torch.zeros(1, 4, 5)), ValueError, "must have 3 channels.* got 4"),
        (lambda: MLP(4, ratio=0), ValueError, "ratio must be positive, got 0"),
        (lambda: MLP(4, dropout=1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: MLP(4, dropout="0"), TypeError, "dropout must be a number, got '0'"),
        (lambda: PositionalEmbedding(4, 8), TypeError, "spatial_size must be a sequence"),
        (
            lambda: PositionalEmbedding(4, (8, 8))(torch.zeros(1, 4, 8)),
            ValueError,
            "p = 2, got shape",
        ),
        (lambda: PositionalEmbedding(4, (1, 2, 3, 4)), ValueError, "spatial_size must have 1 or 2"),
        (lambda: SWMatricize((None, 8)), ValueError, r"input_size\[1:\] must have 2 or 3"),
        (
            lambda: SWMatricize((None, 8, 8), head_dim=3, patch_size=4),
            ValueError,
            "head_dim=3 must divide the 8 channels",
        ),
        (lambda: SWMatricize((None, 8, 8), head_dim=4), ValueError, "grid_size and patch_size"),
        (
            lambda: SWMatricize((None, 8, 8), num_heads=1, head_dim=4, patch_size=4),
            ValueError,
            "exactly one of num_heads and head_dim",
        ),
        (
            lambda: SWMatricize((None, 8, 8, 8), head_dim=4, patch_size=(2, 2, 2)),
            ValueError,
            "patch_size must have one entry per spatial axis",
        ),
        (
            lambda: SWMatricize((None, 8, 8), head_dim=4, patch_size=0),
            ValueError,
            "patch_size must be at least 1, got 0",
        ),
        (
            lambda: Matricize((None, 8, 8), head_dim=4, patch_size=4, shifts=[None, 2]),
            (TypeError, ValueError),
            "shifts must",
        ),
        (
            lambda: Matricize((None, 8, 8), head_dim=4, patch_size=4)(torch.zeros(1, 6, 8)),
            ValueError,
            "must have 8 channels.* got 6",
        ),
        (
            lambda: Matricize((None, 8, 8), head_dim=4, patch_size=4)(torch.zeros(1, 8, 8, 8)),
            ValueError,
            "p = 1, got shape",
        ),
        (
            lambda: FactMixer(*SWIN_MIXER)(torch.zeros(1, 6, 8, 8)),
            ValueError,
            "FactMixer: x must have 8 channels",
        ),
        (lambda: FactMixer(*SWIN_MIXER)(torch.zeros(1, 8, 8)), ValueError, "p = 2, got shape"),
        (lambda: FactMixer(8, 8, (8, 8), act="relu"), TypeError, "act must be a class"),
        (lambda: FactMixer(*SWIN_MIXER, ranks=2), TypeError, "ranks"),
        (lambda: FactMixer(*SWIN_MIXER, dropout=-1), ValueError, "dropout must lie"),
        (
            lambda: FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))(torch.zeros(1, 8, 8)),
            ValueError,
            "p = 2, got shape",
        ),
        (
            lambda: FactorizerBlock(8, (8,), reshape=(SWMatricize, SWIN))(torch.zeros(1, 4, 8)),
            ValueError,
            "must have 8 channels",
        ),
        (lambda: FactorizerStage(8, 8, (8, 8), depth=0), ValueError, "depth must be at least 1"),
        (lambda: SWMatricize(None, **SWIN), TypeError, "input_size must be a sequence"),
        (lambda: preset([]), TypeError, "name must be a string"),
        (lambda: NMF((8, 16), compression="x"), TypeError, "compression must be a number"),
        (lambda: NMF((8, 16), solver=(HALS, {"eps": "a"})), TypeError, "eps must be a number"),
        (lambda: MLP(8, ratio=float("nan")), ValueError, "ratio must be positive"),
        (lambda: MLP(8, hidden_channels=0), ValueError, "hidden_channels must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(build_it, error, message):
    with pytest.raises(error, match=message):
        build_it()


def test_resize_helpers_leave_what_fits_alone():
    x = torch.randn(1, 2, 3, 4)
    assert pad_to(x, (3, 4)) is x
    assert crop_to(x, (3, 4)) is x
    padded = pad_to(x, (4, 6))
    assert torch.equal(padded[..., :3, :4], x)
    assert padded.count_nonzero() == x.count_nonzero()
    assert torch.equal(crop_to(padded, (3, 4)), x)
