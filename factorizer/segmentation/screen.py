"""What long work shows in the terminal: bars, tables, and the cases that failed.

Names of classes, cases and folders may hold brackets, which rich would take for its markup: the commands'
consoles are made without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError

T = TypeVar("T")
LINE_SECONDS = 60.0  # between two lines of a log file, where a bar would be seen at its end alone


def console_of_process() -> Console:
    """The terminal; where torchrun started several processes all but the first are silent."""
    return Console(quiet=int(os.environ.get("RANK", 0)) > 0, markup=False)


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


def log_lines(console: Console) -> Callable[[str], None]:
    """Prints what it is called with where the console is no terminal, a line in LINE_SECONDS at most."""
    told = time.perf_counter()

    def tell(text: str) -> None:
        nonlocal told
        if not console.is_terminal and time.perf_counter() - told >= LINE_SECONDS:
            console.print(text, soft_wrap=True, markup=False, highlight=False)
            told = time.perf_counter()

    return tell


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What became of the work on one case: its result, or why it failed, and the seconds it took."""

    name: str
    result: T | None = None
    reason: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return bool(self.reason)


def each_case(
    console: Console, cases: Sequence[Case], description: str, work: Callable[[Case], T]
) -> list[Outcome[T]]:
    """Does `work` on each case, with a bar.

    Whatever goes wrong with a case (an unreadable file, a full disk, too little memory) must not end the
    others: every error is caught here and told at once.
    """
    outcomes: list[Outcome[T]] = []
    tell = log_lines(console)
    with progress(console) as bar:
        for case in bar.track(cases, description=description):
            start, result, reason = time.perf_counter(), None, ""
            try:
                result = work(case)
            except DataError as error:
                reason = str(error)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(case.name, result, reason, time.perf_counter() - start))
            tell_failures(console, outcomes[-1:])
            tell(f"{description}: {len(outcomes)} of {count(len(cases), 'case')}")
    return outcomes


def tell_failures(console: Console, outcomes: Sequence[Outcome[T]]) -> None:
    """A line for each case that failed, with the reason."""
    for outcome in outcomes:
        if outcome.failed:
            text = Text.assemble((f"{outcome.name}: failed:", "red"), f" {outcome.reason}")
            console.print(text, soft_wrap=True, highlight=False)


def count(number: int, noun: str) -> str:
    """Such as "1 case", "2 cases"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def tell_warning(console: Console, text: str) -> None:
    """What is allowed, and seldom meant."""
    console.print(Text.assemble(("warning:", "yellow"), f" {text}"), soft_wrap=True, highlight=False)


def table(title: str, *columns: str, texts: int = 1) -> Table:
    """A table whose first `texts` columns are text and whose others are numbers."""
    made = Table(title=title, title_justify="left", min_width=min(len(title), 80))
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number >= texts else "left", overflow="fold")
    return made


def facts(title: str, values: Mapping[str, str | Text]) -> Table:
    """A table of names and what they stand for."""
    made = table(title, "", "", texts=2)
    made.show_header = False
    for name, value in values.items():
        made.add_row(name, value)
    return made
