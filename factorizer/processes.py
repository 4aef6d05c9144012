"""Several processes that work together, as torchrun starts them; or one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from factorizer.data import DataError


def place() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun tells them: (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group() -> Iterator[None]:
    """Joins the processes that torchrun started, to train together; does nothing without torchrun.

    Tensors travel through NCCL on CUDA devices, through Gloo on the CPU.
    """
    if place()[1] == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name; without one a GPU if there is one, the one that torchrun's local rank
    names, else the CPU.

    Raises DataError where there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"device: {name!r} is no device ({error})") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DataError(f"device: {name!r} is not here: torch sees no CUDA device")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device
