"""What the commands show in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from factorizer.segmentation.processes import place


def console_of_process() -> Console:
    """The terminal; where torchrun started several processes all but the first are silent."""
    return Console(quiet=place()[0] > 0)


def progress(console: Console) -> Progress:
    """A bar with the count, the time taken and the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def tell_failure(console: Console, name: str, reason: str) -> None:
    """One case that failed, and why."""
    console.print(f"[red]{escape(name)}: failed:[/] {escape(reason)}", soft_wrap=True, highlight=False)


def count(number: int, noun: str) -> str:
    """Such as "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", min_width=min(len(title), 80))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    return made


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
