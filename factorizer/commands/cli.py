"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Segmentation networks on fused matrix-factorisation kernels."""


# --- options that several commands have -----------------------------------------------------------

Checkpoints = Annotated[
    list[Path],
    typer.Option(
        "--checkpoint", help="A trained network; several of them are averaged (give the option again)."
    ),
]
Checkpoint = Annotated[Path, typer.Option(help="A trained network.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="NIfTI file, files of one case's modalities separated by commas, folder, or JSON data list. "
        "May be given again.",
    ),
]
Section = Annotated[
    str | None,
    typer.Option(help="List to take from a data list. Default: testing, test, validation or training."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")]
Iterations = Annotated[
    int | None,
    typer.Option("--num-iters", help="Iterations of every factorisation; fewer are faster.", min=0),
]
Whole = Annotated[
    bool, typer.Option("--whole", help="Whole volumes at once, no sliding window: no seams, more memory.")
]
Steps = Annotated[int | None, typer.Option(help="Training steps. Default: derived from the data's size.")]
Configs = Annotated[
    list[str] | None,
    typer.Option("--config", help="File of the bundle's configs/ over train.json, such as four_shifts."),
]


# --- commands -------------------------------------------------------------------------------------


@app.command()
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="Folder in the Decathlon's layout. Without it the demo draws its own."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the results; one with a checkpoint is continued.")
    ] = Path("runs/demo"),
    steps: Steps = None,
) -> None:
    """Train a small Swin Factorizer, segment held-out volumes, compare speeds, and report."""
    with _errors():
        from factorizer.commands.demo import run_demo

        run_demo(out, data, steps=steps)


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Folder in the Decathlon's layout.")],
    out: Annotated[Path, typer.Option(help="Folder for the run; one with a checkpoint is continued.")],
    bundle: Annotated[
        Path | None,
        typer.Option(help="MONAI bundle whose recipe to follow, such as bundles/brats_factorizer."),
    ] = None,
    config: Configs = None,
    steps: Steps = None,
    fold: Annotated[
        int | None, typer.Option(help="Fold of five to hold out. Default: a fifth of the cases, at most 40.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the crops.")] = 0,
    validate_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between validations on the held-out cases. Default: none, or the bundle's.", min=1
        ),
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many validations without a better one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that prepare batches. Default: 4 with a GPU, else none.")
    ] = None,
    device: Device = None,
) -> None:
    """Train a network; spacing, crop, channels and classes come from the data.

    For several GPUs: torchrun --nproc-per-node=N -m factorizer train ...
    """
    with _errors():
        from factorizer.commands.train import train as run
        from factorizer.segmentation.screen import console_of_process

        if bundle is not None:
            from factorizer.commands.bundle import train_bundle

            train_bundle(
                console_of_process(),
                bundle,
                config or (),
                data,
                out,
                steps=steps,
                fold=fold,
                seed=seed,
                patience=patience,
                workers=workers,
                val_interval=validate_every,
                device=device,
            )
            return
        if config:
            _fail("config: is a file of a bundle, so it needs --bundle", 2)
        run(
            console_of_process(),
            data,
            out,
            steps=steps,
            seed=seed,
            fold=fold,
            validate_every=validate_every,
            patience=patience,
            device=device,
            workers=workers,
        )


@app.command()
def predict(
    checkpoint: Checkpoints,
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Folder for NAME.nii.gz, on the grid of each input.")],
    section: Section = None,
    num_iters: Iterations = None,
    whole: Whole = False,
    mirror: Annotated[
        bool, typer.Option("--mirror", help="Average over the mirror images that training drew from.")
    ] = False,
    device: Device = None,
) -> None:
    """Segment volumes. Cases that are done already are skipped; exit code 1 if one failed."""
    with _errors():
        from factorizer.commands.predict import predict as run
        from factorizer.segmentation.screen import console_of_process

        outcomes = run(
            console_of_process(),
            checkpoint,
            input,
            output,
            section=section,
            iterations=num_iters,
            whole=whole,
            mirror=mirror,
            device=device,
        )
        if any(outcome.state == "failed" for outcome in outcomes):
            raise typer.Exit(1)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Option(help="Folder with the NAME.nii.gz to be measured.")],
    labels: Annotated[
        Path, typer.Option(help="Folder with NAME.nii.gz, Decathlon folder, or data list with labels.")
    ],
    output: Annotated[Path, typer.Option(help="CSV file for the scores of each case.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="Names the classes, and the regions that are measured.")
    ] = None,
) -> None:
    """Dice and HD95 of each class and case; exit code 1 if a case failed."""
    with _errors():
        from rich.console import Console

        from factorizer.segmentation.evaluation import evaluate as run

        if run(Console(), predictions, labels, output, checkpoint):
            raise typer.Exit(1)


