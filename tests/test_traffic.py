"""The bytes that a network moves on a GPU, counted on meta tensors."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

import factorizer_kernels as fk
from benchmarks.traffic import Traffic, counted, of_network
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


def _of_nmf(rows, columns, rank, backend, gradients, **options) -> Traffic:
    """Of 8 matrices with shared factors, on a backend or the chosen one; gradients: of which arguments."""
    with torch.device("meta"):
        tensors = [torch.empty(shape) for shape in ((8, rows, columns), (rows, rank), (columns, rank))]
    leaves = [t.requires_grad_(number in gradients) for number, t in enumerate(tensors)]
    with counted() as traffic, fk.use_backend(backend) if backend else nullcontext():
        y = fk.nmf(*leaves, **options)
        if gradients:
            y.backward(torch.empty_like(y))
    return traffic


@pytest.mark.parametrize("gradients", [(), (0,), (0, 1, 2)], ids=["forward", "of x", "of all"])
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "num_iters", "solver"),
    [
        (512, 4096, 64, 5, "mu"), (512, 4096, 64, 1, "mu"), (256, 1024, 16, 6, "mu"),
        (256, 1024, 64, 2, "mu"), (256, 1024, 9, 1, "hals"),
    ],
)  # fmt: skip
def test_large_ranks_cost_no_more_than_plain_pytorch(rows, columns, rank, num_iters, solver, gradients):
    """In launches and in bytes; from two iterations on clearly less, and no launch for a column alone."""
    options = {"num_iters": num_iters, "solver": solver}
    plain = _of_nmf(rows, columns, rank, "reference", gradients, **options)
    ours = _of_nmf(rows, columns, rank, None, gradients, **options)
    launches, most = sum(ours.launches.values()), sum(plain.launches.values())
    assert ours.total < plain.total
    assert launches <= 0.65 * most
    # Three launches half an iteration, and in the backward the iterations again, and their gradients.
    assert launches <= (3 if gradients else 1) * 6 * num_iters + (14 if gradients else 1)
    if num_iters > 2:
        assert ours.total < (0.6 if gradients else 0.9) * plain.total
    matrices = 4 * 8 * rows * columns
    assert ours.total > (2 * num_iters * (3 if gradients else 1) + 1) * matrices  # X in every product with it
