"""factorizer predict: label maps for NIfTI volumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from factorizer import set_num_iters
from factorizer.data import Case, DataError, atomic, find_cases, prepare_folder
from factorizer.inference import Outcome, Predictor, load_network, peak_memory, segment_cases
from factorizer.processes import gather, pick_device, place, process_group
from factorizer.screen import progress, tell_failure

SETTINGS = "settings.json"


def predict(
    console: Console,
    checkpoints: Sequence[Path],
    inputs: Sequence[str | Path],
    out: Path,
    *,
    section: str | None = None,
    iterations: int | None = None,
    whole: bool = False,
    mirror: bool = False,
    device: str | None = None,
) -> list[Outcome]:
    """Segments the cases that `inputs` name (`factorizer.data.find_cases`) into out/NAME.nii.gz.

    Where torchrun started several processes each takes its part of the cases. Returns what became of each
    case, of all processes. Cases whose file is there are skipped (`run_cases`).

    Raises DataError for checkpoints, inputs or an `out` that cannot be used.
    """
    predictor = load_predictor(checkpoints, device=device, iterations=iterations, whole=whole, mirror=mirror)
    cases = find_cases(inputs, section)
    prepare_folder("output", out, cases)
    part, parts = place()
    with process_group():  # which ends together: torchrun stops the others where one ends with an error
        own = run_cases(console, predictor, cases[part::parts], out)
        outcomes = gather(own)
    for outcome in outcomes[len(own) :]:  # the first process's come first, and it alone has a screen
        if outcome.state == "failed":
            tell_failure(console, outcome.name, outcome.reason)
    memory = peak_memory(predictor.device) / 2**30
    where = "GPU memory" if predictor.device.type == "cuda" else "memory of the process"
    counts = [sum(o.state == state for o in outcomes) for state in ("done", "skipped", "failed")]
    seconds = [o.seconds for o in outcomes if o.state == "done"]
    mean = f", {sum(seconds) / len(seconds):.2f} s each" if seconds else ""
    console.print(
        f"{counts[0]} segmented{mean}, {counts[1]} were there, {counts[2]} failed; "
        f"{where}, peak: {memory:.2f} GiB; results in {out}",
        soft_wrap=True,
    )
    return outcomes


def load_predictor(
    checkpoints: Sequence[Path],
    *,
    device: str | None = None,
    iterations: int | None = None,
    whole: bool = False,
    mirror: bool = False,
) -> Predictor:
    """The networks of the checkpoints, ready to run. Raises DataError where one cannot be used."""
    models = []
    for path in checkpoints:
        try:
            models.append(load_network(path))
        except FileNotFoundError as error:
            raise DataError(f"checkpoint: there is no {path}") from error
    if iterations is not None:
        for network, _ in models:
            set_num_iters(network, iterations)
    return Predictor(models, device=pick_device(device), whole=whole, mirror=mirror)


def run_cases(console: Console, predictor: Predictor, cases: Sequence[Case], out: Path) -> list[Outcome]:
    """`segment_cases` with a bar; failures are told as they come.

    out/settings.json says what the results were made with. Raises DataError where those that are there
    were made with another network or other settings.
    """
    _keep_settings(out / SETTINGS, predictor.settings())
    outcomes = []
    with progress(console) as bar:
        work = segment_cases(predictor, cases, out)
        for outcome in bar.track(work, total=len(cases), description="Segmenting"):
            if outcome.state == "failed":
                tell_failure(console, outcome.name, outcome.reason)
            outcomes.append(outcome)
    return outcomes


def _keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes what the folder's results are made with, or checks that it is the same as before."""
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not readable as JSON ({error})") from error
        if before != settings:
            changed = [name for name in settings if before.get(name) != settings[name]]
            raise DataError(
                f"output: {path.parent} holds results made with other settings ({', '.join(changed)}); "
                "give another folder, or delete this one"
            )
    elif place()[0] == 0:
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
