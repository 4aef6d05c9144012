"""Files of tensors: whole or not at all, and nothing in them is executed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from factorizer.data import DataError, atomic


def fill(network: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """Loads the weights that were read from `path`. Raises DataError where they are another network's."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # with a line for each of the tensors
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise DataError(f"{path}: its weights do not fit the network ({reason})") from error


def save_tensors(content: Mapping[str, Any], path: Path, *, shared: bool = False) -> None:
    """Writes a mapping of names to tensors and plain data; `shared` as of `atomic`.

    Raises OSError where the file cannot be written; the one that was there stays.
    """
    with atomic(path, shared=shared) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{path}: cannot be written; is the disk full? ({error})") from error


def load_tensors(path: str | Path) -> Mapping[str, Any]:
    """The mapping that torch.save wrote to a file.

    Raises FileNotFoundError where there is none, DataError where it holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        kind = type(error).__name__
        raise DataError(f"{path}: not a checkpoint, no file of tensors and plain data ({kind})") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}; it must be a mapping of names to tensors")
    return content
