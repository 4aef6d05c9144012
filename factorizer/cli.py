"""The command line. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """Segmentation networks on fused matrix-factorisation kernels."""


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
        int | None, typer.Option(help="Training steps. Default: derived from the data's size.")
    ] = None,
) -> None:
    """Train a small Swin Factorizer, segment held-out volumes, compare speeds, and report."""
    try:
        from factorizer.data import DataError
        from factorizer.demo import run_demo

        run_demo(out, data, steps=steps)
    except DataError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(f"Interrupted. To continue from the last checkpoint: {_command()}", 130)


def _fail(message: str, code: int) -> None:
    typer.secho(message, err=True, fg=typer.colors.RED)
    raise typer.Exit(code)


def _command() -> str:
    return shlex.join(["factorizer", *sys.argv[1:]])


def main() -> None:
    """Console entry point."""
    # OpenMP's threads spin while they wait; beside another busy process that slows both 2 to 4 times.
    # It is read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
