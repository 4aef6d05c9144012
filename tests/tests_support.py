"""Helpers that several test modules share."""

from typing import NamedTuple

import torch

import factorizer_kernels as fk


class Outcome(NamedTuple):
    values: tuple[torch.Tensor, ...]
    gradients: tuple[torch.Tensor, ...]


def grads_of(backend, function, inputs, losses, options) -> Outcome:
    """Values of ``function`` under ``backend`` and the gradients of Σ value·loss; absent ones are zeros."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with fk.use_backend(backend):
        out = function(*leaves, **options)
    values = out if isinstance(out, tuple) else (out,)
    gradients = torch.autograd.grad(values, leaves, losses, allow_unused=True)
    gradients = [
        torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)
    ]
    return Outcome(tuple(v.detach() for v in values), tuple(gradients))


def away_from_dead_components(expected, function, inputs, losses, options, tolerance=1e-9) -> bool:
    """Whether the reference's result stands still when x moves by 1e-12; else rounding decides it."""
    x, *factors = inputs
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    moved = grads_of("reference", function, (x * (1 + 1e-12 * noise), *factors), losses, options)
    scale = expected.gradients[0].norm()
    pairs = [
        *zip(moved.values, expected.values, strict=True),
        *zip(moved.gradients, expected.gradients, strict=True),
    ]
    return all((a - b).norm() <= tolerance * max(b.norm(), scale) for a, b in pairs)
