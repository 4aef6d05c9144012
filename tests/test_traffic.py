"""The bytes that a network moves on a GPU, counted on meta tensors."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.traffic import counted, of_network
from factorizer.layers import Linear
from factorizer.models import preset

GB = 1e9


def test_a_network_moves_no_more_than_it_must():
    """swin-brats at 128³ in float32; with each operator as separate operations it would be 45 and 147 GB."""
    inference, step = of_network(lambda: preset("swin-brats"), (128,) * 3)
    assert 5 * GB < inference.total <= 13 * GB
    assert 20 * GB < step.total <= 35 * GB


def test_launches_and_operations_are_counted():
    """A kernel's tensors once each; an operation's, and nothing for views and what is only allocated."""
    with torch.device("meta"):
        layer, x = Linear(8, 16), torch.empty(2, 8, 10, 10)
    with counted() as traffic, torch.no_grad():
        y = layer(x)
        z = (y + y).flatten(2).new_empty(5)
    assert z.shape == (5,)
    maps, weights = 4 * 2 * 100, 4 * (16 * 8 + 16)
    assert maps * (8 + 16) + weights <= traffic.bytes["norm_linear_kernel"] <= maps * 24 + weights + 64
    assert traffic.bytes["aten.add.Tensor"] == 2 * maps * 16  # the two addends are one tensor
    assert traffic.total - sum(traffic.bytes[k] for k in ("norm_linear_kernel", "aten.add.Tensor")) < 200
