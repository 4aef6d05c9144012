"""What the demo shows in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from factorizer.segmentation.plan import Plan
from factorizer.segmentation.screen import duration


def announce(
    console: Console,
    plan: Plan,
    *,
    source: str,
    synthetic: bool,
    parameters: int,
    backend: str,
    steps_done: int,
    seconds: float,
    out: Path,
) -> None:
    """Say what the run will do, and about how long it will take."""
    size = " x ".join(str(length) for length in plan.crop)
    widths = ", ".join(str(width) for width in plan.network["encoder_width"])
    table = Table(title="factorizer demo", show_header=False, title_justify="left")
    table.add_row("task", f"{plan.task}: {', '.join(plan.classes)}")
    table.add_row("data", f"[bold yellow]{source}[/]" if synthetic else source)
    table.add_row("modalities", ", ".join(plan.modalities))
    table.add_row(
        "cases",
        f"{len(plan.training)} to train on, {len(plan.held_out)} held out (seed {plan.seed})",
    )
    table.add_row("network", f"Swin Factorizer, widths {widths}, {parameters:,} parameters")
    table.add_row("training", f"{plan.steps} steps of {plan.batch_size} crops of {size} voxels")
    table.add_row("kernels", f"{backend} backend, threads: {torch.get_num_threads()}")
    if steps_done:
        table.add_row("resumes", f"{steps_done} steps are done, {plan.steps - steps_done} to go")
    table.add_row("time expected", f"about {duration(seconds)} to train and segment")
    table.add_row("results in", str(out))
    console.print(table)


def conclude(console: Console, report: dict[str, Any], out: Path) -> None:
    """The tables of Dice and of times, and where everything is."""
    synthetic = " SYNTHETIC" if report["synthetic"] else ""
    count = len(report["split"]["held_out"])
    title = f"Dice, held-out{synthetic} cases: {count}"
    table = Table(title=title, title_justify="left", min_width=len(title))
    for column in ("class", "mean", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, mean in report["dice"].items():
        values = [value for case in report["dice_per_case"].values() if (value := case[name]) is not None]
        lowest, highest = (min(values), max(values)) if values else (None, None)
        table.add_row(name, _score(mean), _score(lowest), _score(highest))
    console.print(table)

    timings = report["timings"]
    rows = timings["networks"]
    crop = " x ".join(str(length) for length in timings["forward_input"][2:])
    table = Table(
        title=f"Medians, taken side by side; {crop} voxels; threads: {timings['threads']}",
        title_justify="left",
    )
    table.add_column("network")
    for column in ("parameters", "forward", "training step", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['forward_ms']:.0f} ms",
            f"{row['training_step_ms']:.0f} ms",
            f"{row['training_step_ms'] / rows[0]['training_step_ms']:.2f}",
        )
    console.print(table)
    console.print(f"{duration(report['seconds'])} in all. Results in {out}:")
    console.print("  report.json, segmentation.png, components.png, predictions/, checkpoint.pt")


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
