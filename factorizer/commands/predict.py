"""factorizer predict: label maps for volumes."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import nibabel as nib
import torch
from rich.console import Console

from factorizer.segmentation.cases import Case, find_cases, with_grid
from factorizer.segmentation.dicom import write_segmentation
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import (
    atomic,
    check_apart,
    check_own,
    digest_of,
    prepare_folder,
    read_json,
)
from factorizer.segmentation.formats import load, parts_of, save
from factorizer.segmentation.inference import PROBABILITIES, Predictor, load_predictor, run_cases
from factorizer.segmentation.measure import peak_memory, versions
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.preview import draw_preview
from factorizer.segmentation.processes import gather, group_position, part_of, process_group
from factorizer.segmentation.provenance import is_result, made, remove_result, write_result
from factorizer.segmentation.screen import Outcome, tell_failures, tell_warning
from factorizer.segmentation.statistics import is_statistics, write_statistics
from factorizer.segmentation.survey import doubts_of_files

PREVIEWS = "previews"  # a folder in that of the results
ALSO = {"nrrd": ".nrrd", "mha": ".mha", "dicom-seg": ".dcm"}  # formats beside NIfTI, with their endings


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
    also: Sequence[str] = (),
    part: str = "1/1",
    device: str | None = None,
) -> list[Outcome[str]]:
    """Segments the cases that `inputs` name (`find_cases`) into out/NAME.nii.gz.

    With `preview` a picture of each goes to out/previews/NAME.png (`draw_preview`), with `statistics` the
    volume of each class in ml to out/statistics.csv, with `probabilities` those of each voxel to
    out/probabilities/NAME.npz (`write_probabilities`), and in each format of `also`, names of ALSO, its label
    map to out/FORMAT/NAME. out/report.json says what was run on what, with what.

    With `part`, "3/16", only every sixteenth case from the third on: each case is in one part, and all parts
    may write to one `out` at the same time. Where torchrun started several processes they share the cases.
    Returns what became of each case, of all processes. Cases that were made from the same inputs are skipped
    (`run_cases`).

    Raises DataError for checkpoints, inputs or an `out` that cannot be used.
    """
    number, parts = part_of(part)
    suffix = "" if parts == 1 else f"-{number}-of-{parts}"  # of what is about the cases of this command
    predictor = load_predictor(checkpoints, device=device, num_iters=num_iters, whole=whole, mirror=mirror)
    cases = with_grid(find_cases(inputs, section), predictor.plan.modalities, resample)
    inputs_of_cases = [path for case in cases for path in case.files]
    prepare_folder("output", out, inputs_of_cases)
    for name in (*ALSO, PROBABILITIES, PREVIEWS):  # whether they are wanted or not: old ones are removed
        check_apart("output", out / name, inputs_of_cases)
    _check_also(also, cases)
    cases = cases[number - 1 :: parts]
    for doubt in doubts_of_files(cases):
        tell_warning(console, doubt)
    check_own("output", out / f"report{suffix}.json", _is_report, "report of predict")
    if statistics:
        check_own("output", out / f"statistics{suffix}.csv", is_statistics, "file of statistics")
    previews = out / PREVIEWS
    if preview:
        prepare_folder("preview", previews)

    def show(case: Case, result: Path) -> None:
        for name, ending in ALSO.items():
            path = out / name / f"{case.name}{ending}"
            if name not in also:
                remove_result(path)  # of another result
            elif overwrite or not made(path, case, settings):
                path.parent.mkdir(exist_ok=True)
                write = partial(_write_also, name, load(result), case, predictor.plan)
                write_result(path, case, settings, write)
        picture = previews / f"{case.name}.png"
        if not preview:
            remove_result(picture)
        else:  # anew each time: it shows the label too
            if not overwrite:
                check_own("output", picture, is_result, "picture of predict")
            draw = partial(draw_preview, modalities=predictor.plan.modalities)
            try:
                write_result(picture, case, settings, lambda path: draw(path, case, result, targets))
            except DataError as error:  # about the label, seldom another: the label map is there and good
                remove_result(picture)  # of another result
                tell_warning(console, f"{case.name}: no picture: {error}")

    targets, settings = predictor.plan.targets, predictor.settings()
    with process_group():  # torchrun stops the other processes where one ends with an error
        index, processes = group_position()
        own = run_cases(
            console,
            predictor,
            cases[index::processes],
            out,
            overwrite=overwrite,
            probabilities=probabilities,
            then=show,
        )
        outcomes = gather(own)
    # Only the first process has a screen, and its own failures are told already.
    tell_failures(console, outcomes[len(own) :])
    if index == 0 and (statistics or any(o.result == "done" for o in outcomes)):
        for path in {out / "statistics.csv", out / f"statistics{suffix}.csv"}:
            with suppress(FileNotFoundError):  # another part may remove it
                if is_statistics(path):  # of other results
                    path.unlink()
    if index == 0 and parts == 1 and any(o.result == "done" for o in outcomes):
        _remove_parts(out)
    if index == 0 and statistics:
        results = {o.name: out / f"{o.name}.nii.gz" for o in outcomes if not o.failed}
        write_statistics(out / f"statistics{suffix}.csv", results, targets)
    peak = peak_memory(predictor.device)
    memory = None if peak is None else round(peak / 2**30, 3)
    if index == 0:
        _write_report(out / f"report{suffix}.json", predictor, cases, outcomes, memory)
    where = "GPU memory" if predictor.device.type == "cuda" else "memory of the process"
    told = "" if memory is None else f"{where}, peak: {memory:.2f} GiB; "
    done, skipped = ([o for o in outcomes if o.result == result] for result in ("done", "skipped"))
    mean = f", {sum(outcome.seconds for outcome in done) / len(done):.2f} s each" if done else ""
    console.print(
        f"{len(done)} segmented{mean}, {len(skipped)} were there, "
        f"{len(outcomes) - len(done) - len(skipped)} failed; "
        f"{told}results in {out}",
        soft_wrap=True,
    )
    return outcomes


def _check_also(also: Sequence[str], cases: Sequence[Case]) -> None:
    """Raises DataError for a format that there is not, or that a case cannot be written in."""
    for name in also:
        if name not in ALSO:
            raise DataError(f"also: got {name!r}; it must be one of {', '.join(ALSO)}")
    no_series = [case.name for case in cases if not case.image.is_dir()]
    if "dicom-seg" in also and no_series:
        raise DataError(
            f"also: dicom-seg needs the DICOM series that was segmented; {no_series[0]} is in another format"
        )


def _write_also(name: str, labels: nib.Nifti1Image, case: Case, plan: Plan, path: Path) -> None:
    if name == "dicom-seg":
        write_segmentation(labels, case.image, plan.targets, path)
    else:
        save(labels, path)


def _is_report(path: Path) -> bool:
    try:
        content = read_json(path)
    except DataError:
        return False
    return isinstance(content, dict) and {"versions", "settings", "cases"} <= content.keys()


def _remove_parts(out: Path) -> None:
    """Removes what parts of a job array told of results that are others by now; files of others stay."""
    for pattern, own in (("statistics-*-of-*.csv", is_statistics), ("report-*-of-*.json", _is_report)):
        for path in out.glob(pattern):
            if own(path):
                path.unlink(missing_ok=True)


def _write_report(
    path: Path,
    predictor: Predictor,
    cases: Sequence[Case],
    outcomes: Sequence[Outcome[str]],
    memory: float | None,
) -> None:
    """Writes what was run, on what and with what, as JSON: versions, device, settings, peak GiB of this
    process, and of each case what came of it, the seconds and the SHA-256 of its files, as they are now."""
    by_name = {case.name: case for case in cases}
    content = {
        "versions": versions(),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(predictor.device),
        "threads": torch.get_num_threads(),
        "settings": predictor.settings(),
        "peak_gib": memory,
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
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _digests(case: Case) -> dict[str, str]:
    return {str(file): digest_of(file) for path in case.images for file in parts_of(path)}
