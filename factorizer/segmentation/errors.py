"""Errors about data and options, told before anything is computed."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class DataError(ValueError):
    """Data that cannot be used. The message names the file or field, and what it needs."""


class FlatImageError(DataError):
    """An image that has one value everywhere: there is nothing to be seen in it."""


def data_error(error: BaseException | None) -> DataError | None:
    """The DataError or ValueError that made MONAI raise `error`, which tells only what part of it failed."""
    while error is not None and not isinstance(error, ValueError):
        error = error.__cause__
    return error if error is None or isinstance(error, DataError) else DataError(str(error))


def needed(module: str, extra: str, what: object) -> Any:
    """The module of an optional dependency. Raises DataError, which names the extra that has it, for `what`
    cannot be done without."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"{what}: needs {module.partition('.')[0]}: pip install 'factorizer-kernels[{extra}]'"
        ) from error


def check_counts(**options: tuple[int | None, int]) -> None:
    """Raises DataError for an option, given as its value and the least it may be, that is too small."""
    for name, (value, least) in options.items():
        if value is not None and value < least:
            raise DataError(f"{name.replace('_', '-')}: got {value}; it must be at least {least}")
