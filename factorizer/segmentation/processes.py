"""Several processes that work together, as torchrun starts them; or one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from factorizer.segmentation.errors import DataError

T = TypeVar("T")


def group_position() -> tuple[int, int]:
    """This process's index among those of the process group, and their number: (0, 1) without a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def part_of(text: str) -> tuple[int, int]:
    """Which part of how many "3/16" is, the first being 1: (3, 16). Raises DataError for anything else."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise DataError(f"part: got {text!r}; it must be such as 3/16, a number from 1 to that of all parts")
    return int(part), int(parts)


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, to work together; does nothing without torchrun.

    Tensors travel through NCCL on CUDA devices, through Gloo on the CPU.
    """
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    # The processes' volumes differ in size, so one may wait long for another. If one fails, torchrun stops
    # them all.
    dist.init_process_group(timeout=timedelta(days=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather(values: Sequence[T]) -> list[T]:
    """Those of all processes of the group, in every process; `values` where there is no group."""
    if not dist.is_initialized():
        return list(values)
    parts: list[Sequence[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without one a GPU if there is one, the one that torchrun's local rank
    names, else the CPU.

    Raises DataError where there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise DataError(f"device: {name!r} is no device ({error})") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise DataError(f"device: {name!r} is not supported; give cpu, cuda or mps")
    if device.type == "cpu" and device.index:
        raise DataError(f"device: got {name!r}; there is one cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DataError(f"device: {name!r} is not here: torch sees no Apple GPU")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DataError(f"device: {name!r} is not here: torch sees no CUDA device")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device
