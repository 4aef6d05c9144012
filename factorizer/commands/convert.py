"""factorizer convert: weights of the published code, or of the paper's time, as a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from factorizer.commands.bundle import bundle_plan
from factorizer.models.paper_weights import PAPER_EPS, convert_paper_checkpoint
from factorizer.segmentation.checkpoint import load_weights_into, network_of
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import load_tensors, prepare_folder, read_json
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.training import Trainer

HOLDERS = ("state_dict", "network", "model")  # under which frameworks keep a network's tensors


def convert(
    console: Console,
    source: Path,
    out: Path,
    *,
    plan: Path | None = None,
    bundle: Path | None = None,
    configs: Sequence[str] = (),
) -> Plan:
    """Writes the weights of `source` as a checkpoint of the plan: of plan.json, or of a bundle.

    Weights do not tell spacing, classes or windows: the plan does. The number of heads is taken from
    the weights. In the names of the paper's time (`paper_weights`) the solvers get the eps of
    that time. Raises DataError where source or plan cannot be read, or the two do not fit.
    """
    if out.exists():
        raise DataError(f"output: {out} is there already; give another file, or delete that one")
    if (plan is None) == (bundle is None):
        raise DataError("plan, bundle: give one of them")
    found = _read_plan(plan) if plan is not None else bundle_plan(bundle, configs)  # type: ignore[arg-type]
    state = _read_weights(source)
    network = dict(found.network)
    if old := any(re.search(r"\.fn\.[01]\.", name) for name in state):
        try:
            state = convert_paper_checkpoint(state)
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}: {error}") from error
        solver = network.get("solver", "hals")
        name, options = (solver, {}) if isinstance(solver, str) else solver  # a plan may have either
        network["solver"] = (name, {**options, "eps": PAPER_EPS})
    heads = {name.split(".")[1] for name in state if name.startswith("heads.")}
    network["num_deep_supr"] = len(heads)
    found = replace(found, network=network)
    made = network_of(found, plan or bundle)  # type: ignore[arg-type]
    load_weights_into(made, state, source)
    prepare_folder("output", out.resolve().parent)
    Trainer(found, made).save(out)
    console.print(
        f"{len(state)} tensors, {'named as in the time of the paper' if old else 'names as today'}; "
        f"checkpoint in {out}",
        soft_wrap=True,
    )
    return found


def _read_plan(path: Path) -> Plan:
    try:
        return Plan(**read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a plan as train writes it ({error})") from error


def _read_weights(path: Path) -> dict[str, Any]:
    """The tensors by name, without what all names begin with; nothing in the file is executed."""
    try:
        content = load_tensors(path)
    except FileNotFoundError as error:
        raise DataError(f"weights: there is no {path}") from error
    except DataError as error:
        raise DataError(
            f"{error}. Where it holds other objects, save its state_dict alone, with the program that made it"
        ) from error
    for holder in HOLDERS:
        if isinstance(content.get(holder), Mapping):
            content = content[holder]
    stems = [m for name in content if (m := re.match(r"((?:.*?\.)?)stem\.", str(name)))]
    if not stems:
        raise DataError(f"{path}: holds no network of this family: no name has a part 'stem'")
    prefix = stems[0].group(1)
    return {name[len(prefix) :]: value for name, value in content.items() if name.startswith(prefix)}
