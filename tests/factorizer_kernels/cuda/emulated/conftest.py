"""The tests of this folder run the CUDA kernels' sources, compiled for the CPU, in a process of their own.

FACTORIZER_KERNELS_EMULATED names the module that build.py made, which cuda_emulation/replace_native.py has
put in the installed one's place; here the backend "cuda" is made to serve CPU tensors.
"""

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path

import nested
import pytest
from cuda_emulation.build import CSRC, build, missing

from factorizer_kernels import choice
from factorizer_kernels.shared import cuda

MODULE = os.environ.get("FACTORIZER_KERNELS_EMULATED")


def _build(folder: Path) -> tuple[dict[str, str], list[str]]:
    module = folder / "_native.so"
    build(CSRC, module)
    return {"FACTORIZER_KERNELS_EMULATED": str(module)}, ["-p", "cuda_emulation.replace_native"]


SUITE = nested.Suite(Path(__file__).parent, _build)


def pytest_collection_modifyitems(items):
    if reason := missing():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_protocol(item, nextitem):
    return None if MODULE or missing() else SUITE.run(item, nextitem)


class Device:
    """Where the tests want launches to go, and what the emulation saw of them."""

    index, stream = 0, 0

    def __init__(self):
        self.library = ctypes.CDLL(MODULE)

    @contextmanager
    def current(self, x):
        """What torch.cuda.device does; launches on a device that is not the current one are errors."""
        self.library.emulation_set_device(self.index)
        try:
            yield
        finally:
            self.library.emulation_set_device(0)

    def launches(self) -> list[tuple[int, int, int, int]]:
        """(device, stream, blocks, threads) of every launch since the last call."""
        room = 4096
        records = (ctypes.c_int64 * (4 * room))()
        count = self.library.emulation_launches(records, room)
        assert count <= room
        return [tuple(records[4 * i : 4 * i + 4]) for i in range(count)]


@pytest.fixture(autouse=True)
def device(monkeypatch):
    """Lets ``use_backend("cuda")`` serve CPU tensors."""
    emulated = Device()
    monkeypatch.setattr(cuda, "current", emulated.current)
    monkeypatch.setattr(cuda, "target", lambda x: (emulated.index, emulated.stream))
    monkeypatch.setattr(cuda, "processors", lambda x: 1)
    record = choice._RECORDS["cuda"]._replace(devices=("cpu",), probe=lambda: (True, "emulated"))
    monkeypatch.setitem(choice._RECORDS, "cuda", record)
    emulated.launches()
    return emulated
