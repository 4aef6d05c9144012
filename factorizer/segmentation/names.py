"""Names of cases: from the names of their files, or from the folders that tell those apart."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from factorizer.segmentation.errors import DataError

WINDOWS = os.name == "nt"
# What no file can be called there, whatever its ending.
NOT_ON_WINDOWS = re.compile(r'.*[<>:"|?*].*|.*[ .]|(con|prn|aux|nul|com\d|lpt\d)(\..*)?', re.IGNORECASE)
# What nibabel reads as NIfTI, of a pair of files the one with the voxels stands for both; and what SimpleITK
# reads, with the name that it has for the format.
PAIRED = (".img", ".img.gz")
ITK_ENDINGS = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO"}
ENDINGS = (".nii", ".nii.gz", *PAIRED, *ITK_ENDINGS)


def is_volume(path: Path) -> bool:
    """Whether a file has a name as files of volumes have them, in capitals or not."""
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The name of a volume's file without its ending; of a series that of its folder."""
    if path.is_dir():
        return Path(os.path.abspath(path)).name
    ending = next((e for e in sorted(ENDINGS, key=len)[::-1] if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def channel_number(path: Path) -> tuple[str, int | None]:
    """The name without the number of its modality, and the number: ("a", 1) for a_0001.nii.gz, ("b", None)
    for b.nii.gz."""
    match = re.fullmatch(r"(.+)_(\d{4})", stem(path))
    return (match[1], int(match[2])) if match else (stem(path), None)


def case_name(files: Sequence[Path]) -> str:
    """What the files of a case are called in common.

    The name of a single file; the beginning that the names of several share, up to a separator; or, where
    they share none, the name of their folder.
    """
    if len(files) == 1:
        return stem(files[0])
    stems = [channel_number(file)[0] for file in files]
    if len(set(stems)) == 1:
        return stems[0]
    shared = os.path.commonprefix(stems)  # noqa: RUF071, of characters
    if any(re.match(r"[^\W_]", s[len(shared) :]) for s in stems):  # in the middle of a word
        shared = re.sub(r"[^\W_]+$", "", shared)
    return shared.rstrip("_-. ") or Path(os.path.abspath(files[0])).parent.name or stems[0]


def tell_apart(names: Sequence[str], files: Sequence[Sequence[Path]], given: Sequence[bool]) -> list[str]:
    """The names, those that several cases have exchanged for the parts of the files' paths that differ.

    Args:
        names: one for each case.
        files: those of each case.
        given: whether somebody chose the name: then it stays.
    """
    counts = Counter(names)
    alike = [i for i, name in enumerate(names) if counts[name] > 1 and not given[i]]
    paths = {i: (*Path(os.path.abspath(files[i][0])).parent.parts, names[i]) for i in alike}
    told = list(names)
    if alike:
        length = {len(parts) for parts in paths.values()}
        shared = [len(set(parts)) == 1 for parts in zip(*paths.values(), strict=False)]
        common = (*shared, False).index(False)
        for i, parts in paths.items():
            rest = parts[common:]
            if len(length) == 1:  # folders that all of them have say nothing
                rest = tuple(
                    part
                    for place, part in enumerate(parts)
                    if len({other[place] for other in paths.values()}) > 1
                )
            told[i] = "_".join(rest) or names[i]
    return told


def check_names(source: str, names: Iterable[str]) -> None:
    """Raises DataError where two cases have one name, or a name cannot be that of a file.

    Names that differ in capitals alone, or in how an accented letter is encoded, are one file on some file
    systems: on a share, or a disk for Windows or macOS, one case's result would replace the other's.
    """
    seen: dict[str, str] = {}
    for name in names:
        alike = unicodedata.normalize("NFC", name).casefold()
        if alike in seen:
            other = "" if seen[alike] == name else f" and {seen[alike]!r}, one file on some file systems"
            raise DataError(
                f"{source}: two cases are called {name!r}{other}; names must differ: give each its own "
                "'name' in a data list"
            )
        seen[alike] = name
        if not name or name.startswith(".") or len(name) > 200 or re.search(r"[/\\\x00-\x1f]", name):
            raise DataError(
                f"{source}: a case is called {name!r}; results are called after it, so it must have 1 to 200 "
                "characters, none of them / or \\, and not begin with a dot"
            )
        if WINDOWS and NOT_ON_WINDOWS.fullmatch(name):
            raise DataError(
                f"{source}: a case is called {name!r}, and results are called after it, as no file on "
                "Windows can be; give it another 'name' in a data list"
            )


# Names that one modality goes by, in files and in lists.
_ALIKE = (
    ("t1gd", "t1ce", "t1c", "t1wce", "t1wgd", "cet1", "ct1", "t1post"),
    ("t1", "t1w", "t1n", "t1wi", "t1pre"),
    ("t2", "t2w", "t2wi"),
    ("flair", "t2f", "t2flair"),
    ("dwi", "b1000"),
    ("pet", "suv"),
    ("ct", "ncct"),
)
_MODALITIES = {names[0] for names in _ALIKE}


def places_by_name(files: Sequence[Path], modalities: Sequence[str]) -> list[int | None]:
    """For each file of a case the place of the modality that its name speaks of, or else its folder's.

    None where it names none, several, or one that is not among them. What all names have in common tells
    nothing, nor do single letters.
    """
    wanted = [_known_as(name) for name in modalities]
    places: list[int | None] = [None] * len(files)
    folders = [Path(os.path.abspath(file)).parent.name for file in files]
    for texts in (folders, [channel_number(file)[0] for file in files]):
        words = [{_known_as(word) for word in re.split(r"[\W_]+", text) if len(word) > 1} for text in texts]
        shared = set.intersection(*words)
        for k, own in enumerate(words):
            found = [place for place, name in enumerate(wanted) if name in own - shared]
            if len(found) == 1:
                places[k] = found[0]
    return places


def numbers_of(file: Path) -> tuple[int, ...]:
    """The numbers in the name of a file, or else of its folder, that may say which case it is of: not those
    of modalities (T1, _0001)."""
    for text in (channel_number(file)[0], Path(os.path.abspath(file)).parent.name):
        words = [word for word in re.split(r"[\W_]+", text) if _known_as(word) not in _MODALITIES]
        if numbers := re.findall(r"\d+", " ".join(words)):
            return tuple(map(int, numbers))
    return ()


def _known_as(name: str) -> str:
    """One name for all those of a modality; others without capitals and separators."""
    plain = re.sub(r"[\W_]+", "", name).lower()
    return next((names[0] for names in _ALIKE if plain in names), plain)
