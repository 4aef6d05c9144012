"""What the operators' rules for ``torch.func.vmap`` share.

A rule takes ``info`` (with the mapped dimension's size), where each argument has the mapped dimension, and
the operator's arguments. It returns the outputs, and where these have it. An operator that has a batch
dimension runs once: the mapped dimension joins the batch.
"""

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
