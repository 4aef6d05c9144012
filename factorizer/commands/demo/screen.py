"""What the demo shows in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from factorizer.segmentation.plan import Plan
from factorizer.segmentation.screen import count, duration, facts, table


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
    rows: dict[str, str | Text] = {
        "task": f"{plan.task}: {', '.join(plan.classes)}",
        "data": Text(source, style="bold yellow" if synthetic else ""),
        "modalities": ", ".join(plan.modalities),
        "cases": f"{len(plan.training)} to train on, {len(plan.held_out)} held out (seed {plan.seed})",
        "network": f"Swin Factorizer, widths {widths}, {parameters:,} parameters",
        "training": f"{plan.steps} steps of {plan.batch_size} crops of {size} voxels",
        "kernels": f"{backend} backend, threads: {torch.get_num_threads()}",
    }
    if steps_done:
        rows["resumes"] = f"{steps_done} steps are done, {plan.steps - steps_done} to go"
    rows["time expected"] = f"about {duration(seconds)} to train and segment"
    console.print(facts("factorizer demo", rows | {"results in": str(out)}))


def tell_shipped(console: Console, found: dict[str, Any], folder: Path) -> None:
    """What the shipped model made of the held-out cases."""
    dice = ", ".join(f"{name} {value:.3f}" for name, value in found["dice"].items())
    known = "it was trained on" if found["trained_on_them"] else "it has not seen"
    console.print(
        f"The shipped model {found['model']!r} segmented {count(found['cases'], 'case')} that {known} in "
        f"{duration(found['seconds'])}: Dice {dice}; in {folder}. Now a training from the start:",
        soft_wrap=True,
    )


def conclude(console: Console, report: dict[str, Any], out: Path) -> None:
    """The tables of Dice and of times, and where everything is."""
    synthetic = " SYNTHETIC" if report["synthetic"] else ""
    cases = len(report["split"]["held_out"])
    shown = table(f"Dice, held-out{synthetic} cases: {cases}", "class", "mean", "lowest", "highest")
    for name, mean in report["dice"].items():
        values = [value for case in report["dice_per_case"].values() if (value := case[name]) is not None]
        lowest, highest = (min(values), max(values)) if values else (None, None)
        shown.add_row(name, _score(mean), _score(lowest), _score(highest))
    console.print(shown)

    timings = report["timings"]
    rows = timings["networks"]
    crop = " x ".join(str(length) for length in timings["forward_input"][2:])
    title = f"Medians, taken side by side; {crop} voxels; threads: {timings['threads']}"
    shown = table(title, "network", "parameters", "forward", "training step", "ratio")
    for row in rows:
        shown.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{row['forward_ms']:.0f} ms",
            f"{row['training_step_ms']:.0f} ms",
            f"{row['training_step_ms'] / rows[0]['training_step_ms']:.2f}",
        )
    console.print(shown)
    console.print(f"{duration(report['seconds'])} in all. Results in {out}:")
    console.print("  report.json, segmentation.png, components.png, predictions/, checkpoint.pt")


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
