"""What the commands take from a MONAI bundle of `bundles/`: its recipe, or its plan alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from rich.console import Console

from factorizer.segmentation.cases import Task
from factorizer.segmentation.errors import DataError, check_counts, data_error
from factorizer.segmentation.files import prepare_folder
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.processes import pick_device, process_group
from factorizer.segmentation.training import fit
from factorizer.segmentation.volumes import check_cases


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
    """The plan of a bundle, without the names of cases."""
    parser = read_bundle(folder, configs)
    for names in ("training", "held_out"):
        parser[f"plan#{names}"] = []
    return parser.get_parsed_content("plan")


def train_bundle(
    console: Console,
    folder: Path,
    configs: Sequence[str],
    data: Path,
    out: Path,
    *,
    steps: int | None = None,
    patience: int | None = None,
    workers: int | None = None,
    device: str | None = None,
    **changes: Any,
) -> Path:
    """Trains by a bundle's recipe on the Decathlon folder `data` into `out`; returns the checkpoint.

    `changes` are further values of its configuration, such as fold. A run that is in `out` is continued.
    Raises DataError as `read_decathlon` and `read_bundle` do.
    """
    check_counts(steps=(steps, 1), patience=(patience, 1), workers=(workers, 0))
    prepare_folder("out", out)
    changes |= {"steps": steps, "patience": patience, "workers": workers}
    paths = {"bundle_root": str(folder), "dataset_dir": str(data), "output_dir": str(out)}
    parser = read_bundle(folder, configs, **paths, **changes, device=pick_device(device))
    checkpoint = out / "checkpoint.pt"
    with process_group():
        try:
            task = parser.get_parsed_content("task")
            _check_task(task, parser.get_parsed_content("plan"))
            if not checkpoint.exists():
                geometries = check_cases(console, task)
                if "geometries" in parser["train#dataset"]:
                    parser["train#dataset#geometries"] = geometries
            trainer = parser.get_parsed_content("train#trainer")
            crops = parser.get_parsed_content("train#crops")
        except RuntimeError as error:  # MONAI's, about the part of the configuration that failed
            raise data_error(error) or error from None
        fit(console, trainer, crops, checkpoint)
    console.print(f"{trainer.step} steps; network in {checkpoint}", soft_wrap=True)
    return checkpoint


def _check_task(task: Task, plan: Plan) -> None:
    """Whether the data are what the bundle is for, as far as dataset.json tells."""
    if len(task.modalities) != len(plan.modalities):
        raise DataError(
            f"data: modalities {task.modalities}; the bundle needs {plan.modalities}, in this order"
        )
    if list(task.labels) != list(plan.labels):
        raise DataError(f"data: labels {task.labels}; the bundle needs {plan.labels}")
