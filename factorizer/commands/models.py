"""factorizer models: trained networks that are there, and one file to give one away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from factorizer.models.build import parameter_count
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import prepare_folder
from factorizer.segmentation.inference import Predictor
from factorizer.segmentation.screen import count, table
from factorizer.segmentation.trained import (
    find_model,
    import_model,
    known_models,
    load_model,
    own_folder,
    save_model,
    united,
)


def show_models(console: Console) -> None:
    """Lists the models that `predict --model` knows."""
    rows = table("Trained models", "name", "segments", "networks", "parameters", "file", texts=2)
    for name, path in known_models().items():
        try:
            model = load_model(path)
        except (DataError, OSError) as error:  # it must not hide the others
            rows.add_row(name, "cannot be read", "", "", str(error))
            continue
        plan = model.members[0][1]
        rows.add_row(
            name,
            f"{', '.join(plan.targets)} in {', '.join(plan.modalities)}",
            str(len(model.members)),
            f"{sum(parameter_count(network) for network, _ in model.members):,}",
            str(path),
        )
    console.print(rows)
    console.print(
        "Cards: factorizer models card NAME. Models of one's own: factorizer models import FILE, into "
        f"{own_folder()}",
        soft_wrap=True,
    )


def show_card(console: Console, name: str) -> None:
    """Prints a model's card. Raises DataError where there is no such model, or it has none."""
    card = load_model(find_model(name)).card
    if not card:
        raise DataError(f"model: {name} has no card")
    console.print(card, markup=False, highlight=False, soft_wrap=True)


def export(
    console: Console,
    checkpoints: Sequence[Path],
    out: Path,
    *,
    card: Path | None = None,
    mirror: bool | None = None,
) -> None:
    """Writes the networks of the checkpoints and model files as one model file, weights in half precision.

    What is not given (`mirror`, and the card of a single one), and of which targets the largest component is
    kept, is as the model files have it, or where there are several as all of them have it.

    Raises DataError where one cannot be used, two do not segment the same, or `out` cannot be written.
    """
    if out.exists():
        raise DataError(f"output: {out} is there already; give another file, or delete that one")
    try:
        model = united([load_model(path) for path in checkpoints])
    except FileNotFoundError as error:
        raise DataError(f"checkpoint: there is no {error.filename}") from error
    if card is not None:
        try:
            model = replace(model, card=card.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"card: {card} cannot be read as text ({error})") from error
    if mirror is not None:
        model = replace(model, mirror=mirror)
    Predictor(model.members)  # which refuses networks that do not segment the same
    prepare_folder("output", out.resolve().parent)
    save_model(model, out)
    kept = ", ".join(model.largest_component) or "none"
    console.print(
        f"{count(len(model.members), 'network')}, {out.stat().st_size / 1e6:.1f} MB, in {out}; "
        f"mirror images: {'yes' if model.mirror else 'no'}; largest component alone: {kept}; "
        f"{'with a card' if model.card else 'no card'}",
        soft_wrap=True,
    )


def take(console: Console, path: Path, name: str | None = None) -> None:
    """Copies a model file, or a checkpoint, into one's own folder."""
    target = import_model(path, name)
    console.print(f"{target}: factorizer predict --model {target.stem}", soft_wrap=True)
