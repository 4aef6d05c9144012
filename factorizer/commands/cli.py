"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Segmentation networks on fused matrix-factorisation kernels."""


# --- options that several commands have -----------------------------------------------------------

Checkpoints = Annotated[
    list[Path] | None,
    typer.Option(
        "--checkpoint", help="A trained network; several of them are averaged (give the option again)."
    ),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="In place of a checkpoint: a name of `factorizer models`.")
]
OneCheckpoint = Annotated[Path | None, typer.Option("--checkpoint", help="A trained network.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        help="NIfTI, NRRD or MHA file, folder of files or of a DICOM series, files of one case's modalities "
        "separated by commas, or JSON data list. May be given again.",
    ),
]
Section = Annotated[
    str | None,
    typer.Option(help="List to take from a data list. Default: testing, test, validation or training."),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ... Default: a CUDA GPU if there is one.")
]
Iterations = Annotated[
    int | None,
    typer.Option("--num-iters", help="Iterations of every factorisation; fewer are faster."),
]
Whole = Annotated[
    bool, typer.Option("--whole", help="Whole volumes at once, no sliding window: no seams, more memory.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Write over results that were made from other inputs or settings."),
]
Resample = Annotated[
    str,
    typer.Option(
        help="Bring modalities that lie on other grids to that of the first, or of the one of this name. "
        "Labels stay as they are."
    ),
]
Configs = Annotated[
    list[str] | None,
    typer.Option("--config", help="File of the bundle's configs/ over train.json, such as four_shifts."),
]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError as error:
        raise typer.BadParameter(f"got {text!r}; give whole numbers separated by commas") from error


