"""What the commands take from a MONAI bundle of `bundles/`: its recipe, or its plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from rich.console import Console

from factorizer.commands.train import announce, check_plan
from factorizer.segmentation.cases import on_one_grid, read_split
from factorizer.segmentation.errors import DataError, check_counts, data_error
from factorizer.segmentation.files import prepare_folder
from factorizer.segmentation.plan import AS_PLANNED, Plan, Wishes, reshape_for
from factorizer.segmentation.processes import pick_device, process_group
from factorizer.segmentation.recipe import PATCH
from factorizer.segmentation.survey import check_cases
from factorizer.segmentation.training import BEST, check_best, fit


def read_bundle(folder: Path, configs: Sequence[str] = (), **changes: Any) -> ConfigParser:
    """The training configuration of a bundle, with further files of its configs/ over it.

    Its expressions are Python, evaluated when it is used: take bundles from where you trust.

    Args:
        folder: the bundle's.
        configs: names such as "four_shifts".
        changes: values by their names in the configuration; None leaves one as it is.

    Raises DataError where a file is missing or not readable.
    """
    files = [folder / "configs" / f"{name}.json" for name in ("train", *configs)]
    for file in files:
        if not file.is_file():
            raise DataError(f"bundle: {file} is missing")
    parser = ConfigParser()
    try:
        parser.read_config([str(file) for file in files])
    except ValueError as error:
        raise DataError(f"bundle: {folder} is not readable ({error})") from error
    for name, value in changes.items():
        if value is not None:
            parser[name] = value
    return parser


def bundle_plan(folder: Path, configs: Sequence[str] = ()) -> Plan:
    """The plan of a bundle for the data that it was made for, without the names of cases."""
    parser = read_bundle(folder, configs)
    for names in ("training", "held_out"):
        parser[f"plan#{names}"] = []
    for name in ("modalities", "labels", "regions"):
        parser[f"plan#{name}"] = parser[name]
    parser["plan#data"] = ""
    return parser.get_parsed_content("plan")


def train_bundle(
    console: Console,
    folder: Path,
    configs: Sequence[str],
    data: Path,
    out: Path,
    wishes: Wishes = AS_PLANNED,
    *,
    resample: str = "",
    split: Path | None = None,
    patience: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    **changes: Any,
) -> Path:
    """Trains by a bundle's recipe on the Decathlon folder `data` into `out`; returns the checkpoint.

    `wishes`, `resample` and `split` change its configuration as they change a plan (`train`); `changes` are
    further values of it, such as fold. A run that is in `out` is continued. Writes plan.json too.
    Raises DataError as `read_decathlon` and `read_bundle` do, and for a wish that the bundle's network
    cannot meet.
    """
    check_counts(
        patience=(patience, 1),
        workers=(workers, 0),
        validate_every=(changes.get("val_interval"), 1),
        seed=(changes.get("seed"), 0),
    )
    parser = read_bundle(folder, configs)
    for name, value in _wished(parser, wishes).items():
        parser[name] = value
    changes |= {"patience": patience, "workers": workers, "device": pick_device(device)}
    changes |= {"bundle_root": str(folder), "dataset_dir": str(data), "output_dir": str(out)}
    for name, value in changes.items():
        if value is not None:
            parser[name] = value
    checkpoint = out / "checkpoint.pt"
    with process_group():
        try:
            task = on_one_grid(parser.get_parsed_content("task"), resample)
            if len(task.modalities) != len(parser["modalities"]):
                raise DataError(
                    f"data: modalities {task.modalities}; the bundle needs "
                    f"{tuple(parser['modalities'])}, in this "
                    "order"
                )
            prepare_folder("out", out)
            check_plan(out)
            parser["task"] = task
            parser["plan#resample"] = resample
            if split is not None:
                parser["split"] = read_split(split, task.cases, parser["fold"])
            plan = parser.get_parsed_content("plan")
            if list(task.labels) != list(plan.labels):
                raise DataError(f"data: labels {task.labels}; the bundle needs {plan.labels}")
            if not checkpoint.exists():
                check_best(out / BEST, plan)
                learned = [case for case in task.cases if case.name in plan.training]
                parser["geometries"] = check_cases(console, task, learned)
            trainer = parser.get_parsed_content("train#trainer")
            batches = parser.get_parsed_content("train#crops")
        except RuntimeError as error:  # MONAI's, about the part of the configuration that failed
            raise data_error(error) or error from None
        if checkpoint.exists():
            trainer.resume(checkpoint)
        announce(console, trainer, out)
        fit(console, trainer, batches, checkpoint)
    console.print(f"{trainer.step} steps; network in {checkpoint}", soft_wrap=True)
    return checkpoint


def _wished(parser: ConfigParser, wishes: Wishes) -> dict[str, Any]:
    """The values of the configuration that the wishes change, by their names."""
    simple = ("steps", "batch_size", "learning_rate", "crop", "spacing", "flips")
    found = {name: value for name in simple if (value := getattr(wishes, name)) is not None}
    network = parser["network_arguments"]
    if wishes.rank is not None:
        found["network_arguments#rank"] = wishes.rank
    if wishes.width is not None:
        levels = len(network["encoder_width"])
        if len(wishes.width) != levels:
            raise DataError(
                f"width: got {len(wishes.width)} numbers; the bundle's network has {levels} levels"
            )
        found["network_arguments#encoder_width"] = list(wishes.width)
    if wishes.network is not None:
        patch = network["reshape"][1].get("patch_size", PATCH)
        if wishes.network != "swin" or network["reshape"][0] != "SWMatricize":
            found["network_arguments#reshape"] = list(reshape_for(wishes.network, patch))
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
