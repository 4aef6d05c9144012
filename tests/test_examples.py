"""The programs in examples/ do what the documentation says of them."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_classifier_with_an_nmf_block():
    example = load("nmf_classifier")
    # 0.96 in 150 steps; a third of them are enough to be far above chance, 0.33 with a standard
    # deviation of 0.03 over 300 images.
    assert example.main(steps=75) > 0.6
    network = example.Classifier(3)
    assert {"features.3.u0", "features.3.v0"} <= set(network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_hamburgers_context_layer(dtype, rel):
    """Value and gradients of the plain formula, to rounding, and a fraction of its memory."""
    example = load("hamburger")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 48, 120, generator=generator, dtype=dtype, requires_grad=True)
    bases = torch.rand(1, 48, 12, generator=generator, dtype=dtype)
    bases = torch.nn.functional.normalize(bases, dim=1).requires_grad_()
    dy = torch.randn(x.shape, generator=generator, dtype=dtype)
    results, expected = (
        (y, *torch.autograd.grad(y, (x, bases), dy))
        for y in (example.context(x, bases, 6), example.plain_context(x, bases, 6))
    )
    rounding = torch.finfo(dtype).eps
    # Some roundings for each of 13 updates and their adjoints.
    for result, plain, roundings in zip(results, expected, (16, 64, 64), strict=True):
        assert rel(result, plain) < roundings * rounding
    kept, plain = (
        example.kept_bytes(function, x, bases, 6) for function in (example.context, example.plain_context)
    )
    assert kept < plain / 4
    layer = example.Hamburger(8, rank=4, num_iters=2)
    y = layer(torch.randn(2, 8, 5, 6))
    assert y.shape == (2, 8, 5, 6)
