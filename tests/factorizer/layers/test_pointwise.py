"""The layers that treat every voxel alike: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F

from factorizer import (
    MLP,
    FactorizerBlock,
    LayerNorm,
    Linear,
    PositionalEmbedding,
    SWMatricize,
)

SWIN = {"head_dim": 4, "patch_size": 4}


def randomise(module):
    """Every parameter away from values at which an error could hide (ones, zeros)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def value_and_gradients(module, x):
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


@pytest.mark.parametrize("size", [(3, 6, 20), (5, 6, 3, 7), (2, 6, 3, 4, 5)])
def test_pointwise_layers_equal_the_plain_formulas(size, rel):
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.float64)

    def channels_last(function):
        return lambda x: function(x.movedim(1, -1)).movedim(-1, 1)

    norm, mlp = randomise(LayerNorm(6).double()), randomise(MLP(6, ratio=2).double())
    linear, no_bias = randomise(Linear(6, 4).double()), randomise(Linear(6, 4, False).double())
    first, second = mlp.block[0].linear, mlp.block[3].linear

    def plain_mlp(x):
        hidden = F.gelu(F.linear(x, first.weight[..., 0], first.bias))
        return F.linear(hidden, second.weight[..., 0], second.bias)

    plain = {
        norm: lambda x: F.layer_norm(x, (6,), norm.norm.weight, norm.norm.bias, 1e-5),
        linear: lambda x: F.linear(x, linear.linear.weight[..., 0], linear.linear.bias),
        no_bias: lambda x: F.linear(x, no_bias.linear.weight[..., 0]),
        mlp: plain_mlp,
    }
    for module, function in plain.items():
        result = value_and_gradients(module, x)
        module.forward = channels_last(function)
        for got, expected in zip(result, value_and_gradients(module, x), strict=True):
            assert rel(got, expected) < 1e-13  # float64, a few roundings of sums of ~100 terms


@pytest.mark.parametrize("kwargs", [{"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}])
def test_layer_norm_takes_the_arguments_of_torch(kwargs, rel):
    x = torch.randn(2, 5, 3, 4)
    module = LayerNorm(5, **kwargs)
    assert rel(module(x), module.norm(x.movedim(1, -1)).movedim(-1, 1)) < 1e-6


def test_layer_norm_of_half_precision_is_computed_in_float32(rel):
    torch.manual_seed(0)
    x = (300 + 100 * torch.randn(2, 8, 5)).half()  # whose squares float16 cannot hold
    assert rel(LayerNorm(8).half()(x), LayerNorm(8)(x.float())) < torch.finfo(torch.float16).eps


def test_autograd_keeps_little_more_than_the_input_of_a_block():
    block = FactorizerBlock(8, (16, 16, 16), reshape=(SWMatricize, SWIN))
    x = torch.randn(1, 8, 16, 16, 16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    size = x.numel() * x.element_size()
    # x, and the factorisation's input and output; 5 % for weights and factors.
    assert sum(kept.values()) < 3.05 * size


def test_empty_batch():
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    assert block(torch.zeros(0, 8, 8, 8)).shape == (0, 8, 8, 8)


def test_a_batch_is_its_items(rel):
    torch.manual_seed(0)
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    x = torch.randn(3, 8, 8, 8)
    assert rel(block(x), torch.cat([block(item) for item in x.split(1)])) < 1e-6


def test_positional_embedding_is_added_and_interpolated(rel):
    torch.manual_seed(0)
    module = PositionalEmbedding(3, (4, 6))
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(module(x), x + module.pos)
    x = torch.randn(2, 3, 8, 6)
    resized = F.interpolate(module.pos, (8, 6), mode="bilinear")
    assert rel(module(x), x + resized) < 1e-7
    module(x).sum().backward()
    assert module.pos.grad.abs().min() > 0