@app.command()
def explain(
    checkpoint: Checkpoint,
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Folder for components, figures and components.csv.")],
    layer: Annotated[
        list[str] | None,
        typer.Option(help="shallow, deep, all, or a mixer's name. Default: shallow and deep."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Folder with NAME.nii.gz. Without labels: the prediction.")
    ] = None,
    section: Section = None,
    num_iters: Iterations = None,
    whole: Whole = False,
    device: Device = None,
) -> None:
    """Write NMF components as NIfTI and figures, ranked by their agreement with each class."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.explain import explain as run

        if run(
            Console(),
            checkpoint,
            input,
            output,
            layers=layer or ("shallow", "deep"),
            labels=labels,
            section=section,
            iterations=num_iters,
            whole=whole,
            device=device,
        ):
            raise typer.Exit(1)


@app.command()
def speed(
    checkpoint: Checkpoint,
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Folder for speed.csv and speed.png.")],
    num_iters: Annotated[
        str, typer.Option(help="Numbers of iterations, separated by commas.")
    ] = "0,1,2,3,5,10",
    ranks: Annotated[str, typer.Option(help="Ranks, separated by commas.")] = "1,2,4",
    cases: Annotated[int, typer.Option(help="Cases at most, held-out ones first.", min=1)] = 10,
    section: Section = None,
    whole: Whole = False,
    device: Device = None,
) -> None:
    """Dice and time of a trained network against its iterations and its rank: a table and a plot."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.speed import speed as run

        _, failed = run(
            Console(),
            checkpoint,
            input,
            output,
            num_iters=_numbers("num-iters", num_iters),
            ranks=_numbers("ranks", ranks),
            section=section,
            limit=cases,
            whole=whole,
            device=device,
        )
        if failed:
            raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Weights: a state dict, or a checkpoint that holds one.")],
    output: Annotated[Path, typer.Option(help="File for the checkpoint.")],
    plan: Annotated[Path | None, typer.Option(help="plan.json of a training run.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="MONAI bundle of the network.")] = None,
    config: Configs = None,
) -> None:
    """Make a checkpoint of weights of the published code, or of the paper's time."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.convert import convert as run

        run(Console(), source, output, plan=plan, bundle=bundle, configs=config or ())


@app.command()
def doctor() -> None:
    """Versions, devices and backends; is every usable backend right, and how fast is it?"""
    from rich.console import Console

    from factorizer.commands.doctor import doctor as run

    if not run(Console()):
        raise typer.Exit(1)


# --- ends -----------------------------------------------------------------------------------------


@contextmanager
def _errors() -> Iterator[None]:
    """What a user can mend ends with exit code 2 and a line, an interruption with 130."""
    from factorizer.segmentation.errors import DataError

    try:
        yield
    except (DataError, OSError, FloatingPointError) as error:
        text = str(error).rstrip()
        if text.startswith("Caught "):  # a process that prepares batches sends its traceback with the message
            text = text.splitlines()[-1].partition(": ")[2]
        _fail(text, 2)
    except KeyboardInterrupt:
        _fail(f"Interrupted. To continue: {_command()}", 130)


def _numbers(option: str, text: str) -> list[int]:
    from factorizer.segmentation.errors import DataError

    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise DataError(f"{option}: got {text!r}; give whole numbers separated by commas") from error


def _fail(message: str, code: int) -> None:
    typer.secho(message, err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def _command() -> str:
    return shlex.join(["factorizer", *sys.argv[1:]])


def main() -> None:
    """Console entry point."""
    # Read when torch is loaded. OpenMP's threads spin while they wait: beside another busy process that slows
    # both 2 to 4 times. Tensors in pages of 2 MB spare page faults, a tenth of a network's time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    app()
