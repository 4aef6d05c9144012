"""The tests of this folder run where the CUDA kernels are emulated; ../test_emulated.py sees to that.

FACTORIZER_KERNELS_EMULATED names the module that build.py made, which cuda_emulation/replace_native.py has
put in the installed one's place; here the backend "cuda" is made to serve CPU tensors.
"""

import ctypes
import os

import pytest

from factorizer_kernels import choice
from factorizer_kernels.shared import cuda

MODULE = os.environ.get("FACTORIZER_KERNELS_EMULATED")
collect_ignore_glob = [] if MODULE else ["*"]


class Device:
    """Where the tests want launches to go, and what the emulation saw of them."""

    index, stream = 0, 0

    def __init__(self):
        self.library = ctypes.CDLL(MODULE)

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
    monkeypatch.setitem(choice._DEVICES, "cuda", "cpu")
    monkeypatch.setattr(cuda, "target", lambda x: (emulated.index, emulated.stream))
    monkeypatch.setattr(cuda, "processors", lambda x: 1)
    monkeypatch.setitem(choice._PROBES, "cuda", lambda: choice.Backend("cuda", True, "emulated"))
    emulated.launches()
    return emulated
