"""Checkpoints of the networks that the paper's authors trained, under the names of today's layers.

What differs between the layout of the paper's time and the published one of today:

| paper's time | today |
| --- | --- |
| `encoder.blocks.I.blocks.0` (strided level) | `encoder.blocks.I.downsample` |
| `encoder.blocks.I.blocks.K`, and of `decoder` | `encoder.blocks.I.block.blocks.K`, from 0 |
| `adapter.0` and `pos_embed` in a level's first block | `block.adapter`, `block.pos_embed` of the level |
| `blocks.NAME.fn.0`, `.fn.1` in a block, NAME free, a factorisation | `norm1`, `fact` |
| the same, an MLP | `norm2`, `mlp` |
| `heads.0` of a network without deep supervision | `head` |
| eps 1e-8 in the solvers (and, in MU, above the fraction line too) | eps 1e-16, below the line only |
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layers import MatrixFactorization

PAPER_EPS = 1e-8

_BLOCK = re.compile(r"(?P<level>(?:en|de)coder\.blocks\.\d+)\.blocks\.(?P<index>\d+)\.(?P<rest>.+)")
_PART = re.compile(r"blocks\.(?P<name>[^.]+)\.fn\.(?P<place>[01])\.(?P<rest>.+)")


def convert_paper_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict, with today's names, of a checkpoint in the layout of the paper's time.

    Only names change. The solvers' eps is no part of a state dict: `load_paper_checkpoint` sets it too.

    Args:
        checkpoint: a state dict, or a Lightning checkpoint that holds one as "state_dict"; a prefix that all
            of the network's names share is dropped.

    Raises:
        TypeError: checkpoint is no mapping of names to tensors.
        ValueError: the names are not of that layout; the message names one that was not understood.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint must be a mapping of names to tensors, got {type(checkpoint).__name__}")
    state = checkpoint.get("state_dict", checkpoint)
    stems = [name for name in state if re.search(r"(^|\.)stem\.", str(name))]
    if not stems:
        raise ValueError("checkpoint must hold a network with a stem: no name has a part 'stem'")
    prefix = stems[0][: re.search(r"(^|\.)stem\.", stems[0]).end() - len("stem.")]  # type: ignore[union-attr]
    state = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    strided = {
        match["level"]
        for name in state
        if (match := _BLOCK.fullmatch(name)) and match["index"] == "0" and match["rest"] in ("weight", "bias")
    }
    mlps = {
        f"{match['level']}.blocks.{match['index']}.{part['name']}"
        for name in state
        if (match := _BLOCK.fullmatch(name))
        and (part := _PART.fullmatch(match["rest"]))
        and part["rest"].startswith("block.")
    }
    deep = any(name.startswith("heads.1.") for name in state)
    converted = {_converted(name, strided, mlps, deep): value for name, value in state.items()}
    for name, value in converted.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"checkpoint must hold tensors, got {type(value).__name__} for {name}")
    return converted


def load_paper_checkpoint(network: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint of the paper's time into `network`, and give its solvers the eps of that time.

    Args:
        network: a `Factorizer` with the arguments of the checkpoint's configuration, changed in place.
        checkpoint: see `convert_paper_checkpoint`.

    Raises:
        TypeError, ValueError: see `convert_paper_checkpoint`.
        RuntimeError: the network has other parameters (see `torch.nn.Module.load_state_dict`).
    """
    network.load_state_dict(convert_paper_checkpoint(checkpoint))
    for module in network.modules():
        if isinstance(module, MatrixFactorization):
            for solver in module.solvers:
                solver.eps = PAPER_EPS


def _converted(name: str, strided: set[str], mlps: set[str], deep: bool) -> str:
    block = _BLOCK.fullmatch(name)
    if block is None:
        if not re.match(r"(stem|heads\.\d+|decoder\.blocks\.\d+\.upsample)\.", name):
            raise ValueError(f"checkpoint must be in the layout of the paper's time: what is {name!r}?")
        return name if deep else name.replace("heads.0.", "head.")
    level, index, rest = block["level"], int(block["index"]), block["rest"]
    if level in strided:
        if index == 0:
            return f"{level}.downsample.{rest}"
        index -= 1
    if rest.startswith("pos_embed.") and index == 0:
        return f"{level}.block.{rest}"
    if rest.startswith("adapter.0.") and index == 0:
        return f"{level}.block.adapter.{rest.removeprefix('adapter.0.')}"
    part = _PART.fullmatch(rest)
    if part is None:
        raise ValueError(f"checkpoint must be in the layout of the paper's time: what is {name!r}?")
    is_mlp = f"{level}.blocks.{block['index']}.{part['name']}" in mlps
    today = ("norm2", "mlp") if is_mlp else ("norm1", "fact")
    return f"{level}.block.blocks.{index}.{today[int(part['place'])]}.{part['rest']}"