def _lengths(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise typer.BadParameter(f"got {text!r}; give numbers separated by commas") from error


def _axes(text: str) -> list[int]:
    return [] if text == "none" else _numbers(text)


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
    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps. Default: as many as fit into five minutes here, by a step that is measured."
        ),
    ] = None,
) -> None:
    """Train a small Swin Factorizer, segment held-out volumes, compare speeds, and report."""
    with _errors():
        from factorizer.commands.demo import run_demo

        _keep_memory()
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
    steps: Annotated[int | None, typer.Option(help="Training steps, in place of a budget.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="quick, standard or full: 5 minutes, 90 minutes, 8 hours on this machine. Default: standard."
        ),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint or model file to start from, whatever its classes.")
    ] = None,
    crop: Annotated[
        Any,
        typer.Option(
            help="Voxels of a training crop, such as 96,96,64: right, anterior, superior.", parser=_numbers
        ),
    ] = None,
    spacing: Annotated[
        Any,
        typer.Option(help="Voxel size in mm that volumes are brought to, such as 1,1,2.5.", parser=_lengths),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Crops in a step, of all processes together.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of AdamW, after the warm-up.")] = None,
    network: Annotated[
        str | None, typer.Option(help="swin, local or global: windows shifted, not shifted, or one window.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of every factorisation.")] = None,
    width: Annotated[
        Any,
        typer.Option(help="Channels of each level, finest first, such as 24,48,96.", parser=_numbers),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="half or full: whether the stages work on half of the crop's grid, where a step takes about "
            "a quarter of the time. Default: half for the budget quick on a CPU, else full."
        ),
    ] = None,
    flips: Annotated[
        Any,
        typer.Option(
            help="Axes of mirror images: none, or some of 0 (left-right), 1 (front-back), 2 (bottom-top). "
            "Default: 0, unless classes are sides.",
            parser=_axes,
        ),
    ] = None,
    resample: Resample = "",
    split: Annotated[
        Path | None,
        typer.Option(
            help='JSON file {"training": [names], "held_out": [names]}, or nnU-Net\'s splits_final.json.'
        ),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            help="Fold of five to hold out, or all, for a cross-validation. Default: a fifth of the cases, "
            "at most 40."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the crops.")] = 0,
    validate_every: Annotated[
        int | None,
        typer.Option(help="Steps between validations on the held-out cases. Default: none, or the bundle's."),
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
        from factorizer.commands.cross_validation import cross_validate
        from factorizer.commands.train import train as run
        from factorizer.segmentation.plan import Wishes
        from factorizer.segmentation.screen import console_of_process

        _keep_memory()
        every = fold == "all"
        if not every and fold is not None and not fold.isdecimal():
            _fail(f"fold: got {fold!r}; it must be a number from 0 to 4, or all", 2)
        number = None if every or fold is None else int(fold)
        if grid not in (None, "half", "full"):
            _fail(f"grid: got {grid!r}; it must be half or full", 2)
        wishes = Wishes(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            crop=crop and tuple(crop),
            spacing=spacing and tuple(spacing),
            network=network,
            rank=rank,
            width=width and tuple(width),
            half_grid=None if grid is None else grid == "half",
            flips=None if flips is None else tuple(flips),
        )
        if bundle is not None:
            if every or init is not None or grid is not None or budget is not None:
                _fail("fold all, init, grid, budget: are not for a bundle", 2)

            from factorizer.commands.bundle import train_bundle

            train_bundle(
                console_of_process(),
                bundle,
                config or (),
                data,
                out,
                wishes,
                resample=resample,
                split=split,
                fold=number,
                seed=seed,
                patience=patience,
                workers=workers,
                val_interval=validate_every,
                device=device,
            )
            return
        if config:
            _fail("config: is a file of a bundle, so it needs --bundle", 2)
        options: dict[str, Any] = {
            "resample": resample,
            "budget": budget or "standard",
            "init": init,
            "seed": seed,
            "validate_every": validate_every,
            "patience": patience,
            "device": device,
            "workers": workers,
        }
        if every:
            if split is not None:
                _fail("fold all: the folds are drawn, so it takes no --split", 2)
            cross_validate(console_of_process(), data, out, wishes, **options)
        else:
            run(console_of_process(), data, out, wishes, split=split, fold=number, **options)


@app.command()
def predict(
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Folder for NAME.nii.gz, on the grid of each input.")],
    checkpoint: Checkpoints = None,
    model: ModelName = None,
    section: Section = None,
    resample: Resample = "",
    num_iters: Iterations = None,
    whole: Whole = False,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Average over the mirror images that training drew from. Default: as the model says.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Draw each case: three planes through the largest structure.")
    ] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Write the ml of each class and case to statistics.csv.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write those of each voxel, float16, to NAME.npz.")
    ] = False,
    also: Annotated[
        list[str] | None,
        typer.Option(
            help="Write each label map in this format too: nrrd, mha, or dicom-seg (of a DICOM series). "
            "May be given again."
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(help="Only this part of the cases, such as 3/16: for the jobs of an array, at once."),
    ] = "1/1",
    device: Device = None,
) -> None:
    """Segment volumes. Cases that are done already are skipped; exit code 1 if one failed."""
    with _errors():
        from factorizer.commands.predict import predict as run
        from factorizer.segmentation.screen import console_of_process

        _keep_memory()
        outcomes = run(
            console_of_process(),
            _networks(checkpoint, model),
            input,
            output,
            section=section,
            resample=resample,
            num_iters=num_iters,
            whole=whole,
            mirror=mirror,
            overwrite=overwrite,
            preview=preview,
            statistics=statistics,
            probabilities=probabilities,
            also=also or (),
            part=part,
            device=device,
        )
        if any(outcome.failed for outcome in outcomes):
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
    preview: Annotated[
        bool,
        typer.Option(
            "--preview",
            help="Draw each case beside the scores, over its image where --labels is a data list.",
        ),
    ] = False,
    statistics: Annotated[
        bool,
        typer.Option(
            "--statistics", help="Write the ml of each class, predicted and labelled, beside the scores."
        ),
    ] = False,
) -> None:
    """Dice and HD95 of each class and case; exit code 1 if a case failed."""
    with _errors():
        from rich.console import Console

        from factorizer.segmentation.evaluation import evaluate as run

        if run(
            Console(markup=False),
            predictions,
            labels,
            output,
            checkpoint,
            preview=preview,
            statistics=statistics,
        ):
            raise typer.Exit(1)


