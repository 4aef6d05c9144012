"""What the operators' rules for ``torch.func.vmap`` share.

A rule takes ``info`` (with the mapped dimension's size), where each argument has the mapped dimension, and
the operator's arguments. It returns the outputs, and where these have it. An operator that has a batch
dimension runs once: the mapped dimension joins the batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def mapped_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """t with its mapped dimension first; expanded to ``size`` where it has none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def shape_without(t: Tensor, dim: int | None) -> torch.Size:
    """The shape of t without its mapped dimension."""
    return t.shape if dim is None else t.movedim(dim, 0).shape[1:]


def joined(t: Tensor, dim: int | None, size: int) -> Tensor:
    """t (B, ...), whose mapped dimension joins the batch: (size · B, ...)."""
    return mapped_first(t, dim, size).flatten(0, 1)


def parted(t: Tensor, size: int) -> Tensor:
    """(size · B, ...) as (size, B, ...)."""
    return t.unflatten(0, (size, -1))


def looped(operator: Callable, info: Any, in_dims: tuple, arguments: tuple) -> tuple:
    """The rule that calls the operator for each element: the outputs, and that they have it first."""
    calls = [
        operator(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(calls[0], Tensor):
        return torch.stack(calls), 0
    return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])
