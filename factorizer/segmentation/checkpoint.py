"""Checkpoints of training runs: the plan, and the network with its weights."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from factorizer.models.build import build_network
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import load_tensors
from factorizer.segmentation.plan import Plan


def read_checkpoint(path: str | Path) -> tuple[Plan, Mapping[str, Any]]:
    """The plan and the state in a checkpoint. Nothing in the file is executed.

    Raises FileNotFoundError where there is none, DataError where the file is not one of ours.
    """
    members = entries_of(load_tensors(path), path)
    if len(members) != 1:
        raise DataError(f"{path}: holds {len(members)} networks; this needs a file with one")
    return read_entry(members[0], path)


def read_first(path: str | Path) -> tuple[Plan, Mapping[str, Any]]:
    """The plan and the state of the first network in a checkpoint or a model file; all of a file segment the
    same. Raises as `read_checkpoint` does."""
    return read_all(path)[0]


def read_all(path: str | Path) -> list[tuple[Plan, Mapping[str, Any]]]:
    """The plans and the states of all networks in a checkpoint or a model file. Raises as `read_checkpoint`
    does."""
    return [read_entry(entry, path) for entry in entries_of(load_tensors(path), path)]


def entries_of(content: Mapping[str, Any], path: str | Path) -> Sequence[Mapping[str, Any]]:
    """The networks of a model file's content, or the one of a checkpoint's.

    Raises DataError where the file at `path` is neither.
    """
    entries = content.get("members", [content])
    listed = isinstance(entries, Sequence) and bool(entries)
    if not listed or not all(isinstance(entry, Mapping) for entry in entries):
        told = textwrap.shorten(repr(entries), 80, placeholder=" ...")
        raise DataError(f"{path}: not a model file: its members are {told}")
    return entries


def read_entry(state: Mapping[str, Any], path: str | Path) -> tuple[Plan, Mapping[str, Any]]:
    """The plan and the state of one network of the file at `path`.

    Raises DataError where it is not one of ours.
    """
    missing = {"plan", "network"}.difference(state)
    if missing:
        raise DataError(
            f"{path}: not a checkpoint of this program: it has no {' and no '.join(sorted(missing))}. "
            "For weights from elsewhere there is factorizer convert"
        )
    try:
        return Plan(**state["plan"]), state
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise DataError(
            f"{path}: not a checkpoint of this program: its plan is another's ({error})"
        ) from error


def load_network(path: str | Path) -> tuple[nn.Module, Plan]:
    """The network of a checkpoint, in evaluation mode, and the plan that it was trained by.

    Raises FileNotFoundError where there is none, DataError where the file is not one of ours.
    """
    return network_of_entry(*read_checkpoint(path), path)


def network_of_entry(plan: Plan, state: Mapping[str, Any], path: str | Path) -> tuple[nn.Module, Plan]:
    """The network of the plan with the weights of the state, in evaluation mode.

    Raises DataError where the two, from the file at `path`, do not fit.
    """
    network = network_of(plan, path)
    load_weights_into(network, state["network"], path)
    return network.eval(), plan


def network_of(plan: Plan, path: str | Path) -> nn.Module:
    """The plan's network, untrained. Raises DataError where the plan, from `path`, describes none."""
    try:
        return build_network(plan.network, plan.seed)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(f"{path}: its plan describes no network of this family ({error})") from error


def load_weights_into(network: nn.Module, state: Mapping[str, Any], path: str | Path) -> None:
    """Loads the weights that were read from `path`. Raises DataError where they are another network's."""
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:  # with a line for each of the tensors
        reason = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise DataError(f"{path}: its weights do not fit the network ({reason})") from error
