"""Cases: find them in folders, lists, Decathlon and nnU-Net folders, and split them.

A Decathlon folder (the layout of the Medical Segmentation Decathlon) holds `dataset.json` and the
NIfTI files that it names; nnU-Net's raw folders differ in names alone (`factorizer.segmentation.dataset`).
Every error is a `DataError` that names the file or field, what it got and what it needs; what the
volumes hold is for `factorizer.segmentation.volumes` to check.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from factorizer.segmentation.dataset import Regions, read_labels_and_regions, read_modalities
from factorizer.segmentation.dicom import check_folder, dicom_files
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import read_json
from factorizer.segmentation.names import (
    PAIRED,
    case_name,
    channel_number,
    check_names,
    is_volume,
    stem,
    tell_apart,
)

MIN_CASES = 3  # two to train on and one held out
HELD_OUT, MAX_HELD_OUT = 0.2, 40  # share and number of the cases that training never sees
SECTIONS = ("testing", "test", "validation", "training")  # of a data list, the first that has cases


@dataclass(frozen=True)
class Case:
    """One volume: its name, the files of its image, and of its label where it has one.

    One image file holds X, Y, Z or X, Y, Z, channel; several files hold one channel each. `grid` is the
    place of the file whose grid is the case's; with `resample` the others are brought to it.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    grid: int = 0
    resample: bool = False

    @property
    def image(self) -> Path:
        """The file whose grid is the case's."""
        return self.images[self.grid if len(self.images) > 1 else 0]

    @property
    def files(self) -> tuple[Path, ...]:
        """Those of its image, and its label."""
        return self.images if self.label is None else (*self.images, self.label)


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Task:
    """What a Decathlon or nnU-Net folder says about itself.

    `labels` maps each label value to its name, in ascending order and with 0, the background,
    first. The network's class k is the k-th of these values. `regions`, where there are any, are
    what is segmented instead: each unites some of the values.
    """

    name: str
    modalities: tuple[str, ...]
    labels: dict[int, str]
    cases: tuple[Case, ...]
    regions: Regions = field(default_factory=dict)


