"""Tables and plots of a stored run: ``python -m benchmarks.report RUN.json [FOLDER]``.

Writes <machine>.md, <machine>.json (the run) and <machine>-*.png into the folder, docs/benchmarks unless
told otherwise. Everything is computed from the JSON that pytest-benchmark stored.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from .numbers import NUMBERS

Record = dict[str, Any]
FOLDER = Path("docs/benchmarks")
COMMAND = "make bench"


# --- lines and tables ----------------------------------------------------------------------------


def summary_lines(records: list[Record]) -> Iterable[str]:
    """One line for each group: ours, and the others as multiples of it."""
    for group, members in _groups(records):
        by_name = {r["name"]: r for r in members}
        ours = by_name.pop("ours", None)
        if ours is not None:
            others = (f"{name} x{r['extra_info']['x_ours']:.3g}" for name, r in by_name.items())
            yield f"{group}: ours {_time(ours)}; {', '.join(others)}"


def number_lines(records: list[Record]) -> list[str]:
    """The bounds of numbers.py beside what was measured, as a Markdown table."""
    rows = []
    for number in NUMBERS[records[0]["extra_info"]["device"]] if records else ():
        value = number.measure(records)
        if value is not None:
            verdict = next(
                (
                    word
                    for word, bound in (("aim", number.aim), ("must", number.must))
                    if number.met(value, bound)
                ),
                "missed",
            )
            aim = "" if number.aim is None else f"{number.sense} {number.aim:g}"
            rows.append((number.what, f"{number.sense} {number.must:g}", aim, f"{value:.3g}", verdict))
    return table(("what", "must", "aim", "measured", "met"), rows) if rows else []


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table, padded so that it reads in a terminal too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]


_COLUMNS: dict[str, Callable[[Record], str]] = {
    "": lambda r: r["name"],
    "median": lambda r: _time(r),
    "IQR": lambda r: f"{r['stats']['iqr'] / r['stats']['median']:.0%}",
    "rounds": lambda r: str(r["stats"]["rounds"]),
    "x relu": lambda r: _number(r["extra_info"].get("x_relu")),
    "x ours": lambda r: _number(r["extra_info"].get("x_ours")),
    "peak MiB": lambda r: _number(r["extra_info"].get("peak_bytes"), 2**20),
    "kept MiB": lambda r: _number(r["extra_info"].get("kept_bytes"), 2**20),
    "residual": lambda r: _number(r["extra_info"].get("residual")),
    "parameters M": lambda r: _number(r["extra_info"].get("parameters"), 1e6),
    "GFLOP": lambda r: _number(r["extra_info"].get("flops"), 1e9),
    "backend": lambda r: r["extra_info"].get("backend", ""),
}


def group_tables(records: list[Record]) -> Iterable[str]:
    for family, members in groupby(records, lambda r: r["extra_info"]["family"]):
        yield f"## {family}\n"
        for group, rows in _groups(list(members)):
            rows = sorted(rows, key=lambda r: r["stats"]["median"])
            cells = {head: [cell(r) for r in rows] for head, cell in _COLUMNS.items()}
            cells = {head: column for head, column in cells.items() if any(column)}
            yield f"### {group}\n"
            yield from table(cells, zip(*cells.values(), strict=True))
            yield ""


def _groups(records: list[Record]) -> Iterable[tuple[str, list[Record]]]:
    return ((group, list(members)) for group, members in groupby(records, lambda r: r["group"]))


def _time(record: Record) -> str:
    seconds = record["stats"]["median"]
    unit, scale = next(u for u in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)) if seconds >= u[1] or u[0] == "µs")
    return f"{seconds / scale:.3g} {unit}"


def _number(value: float | None, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.3g}"


# --- plots ---------------------------------------------------------------------------------------


def plots(records: list[Record]) -> Iterable[tuple[str, str, Any]]:
    """(name, caption, figure) of each plot that the run has data for."""
    volumes = [r for r in records if r["extra_info"]["family"] == "swin_nmf volume"]
    if volumes:
        yield (
            "time",
            "Time against voxels of a 32-channel volume. The grey lines are linear and quadratic growth.",
            _against_voxels(volumes, lambda r: 1e3 * r["stats"]["median"], "ms"),
        )
    if any(r["extra_info"]["peak_bytes"] for r in volumes):
        yield (
            "memory",
            "Peak memory of one call, beside its input: the output included.",
            _against_voxels(volumes, lambda r: (r["extra_info"]["peak_bytes"] or 0) / 2**20, "MiB"),
        )
    networks = [r for r in records if r["extra_info"]["family"] == "network"]
    if networks:
        yield "networks", "Whole networks: time and peak memory of one call.", _network_bars(networks)


def _against_voxels(records: list[Record], value: Callable[[Record], float], unit: str):
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(r["extra_info"]["mode"] for r in records))
    names = list(dict.fromkeys(r["name"] for r in records))
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False, sharey=True)[0], modes, strict=True):
        for colour, name in enumerate(names):
            points = sorted(
                (r["extra_info"]["voxels"], value(r))
                for r in records
                if (r["extra_info"]["mode"], r["name"]) == (mode, name) and value(r) > 0
            )
            if points:
                style = {"linewidth": 2.5, "zorder": 3} if name == "ours" else {"linewidth": 1.2}
                axes.plot(
                    *zip(*points, strict=True), "o-", color=f"C{colour}", label=name, markersize=4, **style
                )
        axes.set(xscale="log", yscale="log", xlabel="voxels", title=mode)
        _growth(axes)
    figure.axes[0].set_ylabel(unit)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _growth(axes) -> None:
    """Lines of slope one and two across the plot, through its lower left corner."""
    (left, right), limits = axes.get_xlim(), axes.get_ylim()
    for power in (1, 2):
        axes.plot(
            [left, right], [limits[0], limits[0] * (right / left) ** power], "--", color="0.8", zorder=0
        )
    axes.set(xlim=(left, right), ylim=limits)


def _network_bars(records: list[Record]):
    from matplotlib.figure import Figure

    panels = {
        "seconds": lambda r: r["stats"]["median"],
        "peak GiB": lambda r: (r["extra_info"]["peak_bytes"] or 0) / 2**30,
    }
    groups = list(dict.fromkeys(r["group"] for r in records))
    figure = Figure(figsize=(11, 2.8 * len(groups)), layout="constrained")
    for row, group in zip(figure.subplots(len(groups), len(panels), squeeze=False), groups, strict=True):
        members = sorted((r for r in records if r["group"] == group), key=panels["seconds"])[::-1]
        colours = ["C0" if r["name"].startswith("ours") else "0.7" for r in members]
        for axes, (unit, value) in zip(row, panels.items(), strict=True):
            bars = axes.barh([r["name"] for r in members], [value(r) for r in members], color=colours)
            axes.bar_label(bars, fmt=" %.2f", fontsize=8)
            axes.margins(x=0.15)
            axes.set(xlabel=unit, title=group)
    return figure


# --- the page ------------------------------------------------------------------------------------


def machine(run: dict[str, Any]) -> str:
    """The name of the machine's files."""
    info = run["machine_info"]
    name = f"{info['device']} {info['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def page(run: dict[str, Any], images: Iterable[tuple[str, str]], command: str = "") -> str:
    """Markdown; ``command`` is what made the run, where it was not ``COMMAND``."""
    info, commit, records = run["machine_info"], run["commit_info"], run["benchmarks"]
    command = command or f"`{COMMAND}` (`--size {info['size']}`)"
    versions = ", ".join(f"{name} {v}" for name, v in info["versions"].items() if v)
    backends = "; ".join(f"{name} ({reason})" for name, reason in info["backends"].items())
    state = ", with uncommitted changes" if commit.get("dirty") else ""
    lines = [
        f"# Benchmarks: {info['device']}, {info['threads']} threads\n",
        f"Made by {command} on {run['datetime'][:10]} at commit "
        f"{str(commit.get('id'))[:12]}{state}; {versions}, Python {info['python_version']}. "
        f"Backends: {backends}. How it is measured: benchmarks/README.md.\n",
        "Medians; the IQR is relative to its median. `peak` is what one call takes beside what is there "
        "before it, `kept` what autograd keeps beside x.\n",
    ]
    if numbers := number_lines(records):
        lines += ["## Numbers to be held to\n", *numbers, ""]
    lines += [f"![{caption}]({file})\n\n*{caption}*\n" for file, caption in images]
    return "\n".join([*lines, *group_tables(records)])


def write(source: Path, folder: Path = FOLDER) -> Path:
    """Write the page, its plots and a copy of the run; returns the page's path."""
    run = json.loads(source.read_text())
    if not run["benchmarks"]:
        raise ValueError(f"{source} must hold a run with benchmarks, got one with none")
    folder.mkdir(parents=True, exist_ok=True)
    name = machine(run)
    images = []
    for plot, caption, figure in plots(run["benchmarks"]):
        images.append((f"{name}-{plot}.png", caption))
        _replace(
            folder / images[-1][0], lambda path, figure=figure: figure.savefig(path, format="png", dpi=110)
        )
    _replace(folder / f"{name}.json", lambda path: path.write_bytes(source.read_bytes()))
    _replace(folder / f"{name}.md", lambda path: path.write_text(page(run, images)))
    return folder / f"{name}.md"


def _replace(path: Path, save: Callable[[Path], Any]) -> None:
    """A killed run leaves no half-written file under its final name."""
    temporary = path.with_name(f".{path.name}.part")
    save(temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    print(write(*map(Path, sys.argv[1:])))
