"""A network from plain data, as configuration files and checkpoints hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import layers
from ..layers.factorization import SOLVERS
from .factorizer import Factorizer

# Arguments of `Factorizer` that are classes, or pairs of a class and its arguments.
PARTS = ("norm", "reshape", "act", "factorize", "stem", "downsample", "upsample", "head", "pos_embed")


def build_network(arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """A Factorizer: (B, in, *spatial_size) to logits (B, out, ...), or a list of them, finest first.

    `arguments` are those of `factorizer.Factorizer` as plain data: classes are named, as they are
    called in `factorizer.layers` or `torch.nn`; a solver's keywords may follow its name, in a pair. Weights
    and initial factors are drawn with `seed`; the caller's random state is left alone.

    Raises:
        TypeError, ValueError: as `Factorizer` does, and where a name stands for no class.
    """
    parts = {name: _part(name, arguments[name]) for name in PARTS if arguments.get(name) is not None}
    solver = arguments.get("solver")
    if isinstance(solver, Sequence) and len(solver) == 2 and isinstance(solver[1], Mapping):
        if solver[0] not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver[0]!r}")
        parts["solver"] = SOLVERS[solver[0]], solver[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Factorizer(**{**arguments, **parts})


def _part(argument: str, value: Any) -> Any:
    """A class by its name, alone or in a pair with its arguments."""
    if isinstance(value, str):
        home: Any = layers if value in layers.__all__ else nn
        if not isinstance(found := getattr(home, value, None), type):
            raise ValueError(f"{argument} must name a class of factorizer.layers or torch.nn, got {value!r}")
        return found
    if isinstance(value, Sequence) and len(value) == 2:
        return _part(argument, value[0]), value[1]
    return value


def parameter_count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters())
