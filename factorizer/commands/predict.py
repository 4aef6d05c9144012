"""factorizer predict: label maps for NIfTI volumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from factorizer.segmentation.cases import Case, find_cases, with_grid
from factorizer.segmentation.files import prepare_folder
from factorizer.segmentation.inference import load_predictor, run_cases
from factorizer.segmentation.measure import peak_memory
from factorizer.segmentation.preview import draw_preview, preview_of, write_statistics
from factorizer.segmentation.processes import gather, group_position, process_group
from factorizer.segmentation.screen import Outcome, tell_failures, tell_warning
from factorizer.segmentation.volumes import doubts_of_sides


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
    device: str | None = None,
) -> list[Outcome[str]]:
    """Segments the cases that `inputs` name (`find_cases`) into out/NAME.nii.gz.

    With `preview` a picture of each goes to out/previews/NAME.png (`draw_preview`), with `statistics` the
    volume of each class in ml to out/statistics.csv.

    Where torchrun started several processes each takes its part of the cases. Returns what became of each
    case, of all processes. Cases that were made from the same inputs are skipped (`run_cases`).

    Raises DataError for checkpoints, inputs or an `out` that cannot be used.
    """
    predictor = load_predictor(checkpoints, device=device, num_iters=num_iters, whole=whole, mirror=mirror)
    cases = with_grid(find_cases(inputs, section), predictor.plan.modalities, resample)
    prepare_folder("output", out, (path for case in cases for path in case.images))
    for doubt in doubts_of_sides(cases):
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
        own = run_cases(console, predictor, cases[index::processes], out, overwrite=overwrite, then=draw)
        outcomes = gather(own)
    # Only the first process has a screen, and its own failures are told already.
    tell_failures(console, outcomes[len(own) :])
    if statistics and index == 0:
        results = {o.name: out / f"{o.name}.nii.gz" for o in outcomes if not o.failed}
        write_statistics(out / "statistics.csv", results, targets)
    memory = peak_memory(predictor.device) / 2**30
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
