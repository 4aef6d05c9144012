"""factorizer predict: label maps for NIfTI volumes."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from factorizer.segmentation.cases import Case, find_cases, with_grid
from factorizer.segmentation.files import atomic, digest_of, prepare_folder
from factorizer.segmentation.inference import Predictor, load_predictor, run_cases
from factorizer.segmentation.measure import peak_memory, versions
from factorizer.segmentation.preview import draw_preview, preview_of, write_statistics
from factorizer.segmentation.processes import gather, group_position, process_group
from factorizer.segmentation.screen import Outcome, tell_failures, tell_warning
from factorizer.segmentation.volumes import doubts_of_files, parts_of


def predict(
    console: Console,
    checkpoints: Sequence[Path],
    inputs: Sequence[str | Path],
    out: Path,
    *,
    section: str | None = None,
    resample: str = "",
    num_iters: int | None = None,
    whole: bool = False,
    mirror: bool | None = None,
    overwrite: bool = False,
    preview: bool = False,
    statistics: bool = False,
    probabilities: bool = False,
    device: str | None = None,
) -> list[Outcome[str]]:
    """Segments the cases that `inputs` name (`find_cases`) into out/NAME.nii.gz.

    With `preview` a picture of each goes to out/previews/NAME.png (`draw_preview`), with `statistics` the
    volume of each class in ml to out/statistics.csv, with `probabilities` those of each voxel to
    out/probabilities/NAME.npz (`write_probabilities`). out/report.json says what was run on what, with what.

    Where torchrun started several processes each takes its part of the cases. Returns what became of each
    case, of all processes. Cases that were made from the same inputs are skipped (`run_cases`).

    Raises DataError for checkpoints, inputs or an `out` that cannot be used.
    """
    predictor = load_predictor(checkpoints, device=device, num_iters=num_iters, whole=whole, mirror=mirror)
    cases = with_grid(find_cases(inputs, section), predictor.plan.modalities, resample)
    prepare_folder("output", out, (path for case in cases for path in case.images))
    for doubt in doubts_of_files(cases):
        tell_warning(console, doubt)
    previews = out / "previews"
    if preview:
        prepare_folder("preview", previews)

    def draw(case: Case, result: Path) -> None:
        if preview:
            draw_preview(previews, case, result, targets, modalities=predictor.plan.modalities)
        else:  # of another result
            preview_of(previews, case.name).unlink(missing_ok=True)

    targets = predictor.plan.targets
    with process_group():  # torchrun stops the other processes where one ends with an error
        index, processes = group_position()
        own = run_cases(
            console,
            predictor,
            cases[index::processes],
            out,
            overwrite=overwrite,
            probabilities=probabilities,
            then=draw,
        )
        outcomes = gather(own)
    # Only the first process has a screen, and its own failures are told already.
    tell_failures(console, outcomes[len(own) :])
    if index == 0 and (statistics or any(o.result == "done" for o in outcomes)):
        (out / "statistics.csv").unlink(missing_ok=True)  # of other results
    if index == 0 and statistics:
        results = {o.name: out / f"{o.name}.nii.gz" for o in outcomes if not o.failed}
        write_statistics(out / "statistics.csv", results, targets)
    memory = peak_memory(predictor.device) / 2**30
    if index == 0:
        _write_report(out, predictor, cases, outcomes, memory)
    where = "GPU memory" if predictor.device.type == "cuda" else "memory of the process"
    done, skipped = ([o for o in outcomes if o.result == result] for result in ("done", "skipped"))
    mean = f", {sum(outcome.seconds for outcome in done) / len(done):.2f} s each" if done else ""
    console.print(
        f"{len(done)} segmented{mean}, {len(skipped)} were there, "
        f"{len(outcomes) - len(done) - len(skipped)} failed; "
        f"{where}, peak: {memory:.2f} GiB; results in {out}",
        soft_wrap=True,
    )
    return outcomes


def _write_report(
    out: Path, predictor: Predictor, cases: Sequence[Case], outcomes: Sequence[Outcome[str]], memory: float
) -> None:
    """Writes out/report.json: versions, device, settings, peak GiB of this process, and of each case what
    came of it, the seconds and the SHA-256 of its files, as they are now."""
    by_name = {case.name: case for case in cases}
    content = {
        "versions": versions(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(predictor.device),
        "threads": torch.get_num_threads(),
        "settings": predictor.settings(),
        "peak_gib": round(memory, 3),
        "cases": [
            {
                "name": outcome.name,
                "result": outcome.result or "failed",
                "reason": outcome.reason,
                "seconds": round(outcome.seconds, 3),
                "inputs": {} if outcome.failed else _digests(by_name[outcome.name]),
            }
            for outcome in outcomes
        ],
    }
    with atomic(out / "report.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _digests(case: Case) -> dict[str, str]:
    return {str(file): digest_of(file) for path in case.images for file in parts_of(path)}
