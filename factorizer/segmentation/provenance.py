"""What each result in a folder was made from, so that no input is ever answered with another's result.

Beside folder/NAME.nii.gz there is folder/made_from/NAME.json: the digests of the inputs' contents, the
settings, and the digest of the result itself. A result counts as made only where all three agree.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic, digest_of, read_json
from factorizer.segmentation.formats import parts_of

FOLDER = "made_from"


def made(
    result: Path,
    case: Case,
    settings: Mapping[str, Any],
    *,
    way_out: str = "give another folder, delete it, or give --overwrite",
) -> bool:
    """Whether `result` is there, made from these very inputs with these settings.

    Raises DataError where something else is there under its name; `way_out` says what to do then.
    """
    if not result.exists():
        return False
    record = _record_of(result)
    if not record.is_file():
        raise DataError(f"{result}: is there, and nothing says what it was made from; {way_out}")
    known = read_json(record)
    if not isinstance(known, dict) or known.get("result") != digest_of(result):
        raise DataError(
            f"{result}: is there, and was changed since it was made, or made by others; {way_out}"
        )
    inputs = _inputs(case)
    if known.get("inputs") != inputs:
        before = known.get("from") or ["other files"]
        raise DataError(
            f"{result}: is there, and was made from other inputs ({', '.join(map(str, before))}, as they "
            f"were then); {way_out}"
        )
    if changed := differences(known.get("settings"), settings):
        raise DataError(
            f"{result}: is there, and was made with other settings ({', '.join(changed)}); {way_out}"
        )
    return True


def write_result(
    result: Path, case: Case, settings: Mapping[str, Any], write: Callable[[Path], None]
) -> None:
    """Writes a result by `write`, which gets a path, and what it was made from.

    The record comes first: where the run is killed between the two, the result is made anew.
    """
    record = _record_of(result)
    record.parent.mkdir(exist_ok=True)
    with atomic(result) as temporary:
        write(temporary)
        content = {
            "inputs": _inputs(case),
            "from": [str(path.absolute()) for path in case.images],
            "settings": settings,
            "result": digest_of(temporary),
        }
        with atomic(record) as path:
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def results_of(case: Case, folder: Path) -> list[Path]:
    """The results NAME_*.nii.gz in a folder that are known to be made from the images of this case."""
    images = [str(path.absolute()) for path in case.images]
    found = []
    for record in sorted((folder / FOLDER).glob(f"{glob.escape(case.name)}_*.json")):
        known = read_json(record)
        if isinstance(known, dict) and known.get("from") == images:
            found.append(folder / f"{record.name.removesuffix('.json')}.nii.gz")
    return found


def is_result(result: Path) -> bool:
    """Whether a file is as `write_result` wrote it, whatever it was made from."""
    record = _record_of(result)
    if not (result.is_file() and record.is_file()):
        return False
    known = read_json(record)
    return isinstance(known, dict) and known.get("result") == digest_of(result)


def remove_result(result: Path) -> None:
    """Removes a result that `write_result` wrote, with its record; what others made or changed stays."""
    if is_result(result):
        result.unlink()
    _record_of(result).unlink(missing_ok=True)


def made_from_others(result: Path, case: Case) -> bool:
    """Whether a result is known to be made from other files than the images of `case`, if these are here."""
    record = _record_of(result)
    if not record.is_file() or not case.images or not all(path.exists() for path in case.images):
        return False
    known = read_json(record)
    return isinstance(known, dict) and list(known.get("inputs", ()))[:-2] != _inputs(case)[:-2]


def differences(before: Any, now: Mapping[str, Any]) -> list[str]:
    """The names of the settings that are others than before."""
    before = before if isinstance(before, dict) else {}
    return [name for name in {**now, **before} if before.get(name) != now.get(name)]


def _record_of(result: Path) -> Path:
    return result.parent / FOLDER / f"{result.name.removesuffix('.nii.gz')}.json"


def _inputs(case: Case) -> list[Any]:
    """The digests of the image's files, in the order of the modalities, and whose grid is theirs."""
    digests = [digest_of(part) for path in case.images for part in parts_of(path)]
    return [*digests, case.grid, case.resample]
