"""The depthwise convolution as a module; the operator has tests of its own."""

import pytest
import torch
from torch import nn

from factorizer import DepthwiseConv


def value_and_gradients(module, x):
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), [x, *module.parameters()])]


@pytest.mark.parametrize(("axes", "kernel_size"), [(1, 5), (2, (3, 7)), (3, 3), (3, (1, 3, 5))])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_conv_is_torchs(axes, kernel_size, bias, rel):
    """In its parameters, their initial values, and what it computes."""
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    layer = DepthwiseConv(6, kernel_size, bias, axes)
    torch.manual_seed(0)
    padding = kernel_size // 2 if isinstance(kernel_size, int) else tuple(k // 2 for k in kernel_size)
    theirs = convolution(6, 6, kernel_size, padding=padding, groups=6, bias=bias)
    assert all(map(torch.equal, layer.parameters(), theirs.parameters()))
    layer.conv.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, *(9, 8, 7)[:axes])
    results = (value_and_gradients(module.double(), x.double()) for module in (layer, theirs))
    for ours, expected in zip(*results, strict=True):
        assert rel(ours, expected) < 1e-14
