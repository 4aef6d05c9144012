"""Trained networks that are given away: one file with an ensemble, how it is run, and its card.

A model file is what `torch.save` makes of plain data and tensors: the members' plans and weights in half
precision, the choices that cross-validation made for inference, and a card in Markdown that says what the
networks were trained on, how well they do, and what they must not be used for. A checkpoint of a run
serves wherever a model file does: it is a model of one member, without a card.

Models have names. Those that come with the package lie in `factorizer/trained`; those of one's own in the
folder that the environment variable FACTORIZER_MODELS names, by default ~/.factorizer/models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from factorizer.layers import set_num_iters
from factorizer.segmentation.checkpoint import entries_of, network_of_entry, read_entry
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import load_tensors, save_tensors
from factorizer.segmentation.plan import Plan

SHIPPED = Path(__file__).parents[1] / "trained"
SUFFIX = ".pt"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TrainedModel:
    """Networks that segment together, and what is known about them.

    Attributes:
        members: networks in evaluation mode, with their plans.
        mirror: whether to average over mirror images, where the user does not say.
        largest_component: targets of which only the largest connected component is kept.
        card: Markdown; empty where nobody wrote one.
    """

    members: tuple[tuple[nn.Module, Plan], ...]
    mirror: bool = False
    largest_component: tuple[str, ...] = ()
    card: str = ""


def load_model(path: str | Path) -> TrainedModel:
    """The model of a model file or a checkpoint. Nothing in the file is executed.

    Raises FileNotFoundError where there is none, DataError where it is neither.
    """
    content = load_tensors(path)
    entries = entries_of(content, path)
    members = tuple(network_of_entry(*read_entry(entry, path), path) for entry in entries)
    return TrainedModel(
        members,
        bool(content.get("mirror", False)),
        tuple(content.get("largest_component", ())),
        str(content.get("card", "")),
    )


def bundle_model(path: str | Path, arguments: Mapping[str, Any]) -> TrainedModel:
    """A checkpoint as a model, for a bundle whose configuration builds a network of these arguments, or a
    model file, whatever networks it has; with the configuration's iterations.

    Raises DataError where the checkpoint's network is another: weights of one shape serve several networks.
    """
    try:
        model = load_model(path)
    except FileNotFoundError as error:
        raise DataError(f"checkpoint: there is no {path}") from error
    plan = model.members[0][1]
    own, wanted = plan.network, arguments
    if len(model.members) == 1:
        wanted = replace(plan, network=dict(arguments)).network  # in the plain values that a plan has
        for name in sorted(own.keys() | wanted.keys()):
            if name != "num_iters" and own.get(name) != wanted.get(name):
                raise DataError(
                    f"checkpoint: {path} has a network with {name} {own.get(name)!r}, and the bundle's "
                    f"network_arguments have {wanted.get(name)!r}; give these as in the training, or use "
                    "factorizer predict"
                )
    for network, _ in model.members:
        if "num_iters" in wanted:
            set_num_iters(network, wanted["num_iters"])
    return model


def united(models: Sequence[TrainedModel]) -> TrainedModel:
    """The networks of several models as one, run as all of them together say; the card is that of a single
    one."""
    kept = [set(model.largest_component) for model in models]
    return TrainedModel(
        tuple(member for model in models for member in model.members),
        mirror=all(model.mirror for model in models),
        largest_component=tuple(sorted(set.intersection(*kept))),
        card=models[0].card if len(models) == 1 else "",
    )


def save_model(model: TrainedModel, path: Path) -> None:
    """Writes a model file, weights in half precision. Raises OSError where it cannot be written."""
    content = {
        "members": [
            {"plan": _told(plan), "network": _halved(network.state_dict())} for network, plan in model.members
        ],
        "mirror": model.mirror,
        "largest_component": list(model.largest_component),
        "card": model.card,
    }
    save_tensors(content, path)


def own_folder() -> Path:
    """The folder of the user's own models; it need not exist. It begins with ~ where nobody knows the user's
    home."""
    return Path(os.path.expanduser(os.environ.get("FACTORIZER_MODELS") or "~/.factorizer/models"))


def known_models() -> dict[str, Path]:
    """The model files by name; one's own come before shipped ones of the same name."""
    folders = (SHIPPED, own_folder())
    files = (path for folder in folders for path in sorted(folder.glob(f"*{SUFFIX}")))
    return {path.stem: path for path in files if NAME.fullmatch(path.stem)}  # no file half-written


def find_model(name: str) -> Path:
    """The file of the model with this name. Raises DataError where there is none."""
    known = known_models()
    if name not in known:
        raise DataError(
            f"model: got {name!r}; there are {', '.join(known) or 'none'}, see `factorizer models`"
        )
    return known[name]


def import_model(path: Path, name: str | None = None) -> Path:
    """Copies a model file into one's own folder, under `name` or its own; returns where it lies then.

    Raises DataError where the file is no model, the name is no good, or one of this name is there.
    """
    name = path.stem if name is None else name
    if not NAME.fullmatch(name):
        raise DataError(f"name: got {name!r}; it must be of letters, digits, '.', '_' and '-'")
    try:
        model = load_model(path)
    except FileNotFoundError as error:
        raise DataError(f"model: there is no {path}") from error
    target = own_folder() / f"{name}{SUFFIX}"
    if target.parts[0] == "~":
        raise DataError(f"model: {target} is nowhere, as this user has no home; set FACTORIZER_MODELS")
    if target.exists():
        raise DataError(f"name: {target} is there already; give another name, or delete that file")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_model(model, target)
    return target


def _told(plan: Plan) -> dict[str, Any]:
    """The fields of a plan, and of its recipe, that differ from their defaults, so that a file outlives
    the coming of new ones."""
    content = asdict(plan)
    content["recipe"] = _changed(plan.recipe, content["recipe"])
    return _changed(plan, content)


def _changed(owner: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields(owner)}
    return {name: value for name, value in content.items() if value != defaults[name]}


def _halved(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