@app.command()
def explain(
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Folder for components, figures and components.csv.")],
    checkpoint: OneCheckpoint = None,
    model: ModelName = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="shallow, deep, all, or a mixer's name. Default: shallow and deep."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Folder with NAME.nii.gz, Decathlon folder, or data list. Without labels: the prediction."
        ),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(help="Modality under the figures. Default: the one that shows the classes best."),
    ] = None,
    section: Section = None,
    resample: Resample = "",
    overwrite: Overwrite = False,
    num_iters: Iterations = None,
    whole: Whole = False,
    device: Device = None,
) -> None:
    """Write NMF components as NIfTI and figures, ranked by their agreement with each class."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.explain import explain as run

        _keep_memory()
        if run(
            Console(markup=False),
            _networks([checkpoint] if checkpoint else None, model)[0],
            input,
            output,
            layers=layer or ("shallow", "deep"),
            labels=labels,
            section=section,
            resample=resample,
            num_iters=num_iters,
            whole=whole,
            background=background,
            overwrite=overwrite,
            device=device,
        ):
            raise typer.Exit(1)


@app.command()
def speed(
    input: Inputs,
    output: Annotated[Path, typer.Option(help="Folder for speed.csv and speed.png.")],
    checkpoint: OneCheckpoint = None,
    model: ModelName = None,
    num_iters: Annotated[
        Any, typer.Option(help="Numbers of iterations, separated by commas.", parser=_numbers)
    ] = "0,1,2,3,5,10",
    ranks: Annotated[Any, typer.Option(help="Ranks, separated by commas.", parser=_numbers)] = "1,2,4",
    cases: Annotated[int, typer.Option(help="Cases at most, held-out ones first.")] = 10,
    section: Section = None,
    whole: Whole = False,
    device: Device = None,
) -> None:
    """Dice and time of a trained network against its iterations and its rank: a table and a plot."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.speed import speed as run

        _keep_memory()
        _, failed = run(
            Console(markup=False),
            _networks([checkpoint] if checkpoint else None, model)[0],
            input,
            output,
            num_iters=num_iters,
            ranks=ranks,
            max_cases=cases,
            section=section,
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

        run(Console(markup=False), source, output, plan=plan, bundle=bundle, configs=config or ())


@app.command()
def doctor() -> None:
    """Versions, devices and backends; is every usable backend right, and how fast is it?"""
    from rich.console import Console

    from factorizer.commands.doctor import doctor as run

    if not run(Console(markup=False)):
        raise typer.Exit(1)


# --- trained networks -----------------------------------------------------------------------------

models = typer.Typer(help="Trained networks: list them, read their cards, give one away.")
app.add_typer(models, name="models")


@models.callback(invoke_without_command=True)
def list_models(context: typer.Context) -> None:
    """List the trained networks that `predict --model` knows."""
    if context.invoked_subcommand is None:
        with _errors():
            from rich.console import Console

            from factorizer.commands.models import show_models

            show_models(Console(markup=False))


@models.command()
def card(name: Annotated[str, typer.Argument(help="One of `factorizer models`.")]) -> None:
    """Print what a network was trained on, how well it does, and what it is not for."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.models import show_card

        show_card(Console(markup=False), name)


@models.command()
def export(
    checkpoint: Annotated[list[Path], typer.Option(help="A trained network; may be given again.")],
    output: Annotated[Path, typer.Option(help="The model file, such as mine.pt.")],
    card: Annotated[Path | None, typer.Option(help="Markdown file that goes into the model file.")] = None,
    mirror: Annotated[
        bool | None,
        typer.Option(
            "--mirror/--no-mirror",
            help="Predict over mirror images by default. Default: as the model files say; not for "
            "checkpoints.",
        ),
    ] = None,
) -> None:
    """Write one or several networks as one file, in half precision."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.models import export as run

        run(Console(markup=False), checkpoint, output, card=card, mirror=mirror)


@models.command("import")
def take(
    file: Annotated[Path, typer.Argument(help="A model file, or a checkpoint.")],
    name: Annotated[str | None, typer.Option(help="Default: the file's.")] = None,
) -> None:
    """Copy a model file into the folder of one's own, which FACTORIZER_MODELS may name."""
    with _errors():
        from rich.console import Console

        from factorizer.commands.models import take as run

        run(Console(markup=False), file, name)


# --- what commands share ---------------------------------------------------------------------------


def _networks(checkpoints: list[Path] | None, model: str | None) -> list[Path]:
    """The files that --checkpoint or --model name. Raises DataError unless one of the two is given."""
    from factorizer.segmentation.errors import DataError
    from factorizer.segmentation.trained import find_model

    if bool(checkpoints) == (model is not None):
        raise DataError("checkpoint, model: give one of them")
    return [find_model(model)] if model is not None else list(checkpoints or ())


def _keep_memory() -> None:
    """For commands that run a network on large maps."""
    from factorizer_kernels import keep_freed_memory

    keep_freed_memory()


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


def _fail(message: str, code: int) -> None:
    typer.secho(message, err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def _command() -> str:
    return shlex.join(["factorizer", *sys.argv[1:]])


def main() -> None:
    """Console entry point."""
    # Read when torch is loaded. OpenMP's threads spin while they wait: beside another busy process that slows
    # both 2 to 4 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that a terminal cannot show ends no command
            stream.reconfigure(errors="replace")
    app()
