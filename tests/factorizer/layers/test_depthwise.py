"""DepthwiseConv: torch's convolution of as many groups as channels."""

import pytest
import torch
from torch import nn

from factorizer import DepthwiseConv


@pytest.mark.parametrize(("axes", "kernel_size"), [(1, 5), (2, (3, 7)), (3, 3), (3, (1, 3, 5)), (1, 9)])
@pytest.mark.parametrize("bias", [False, True])
def test_is_torchs(axes, kernel_size, bias, rel):
    """In its parameters, their initial values, the state_dict, and in what it computes."""
    torch.manual_seed(0)
    layer = DepthwiseConv(6, kernel_size, bias, axes)
    torch.manual_seed(0)
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    theirs = convolution(6, 6, kernel_size, padding="same", groups=6, bias=bias)
    for name, parameter in layer.conv.state_dict().items():
        assert torch.equal(parameter, theirs.state_dict()[name])
    layer.conv.load_state_dict(theirs.state_dict())

    x = torch.randn(2, 6, *(9, 8, 7)[:axes], dtype=torch.float64)
    results = []
    for module in (layer.double(), theirs.double()):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), (leaf, *module.parameters()))))
    for ours, expected in zip(*results, strict=True):
        assert rel(ours, expected) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_is_one_filter(dtype, rel):
    torch.manual_seed(0)
    layer, x = DepthwiseConv(4, (3, 1, 5)).to(dtype), torch.randn(2, 4, 6, 5, 7, dtype=dtype)
    both = [layer.residual(x), x + layer(x)]
    assert rel(*both) < 4 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):  # which would round x
        assert layer.residual(x).dtype == (x + layer(x)).dtype
    layer.register_forward_hook(lambda *_: torch.zeros_like(x))
    assert torch.equal(layer.residual(x), x)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DepthwiseConv(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: DepthwiseConv(3, 4), ValueError, r"kernel_size must be odd.* got \(4, 4, 4\)"),
        (lambda: DepthwiseConv(3, (3, 3)), ValueError, "kernel_size must have 3 entries"),
        (lambda: DepthwiseConv(3, 3.0), TypeError, "kernel_size must be an integer, got 3.0"),
        (lambda: DepthwiseConv(3, spatial_dims=4), ValueError, "spatial_dims must be .*, got 4"),
        (lambda: DepthwiseConv(3)(torch.zeros(1, 4, 5, 5, 5)), ValueError, "must have 3 channels.* got 4"),
        (lambda: DepthwiseConv(3)(torch.zeros(1, 3, 5, 5)), ValueError, "p = 3, got shape"),
    ],
)
def test_refuses(build, error, message):
    with pytest.raises(error, match=message):
        build()
