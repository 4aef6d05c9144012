"""Files and folders of results: whole or not there at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .errors import DataError


@contextmanager
def atomic(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path in the folder of `path` to write to, renamed to `path` on success.

    So a file under its final name is always whole: after an exception or a kill the old one, or
    none. The temporary name keeps the suffix, which is how nibabel and matplotlib know the format.
    What a killed run left there the next one writes over, unless the file is `shared`: then other
    processes may write the same at the same time, each under a name of its own.
    """
    path = Path(path)
    temporary = path.with_name(f".part-{f'{os.getpid()}-' if shared else ''}{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # a full disk names no file
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def prepare_folder(name: str, folder: Path, cases: Sequence[Case] = ()) -> Path:
    """Makes `folder` and finds out whether it can be written to; `name` is the argument's.

    Raises DataError where it cannot, or where it holds the images of `cases`: results must not be taken
    for inputs, nor inputs for results.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{name}: {folder} is a file; it must be a folder, or not exist yet")
    if any(path.resolve().parent == folder.resolve() for case in cases for path in case.images):
        raise DataError(f"{name}: {folder} holds the inputs; give another folder")
    probe = folder / f".part-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DataError(f"{name}: {folder} cannot be written to ({error})") from error
    return folder


def save_tensors(content: Mapping[str, Any], path: Path, *, shared: bool = False) -> None:
    """Writes a mapping of names to tensors and plain data; `shared` as of `atomic`.

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
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        kind = type(error).__name__
        raise DataError(f"{path}: not a checkpoint, no file of tensors and plain data ({kind})") from error
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: holds a {type(content).__name__}; it must be a mapping of names to tensors")
    return content
