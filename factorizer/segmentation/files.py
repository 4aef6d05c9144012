"""Files and folders of results: whole or not there at all."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from factorizer.segmentation.errors import DataError


@contextmanager
def atomic(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path in the folder of `path` to write to, renamed to `path` on success.

    So a file under its final name is always whole: after an exception or a kill the old one, or
    none. The temporary name keeps the suffix, which is how nibabel and matplotlib know the format.
    What a killed run left there the next one writes over, unless the file is `shared`: then other
    processes may write the same at the same time, each under a name of its own.
    """
    path = Path(path)
    # Of a name of its own: process numbers are alike in the containers and machines that share a disk.
    temporary = path.with_name(f".part-{f'{uuid4().hex}-' if shared else ''}{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(name: str, folder: Path, inputs: Iterable[Path] = ()) -> Path:
    """Makes `folder` and finds out whether it can be written to; `name` is the argument's.

    Raises DataError where it cannot, or where it holds some of the files `inputs`: results must not be
    taken for inputs, nor inputs for results.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{name}: {folder} is a file; it must be a folder, or not exist yet")
    check_apart(name, folder, inputs)
    probe = folder / f".part-probe-{uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"{name}: {folder} cannot be written to ({error})") from error
    return folder


def check_apart(name: str, folder: Path, inputs: Iterable[Path]) -> None:
    """Raises DataError where `folder` holds some of the files `inputs`; `name` is the argument's."""
    where = os.path.realpath(folder)  # not Path.resolve, which ends in an error on a loop of links
    # Where an input is, itself a folder if it is a series, and where a link to it is, whose place a result
    # would take.
    inputs = list(inputs)
    own = {os.path.realpath(path) for path in inputs}
    folders = {os.path.realpath(parent) for parent in {Path(path).parent for path in inputs}}
    if where in own | folders | {os.path.dirname(place) for place in own}:
        raise DataError(f"{name}: {folder} holds the inputs; give another folder")


def first_line(path: Path) -> str:
    """Of a file of text, without its end; of one of another kind something that no text begins with."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(1000).rstrip("\r\n")


def check_own(name: str, path: Path, own: Callable[[Path], bool], what: str) -> None:
    """Raises DataError where a file is there that a command would write over, and is neither empty nor of
    its own kind.

    `own`: whether it is, by its content; `what`: in words what it would be; `name` is the argument's.
    """
    if path.exists() and not (path.is_file() and (path.stat().st_size == 0 or own(path))):
        raise DataError(f"{name}: {path} is there, and is no {what}; give another {name}, or delete that")


def read_json(path: Path) -> Any:
    """What a JSON file holds, in any of the encodings that JSON has, with a byte order mark or without.

    Raises DataError where it cannot be read, or an object in it has a key twice, of which all but one would
    be lost.
    """
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error


def digest_of(path: Path) -> str:
    """The SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(content: Mapping[str, Any], path: Path, *, shared: bool = False) -> None:
    """Writes a mapping of names to tensors and plain data; for `shared` see `atomic`.

    Raises OSError where the file cannot be written; the one that was there stays.
    """
    with atomic(path, shared=shared) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{path}: cannot be written; is the disk full? ({error})") from error


def load_tensors(path: str | Path) -> Mapping[str, Any]:
    """The mapping that torch.save wrote to a file.

    Raises FileNotFoundError where there is none, DataError where it holds anything else.
    """
    try:
        with warnings.catch_warnings():  # torch warns of TorchScript, and then raises
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
            if zipfile.is_zipfile(path):  # torch.load reads no checksums
                with zipfile.ZipFile(path) as archive:
                    if (part := archive.testzip()) is not None:
                        raise ValueError(f"{part} is damaged")
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        reason = str(error) if "damaged" in str(error) else type(error).__name__
        raise DataError(f"{path}: not a checkpoint, no file of tensors and plain data ({reason})") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}; it must be a mapping of names to tensors")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content