def read_decathlon(root: str | Path) -> Task:
    """The task that `root`/dataset.json describes. Reads no volume, but looks for every file.

    Raises DataError where the folder, dataset.json, one of its fields or a file is missing or of
    the wrong kind, or where there are fewer than three cases.
    """
    root = Path(root)
    path = root / "dataset.json"
    if not root.is_dir():
        raise DataError(
            f"data: {root} is not a folder; it must be one in the layout of the Decathlon or nnU-Net"
        )
    if not path.is_file():
        raise DataError(
            f"{root}: dataset.json is missing; the Decathlon's layout, and nnU-Net's, is dataset.json, "
            "imagesTr/ and labelsTr/"
        )
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, holds a {type(content).__name__}")
    modalities = read_modalities(path, content)
    labels, regions = read_labels_and_regions(path, content)
    wanted = 'a list of {"image": ..., "label": ...}'
    training = _lists(path, content).get("training")
    if training is None:
        raise DataError(
            f"{path}: the field 'training' is missing; it must be {wanted}. nnU-Net's layout needs no list, "
            "but imagesTr/NAME_0000.nii.gz and labelsTr/NAME.nii.gz"
        )
    if not isinstance(training, list) or not training:
        raise DataError(f"{path}: 'training' is {training!r}; it must be {wanted}")
    cases = _listed_cases(path, training, "training", labelled=True)
    missing = [str(f) for c in cases for f in (*c.images, c.label) if f is not None and not f.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{path} names files that are missing: {', '.join(missing[:3])}{more}")
    if len(cases) < MIN_CASES:
        raise DataError(f"{path}: too few cases: {len(cases)}; at least {MIN_CASES} are needed")
    name = str(content.get("name") or root.resolve().name)
    return Task(name=name, modalities=modalities, labels=labels, cases=cases, regions=regions)


def read_classes(path: str | Path) -> tuple[dict[int, str], Regions]:
    """The label values with their names, and the regions, that a dataset.json has; empty without "labels".

    Raises DataError as `read_decathlon` does.
    """
    content = read_json(Path(path))
    if not isinstance(content, dict) or "labels" not in content:
        return {}, {}
    return read_labels_and_regions(Path(path), content)


def find_cases(
    inputs: Sequence[str | Path], section: str | None = None, *, labelled: bool = False
) -> tuple[Case, ...]:
    """The cases that `inputs` name; whether their files are there is for `check_image` to say.

    Each input is one of

    - a file, X, Y, Z or X, Y, Z, channel: NIfTI, NRRD or MetaImage (.mha): a case;
    - a folder with the slices of one DICOM series: a case; a folder of such folders: a case for each;
    - several of these files and folders separated by commas, one for each modality: a case;
    - a folder with a dataset.json: that data list, or the folders of nnU-Net's layout;
    - another folder: every file in it is a case, but files that differ in an ending _0000, _0001, …
      alone, counted from _0000, are the modalities of one;
    - a data list, a JSON file such as a dataset.json: a list of {"image": file or files, "label":
      file, "name": text}, "label" and "name" being optional, or an object with such lists. `section`
      names the list to take; by default the first of testing, test, validation and training that is
      not empty.

    A case is called what the list says, else after its file, else by what its files have in common.
    Where several have one name, they are called after the folders that tell them apart.

    With `labelled`, those alone that have a label, by default of all lists.

    Raises DataError where an input is none of these, where two cases have the same name, or where the
    numbers of the modalities' files are out of order.
    """
    cases: list[Case] = []
    for given in inputs:
        # A file's name may have commas, and Path("") would be the current folder.
        if not all(part.strip() for part in str(given).split(",")) and not Path(given).is_file():
            raise DataError(
                f"input: got {str(given)!r}; it must name a file or folder, or several separated by commas "
                "(is a variable unset?)"
            )
        path = Path(given)
        if (path / "dataset.json").is_file():
            path = path / "dataset.json"
        if path.is_dir():
            cases.extend(_cases_in_folder(path) or _series_in_folder(path))
        elif path.suffix.lower() == ".json":
            cases.extend(_cases_in_list(path, section, every=labelled))
        else:
            files = (path,) if path.is_file() else tuple(Path(part) for part in str(given).split(","))
            for file in files:
                if not is_volume(_voxels_of(file)) and not dicom_files(file):
                    there = "is" if file.exists() else "does not exist, and is"
                    raise DataError(
                        f"input: {file} {there} no NIfTI file (.nii, .nii.gz, .img with .hdr), .nrrd, .mha, "
                        "folder (of files, or of one DICOM series) or data list (.json)"
                    )
            files = tuple(map(_voxels_of, files))
            _check_numbers(str(given), [files], known=False)
            cases.append(Case(case_name(files), files))
    if labelled:
        cases = [case for case in cases if case.label is not None]
    cases = _named(", ".join(map(str, inputs)), cases, [False] * len(cases))
    if not cases:
        if labelled:
            raise DataError("input: no case has a label; give data lists with labels")
        raise DataError("input: no cases; give NIfTI files, folders of them, or data lists")
    return tuple(cases)


def volumes_in(folder: Path) -> tuple[Case, ...]:
    """Every NIfTI file of a folder as a case, by its name.

    Raises DataError where two have the same, or one is a folder.
    """
    files = [path for path in sorted(folder.iterdir()) if is_volume(path)]
    for path in files:
        check_folder(path)
    cases = [Case(stem(path), (path,)) for path in files]
    check_names(str(folder), [case.name for case in cases])
    return tuple(cases)


def split_cases(
    cases: Sequence[Case], seed: int, fold: int | None = None, folds: int = 5
) -> tuple[list[Case], list[Case]]:
    """(training, held out), both sorted; drawn with `seed`.

    Held out is a fifth of the cases, at most 40, or with `fold` the fold of that number out of `folds`.

    Raises DataError where there is no such fold.
    """
    by_name = sorted(cases, key=lambda case: case.name)
    order = np.random.default_rng(seed).permutation(len(cases))
    if fold is None:
        drawn = set(order[: min(max(1, round(HELD_OUT * len(cases))), MAX_HELD_OUT)].tolist())
    else:
        if not 0 <= fold < folds <= len(cases):
            raise DataError(
                f"fold: got {fold} of {folds} folds of {len(cases)} cases; the first is 0, each needs a case"
            )
        drawn = set(order[fold::folds].tolist())
    training = [case for index, case in enumerate(by_name) if index not in drawn]
    held_out = [case for index, case in enumerate(by_name) if index in drawn]
    return training, held_out


def read_split(path: Path, cases: Sequence[Case], fold: int | None = None) -> tuple[list[Case], list[Case]]:
    """(training, held out), both sorted, as a JSON file names them.

    The file holds {"training": [names], "held_out": [names]}, or a list of such objects, of which `fold` is
    one; nnU-Net's "train" and "val" (splits_final.json) are understood. Cases that it does not name are
    left out.

    Raises DataError where it is of another form, names a case that is not there, or one twice.
    """
    content = read_json(path)
    if isinstance(content, list):
        number = fold or 0
        if not 0 <= number < len(content):
            raise DataError(f"fold: got {number}; {path} has {len(content)} splits, the first is 0")
        content = content[number]
    elif fold is not None:
        raise DataError(f"fold: got {fold}; {path} holds a single split")
    known = {case.name: case for case in cases}
    parts = []
    for keys in (("training", "train"), ("held_out", "val", "validation")):
        names = next((content[key] for key in keys if isinstance(content, dict) and key in content), None)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise DataError(
                f'{path}: must hold {{"training": [names of cases], "held_out": [names of cases]}}, or a '
                "list of such objects"
            )
        if missing := [name for name in names if name not in known]:
            raise DataError(
                f"{path}: names {missing[0]!r}, and no case is called that; the first are called "
                f"{', '.join(sorted(known)[:3])}"
            )
        parts.append([known[name] for name in sorted(names)])
    named = [case.name for part in parts for case in part]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise DataError(f"{path}: names {twice!r} twice; a case is either trained on or held out")
    return parts[0], parts[1]


def on_one_grid(task: Task, resample: str) -> Task:
    """The task with cases whose modalities are brought to the grid of one of them (`with_grid`)."""
    return replace(task, cases=with_grid(task.cases, task.modalities, resample))


def with_grid(cases: Sequence[AnyCase], modalities: Sequence[str], resample: str) -> tuple[AnyCase, ...]:
    """The cases, whose modalities are brought to the grid of "first" or of the modality of that name.

    An empty `resample` leaves them alone. Raises DataError where there is no such modality.
    """
    if not resample:
        return tuple(cases)
    names = [name.lower() for name in modalities]
    if resample.lower() not in ("first", *names):
        raise DataError(f"resample: got {resample!r}; it must be first, or one of {', '.join(modalities)}")
    grid = names.index(resample.lower()) if resample.lower() in names else 0
    return tuple(replace(case, grid=grid if len(case.images) > 1 else 0, resample=True) for case in cases)


def _cases_in_folder(folder: Path) -> list[Case]:
    volumes = volumes_in(folder)
    names = {volume.name for volume in volumes}
    grouped: dict[str, dict[int, Path]] = {}
    for volume in volumes:
        base, number = channel_number(volume.image)
        if number is None or f"{base}_0000" not in names:
            base, number = volume.name, 0
        files = grouped.setdefault(base, {})
        if number in files:
            raise DataError(
                f"input: {files[number]} and {volume.image} are both modality {number} of the case {base!r}; "
                "rename one, or put them into folders of their own"
            )
        files[number] = volume.image
    if grouped and dicom_files(folder):
        raise DataError(f"input: {folder} holds volumes and a DICOM series; give a folder for each")
    return [Case(name, _numbered(files)) for name, files in grouped.items()]


def _series_in_folder(folder: Path) -> list[Case]:
    """The DICOM series of a folder, or those of its folders."""
    if dicom_files(folder):
        return [Case(stem(folder), (folder,))]
    folders = [part for part in sorted(folder.iterdir()) if part.is_dir()]
    if folders and not all(dicom_files(part) for part in folders):
        raise DataError(
            f"input: {folder} holds no volume, but folders; name the cases in a data list, a JSON file such "
            'as [{"name": "patient_1", "image": ["patient_1/flair.nii.gz", "patient_1/t1.nii.gz"]}]'
        )
    return [Case(stem(part), (part,)) for part in folders]


def _numbered(files: Mapping[int, Path]) -> tuple[Path, ...]:
    """The files in the order of their modalities' numbers. Where one is missing its name stands there, so
    that it is the case that fails, by that name."""
    first = files[0]
    base = stem(first)[: -len("0000")]
    ending = first.name[len(stem(first)) :]
    return tuple(
        files.get(number) or first.with_name(f"{base}{number:04d}{ending}")
        for number in range(max(files) + 1)
    )


def _lists(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of cases that a dataset.json has, or that nnU-Net's folders beside it are."""
    lists = {name: content[name] for name in SECTIONS if name in content}
    if "training" in lists or any(lists.values()):
        return lists
    ending = str(content.get("file_ending", ".nii.gz"))
    if not is_volume(Path(f"a{ending}")):
        raise DataError(f"{path}: 'file_ending' is {ending!r}; the files must be NIfTI, NRRD or MHA")
    if isinstance(content.get("dataset"), dict):  # nnU-Net 2: files that may lie anywhere
        return {
            "training": [
                {"name": name, "image": entry.get("images"), "label": entry.get("label")}
                for name, entry in content["dataset"].items()
                if isinstance(entry, dict)
            ]
        }
    for section, images, labels in (
        ("training", "imagesTr", "labelsTr"),
        ("testing", "imagesTs", "labelsTs"),
    ):
        folder = path.parent / images
        found = _cases_in_folder(folder) if folder.is_dir() else []
        numbered = [case for case in found if channel_number(case.image)[1] == 0]
        known = (
            {case.name: case.image for case in volumes_in(path.parent / labels)}
            if numbered and (path.parent / labels).is_dir()
            else {}
        )
        entries: list[dict[str, Any]] = []
        for case in numbered:
            entry: dict[str, Any] = {
                "name": case.name,
                "image": [str(file.absolute()) for file in case.images],
            }
            label = known.get(case.name)
            if label is None and section == "training":  # told as missing, by its name
                label = path.parent / labels / f"{case.name}{ending}"
            entries.append(entry if label is None else entry | {"label": str(label.absolute())})
        if section == "training" and (lost := sorted(known.keys() - {case.name for case in numbered})):
            raise DataError(f"{path}: {folder}/{lost[0]}_0000{ending} is missing; there is a label for it")
        other = [case for case in found if channel_number(case.image)[1] != 0]
        if other and (numbered or any(lists.values())):  # none is left out
            raise DataError(
                f"{path}: {other[0].image} is no first modality of a case; that must end in _0000{ending}, "
                "the others in the numbers after it"
            )
        if entries:
            lists[section] = entries
    return lists


def _cases_in_list(path: Path, section: str | None, *, every: bool) -> tuple[Case, ...]:
    content = read_json(path)
    if isinstance(content, dict):
        found = _lists(path, content) | {k: v for k, v in content.items() if k == section}
        sections = [s for s in (SECTIONS if section is None else (section,)) if found.get(s)]
        if not sections:
            wanted = f"a list {section!r}" if section else f"one of the lists {', '.join(SECTIONS)}"
            raise DataError(
                f"{path}: needs {wanted}, not empty; has {', '.join(found) or ', '.join(content)}"
            )
        lists = {name: found[name] for name in (sections if every else sections[:1])}
    else:
        lists = {"entry": content}
    cases = [
        case for name, entries in lists.items() for case in _listed_cases(path, entries, name, labelled=False)
    ]
    return tuple(dict.fromkeys(cases))  # the same in two lists is one


def _listed_cases(path: Path, entries: Any, section: str, *, labelled: bool) -> tuple[Case, ...]:
    """The cases of a data list; file names are relative to the folder of `path`."""
    wanted = '{"image": file or list of files, "label": file}'
    if not isinstance(entries, list):
        raise DataError(f"{path}: {section} is a {type(entries).__name__}; it must be a list of {wanted}")
    base, cases, given = path.resolve().parent, [], []
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and not labelled:
            entry = {"image": entry}
        images = entry.get("image") if isinstance(entry, dict) else None
        images = [images] if isinstance(images, str) else images
        label = entry.get("label") if isinstance(entry, dict) else None
        label = label[0] if isinstance(label, list) and len(label) == 1 else label
        wrong = not isinstance(images, list) or not all(isinstance(file, str) for file in images)
        if wrong or not images or not isinstance(label, str if labelled else (str, type(None))):
            raise DataError(
                f"{path}: {section}[{index}] is {entry!r}; it must name one file as 'image' (or a list of "
                "them, one for each modality)" + (" and one as 'label'" if labelled else "")
            )
        name = next((entry[key] for key in ("name", "id") if entry.get(key) not in (None, "")), None)
        if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
            raise DataError(f"{path}: {section}[{index}]: 'name' or 'id' is {name!r}; it must be a text")
        files = tuple(_voxels_of(base / file) for file in images)
        called = case_name(files) if name is None else str(name)
        if len(files) == 1 and not files[0].exists():  # nnU-Net 1 leaves the numbers of the modalities out
            files = _with_numbers(files[0]) or files
        cases.append(Case(called, files, None if label is None else _voxels_of(base / label)))
        given.append(name is not None)
    _check_numbers(f"{path}: {section}", [case.images for case in cases], known=labelled)
    return tuple(_named(str(path), cases, given))


def _with_numbers(path: Path) -> tuple[Path, ...]:
    """The files NAME_0000, NAME_0001, … of NAME; none where there is no such first file."""
    base, ending = stem(path), path.name[len(stem(path)) :]
    found = {}
    for file in path.parent.glob(f"{glob.escape(base)}_[0-9][0-9][0-9][0-9]{glob.escape(ending)}"):
        number = channel_number(file)[1]
        if number is not None:
            found[number] = file
    return _numbered(found) if 0 in found else ()


def _check_numbers(source: str, cases: Sequence[Sequence[Path]], *, known: bool) -> None:
    """Whether the numbers in files' names, NAME_0001 and so on, say the same order as their places.

    The cases of a list may leave modalities out, as long as all leave out the same; they are what a
    training is defined by where they are `known` by names of their own.
    """
    patterns = {}
    for files in cases:
        numbers = [number for file in files if (number := channel_number(file)[1]) is not None]
        if len(files) > 1 and len(numbers) == len(files):
            patterns[tuple(numbers)] = files
    for pattern, files in patterns.items():
        if pattern == tuple(range(len(pattern))):
            continue
        chosen = (known or len(cases) > 1) and sorted(set(pattern)) == list(pattern)
        if len(patterns) > 1 or not chosen:
            names = ", ".join(file.name for file in files)
            raise DataError(
                f"{source}: the modalities' files of a case are {names}; their numbers must be _0000, "
                "_0001, ... in this order, and the same in all cases. Add the missing file, put them in "
                "order, or give them other names"
            )


def _named(source: str, cases: Sequence[Case], given: Sequence[bool]) -> list[Case]:
    names = tell_apart([case.name for case in cases], [case.images for case in cases], given)
    check_names(source, names)
    return [replace(case, name=name) for case, name in zip(cases, names, strict=True)]


def _voxels_of(path: Path) -> Path:
    """The file of a pair that has the voxels: NAME.img of NAME.hdr."""
    name = path.name.lower()
    if name.endswith((".hdr", ".hdr.gz")):
        cut = len(path.name) - (7 if name.endswith(".gz") else 4)
        for ending in PAIRED:
            for file in (path.name[:cut] + ending, path.name[:cut] + ending.upper()):
                if path.with_name(file).exists():
                    return path.with_name(file)
        return path.with_name(path.name[:cut] + ".img")
    return path
