"""Cases: find them in folders, lists and Decathlon folders, and split them.

A Decathlon folder (the layout of the Medical Segmentation Decathlon) holds `dataset.json` and the
NIfTI files that it names. Every error is a `DataError` that names the file or field, what it got and
what it needs; what the volumes hold is for `factorizer.segmentation.volumes` to check.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError

MIN_CASES = 3  # two to train on and one held out
HELD_OUT, MAX_HELD_OUT = 0.2, 40  # share and number of the cases that training never sees
SECTIONS = ("testing", "test", "validation", "training")  # of a data list, the first that has cases
NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Case:
    """One volume: its name, the files of its image, and of its label where it has one.

    One image file holds X, Y, Z or X, Y, Z, channel; several files hold one channel each.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None

    @property
    def image(self) -> Path:
        """The file whose grid is the case's."""
        return self.images[0]


@dataclass(frozen=True)
class Task:
    """What a Decathlon folder says about itself.

    `labels` maps each label value to its name, in ascending order and with 0, the background,
    first. The network's class k is the k-th of these values.
    """

    name: str
    modalities: tuple[str, ...]
    labels: dict[int, str]
    cases: tuple[Case, ...]


def read_decathlon(root: str | Path) -> Task:
    """The task that `root`/dataset.json describes. Reads no volume, but looks for every file.

    Raises DataError where the folder, dataset.json, one of its fields or a file is missing or of
    the wrong kind, or where there are fewer than three cases.
    """
    root = Path(root)
    path = root / "dataset.json"
    if not root.is_dir():
        raise DataError(f"data: {root} is not a folder; it must be one in the Decathlon's layout")
    if not path.is_file():
        raise DataError(
            f"{root}: dataset.json is missing; the Decathlon's layout is dataset.json, imagesTr/ "
            "and labelsTr/"
        )
    content = _read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    wanted = {
        "modality": (dict, 'an object such as {"0": "MRI"}'),
        "labels": (dict, 'an object such as {"0": "background", "1": "tumour"}'),
        "training": (list, 'a list of {"image": ..., "label": ...}'),
    }
    for field, (kind, example) in wanted.items():
        if field not in content:
            raise DataError(f"{path}: the field {field!r} is missing; it must be {example}")
        if not isinstance(content[field], kind) or not content[field]:
            raise DataError(f"{path}: {field!r} is {content[field]!r}; it must be {example}")
    labels = _classes(path, content["labels"])
    cases = _listed_cases(path, content["training"], "training", labelled=True)
    missing = [str(f) for c in cases for f in (*c.images, c.label) if f is not None and not f.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{path} names files that are missing: {', '.join(missing[:3])}{more}")
    if len(cases) < MIN_CASES:
        raise DataError(f"{path}: too few cases: {len(cases)}; at least {MIN_CASES} are needed")
    return Task(
        name=str(content.get("name") or root.resolve().name),
        modalities=tuple(str(name) for name in content["modality"].values()),
        labels=labels,
        cases=cases,
    )


def read_classes(path: str | Path) -> dict[int, str]:
    """The label values and their names that a dataset.json has under "labels", 0 first; empty without them.

    Raises DataError as `read_decathlon` does.
    """
    content = _read_json(Path(path))
    labels = content.get("labels") if isinstance(content, dict) else None
    return _classes(Path(path), labels) if isinstance(labels, dict) else {}


def find_cases(
    inputs: Sequence[str | Path], section: str | None = None, *, labelled: bool = False
) -> tuple[Case, ...]:
    """The cases that `inputs` name; whether their files are there is for `check_image` to say.

    Each input is one of

    - a NIfTI file, X, Y, Z or X, Y, Z, channel: a case;
    - several NIfTI files separated by commas, one for each modality: a case;
    - a folder with a dataset.json: that data list;
    - another folder: every NIfTI file in it is a case, but files that differ in an ending _0000, _0001, …
      alone, counted from _0000, are the modalities of one;
    - a data list, a JSON file such as a dataset.json: a list of {"image": file or files, "label":
      file}, "label" being optional, or an object with such lists. `section` names the list to
      take; by default the first of testing, test, validation and training that is not empty.

    With `labelled`, those alone that have a label, by default of all lists.

    Raises DataError where an input is none of these, or where two cases have the same name.
    """
    cases: list[Case] = []
    for given in inputs:
        path = Path(given)
        if (path / "dataset.json").is_file():
            path = path / "dataset.json"
        if path.is_dir():
            cases.extend(_cases_in_folder(path))
        elif path.suffix == ".json":
            cases.extend(_cases_in_list(path, section, every=labelled))
        else:
            files = (path,) if path.is_file() else tuple(Path(part) for part in str(given).split(","))
            for file in files:
                if not file.name.endswith(NIFTI):
                    there = "is" if file.exists() else "does not exist, and is"
                    raise DataError(
                        f"input: {file} {there} no NIfTI file (.nii, .nii.gz), folder or data list (.json)"
                    )
            cases.append(Case(_stem(files[0]) if len(files) == 1 else _channel_stem(files[0]), files))
    if labelled:
        cases = [case for case in cases if case.label is not None]
    _check_names(", ".join(map(str, inputs)), cases)
    if not cases:
        if labelled:
            raise DataError("input: no case has a label; give data lists with labels")
        raise DataError("input: no cases; give NIfTI files, folders of them, or data lists")
    return tuple(cases)


def volumes_in(folder: Path) -> tuple[Case, ...]:
    """Every NIfTI file of a folder as a case, by its name. Raises DataError where two have the same."""
    paths = [path for path in folder.iterdir() if path.name.endswith(NIFTI) and path.name[0] != "."]
    cases = tuple(Case(_stem(path), (path,)) for path in sorted(paths))
    _check_names(str(folder), cases)
    return cases


def split_cases(
    cases: Sequence[Case], seed: int, fold: int | None = None, folds: int = 5
) -> tuple[list[Case], list[Case]]:
    """(training, held out), both sorted; drawn with `seed`.

    Held out is a fifth of the cases, at most 40, or with `fold` the fold of that number out of `folds`.
    """
    by_name = sorted(cases, key=lambda case: case.name)
    order = np.random.default_rng(seed).permutation(len(cases))
    if fold is None:
        drawn = set(order[: min(max(1, round(HELD_OUT * len(cases))), MAX_HELD_OUT)].tolist())
    else:
        if not 0 <= fold < folds <= len(cases):
            raise DataError(f"fold: got {fold} of {folds} folds of {len(cases)} cases; the first is 0")
        drawn = set(order[fold::folds].tolist())
    training = [case for index, case in enumerate(by_name) if index not in drawn]
    held_out = [case for index, case in enumerate(by_name) if index in drawn]
    return training, held_out


def _classes(path: Path, labels: dict[str, Any]) -> dict[int, str]:
    try:
        classes = {int(value): str(name) for value, name in labels.items()}
    except ValueError as error:
        raise DataError(f"{path}: the keys of 'labels' must be label values ({error})") from error
    if 0 not in classes or len(classes) < 2 or not 0 <= min(classes) <= max(classes) <= 255:
        raise DataError(
            f"{path}: 'labels' has the values {sorted(classes)}; it needs 0, the background, and at "
            "least one more, none above 255"
        )
    return dict(sorted(classes.items()))


def _cases_in_folder(folder: Path) -> list[Case]:
    volumes = volumes_in(folder)
    names = {volume.name for volume in volumes}
    grouped: dict[str, list[Path]] = {}
    for volume in volumes:
        stem = _channel_stem(volume.image)
        grouped.setdefault(stem if f"{stem}_0000" in names else volume.name, []).append(volume.image)
    return [Case(name, tuple(paths)) for name, paths in grouped.items()]


def _cases_in_list(path: Path, section: str | None, *, every: bool) -> tuple[Case, ...]:
    content = _read_json(path)
    if isinstance(content, dict):
        sections = [s for s in (SECTIONS if section is None else (section,)) if content.get(s)]
        if not sections:
            wanted = f"a list {section!r}" if section else f"one of the lists {', '.join(SECTIONS)}"
            raise DataError(f"{path}: needs {wanted}, not empty; has {', '.join(content)}")
        lists = {name: content[name] for name in (sections if every else sections[:1])}
    else:
        lists = {"entry": content}
    return tuple(
        case for name, entries in lists.items() for case in _listed_cases(path, entries, name, labelled=False)
    )


def _listed_cases(path: Path, entries: Any, section: str, *, labelled: bool) -> tuple[Case, ...]:
    """The cases of a data list; file names are relative to the folder of `path`."""
    wanted = '{"image": file or list of files, "label": file}'
    if not isinstance(entries, list):
        raise DataError(f"{path}: {section} is a {type(entries).__name__}; it must be a list of {wanted}")
    base, cases = path.resolve().parent, []
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and not labelled:
            entry = {"image": entry}
        images = entry.get("image") if isinstance(entry, dict) else None
        images = [images] if isinstance(images, str) else images
        label = entry.get("label") if isinstance(entry, dict) else None
        wrong = not isinstance(images, list) or not all(isinstance(file, str) for file in images)
        if wrong or not images or not isinstance(label, str if labelled else (str, type(None))):
            raise DataError(
                f"{path}: {section}[{index}] is {entry!r}; it must name one file as 'image' (or a list of "
                "them, one for each modality)" + (" and one as 'label'" if labelled else "")
            )
        stem = _stem(Path(images[0])) if len(images) == 1 else _channel_stem(Path(images[0]))
        files = tuple(base / file for file in images)
        cases.append(Case(stem, files, None if label is None else base / label))
    _check_names(str(path), cases)
    return tuple(cases)


def _check_names(source: str, cases: Sequence[Case]) -> None:
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source}: two cases are called {twice!r}; names must differ")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".nii")


def _channel_stem(file: Path) -> str:
    """The name without the modality's number, _0000 and so on."""
    return re.sub(r"_\d{4}$", "", _stem(file))
