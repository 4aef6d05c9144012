"""factorizer predict: label maps for NIfTI volumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from factorizer.segmentation.cases import find_cases
from factorizer.segmentation.files import prepare_folder
from factorizer.segmentation.inference import Outcome, load_predictor, run_cases
from factorizer.segmentation.measure import peak_memory
from factorizer.segmentation.processes import gather, place, process_group
from factorizer.segmentation.screen import tell_failure

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
    """Segments the cases that `inputs` name (`find_cases`) into out/NAME.nii.gz.

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
