"""The tests of this folder run where Triton interprets its kernels, in a process of their own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the variable cannot be set for a part of a
session; and set for the whole session it would hide the compiled kernels from the other tests.
"""

import importlib.util
import os
from pathlib import Path

import nested
import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SUITE = nested.Suite(Path(__file__).parent, lambda folder: ({"TRITON_INTERPRET": "1"}, []))
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["*"]


def pytest_runtest_protocol(item, nextitem):
    return None if INTERPRETED else SUITE.run(item, nextitem)


@pytest.fixture(autouse=True)
def patch_once(monkeypatch):
    """Device functions run as they are, more than twice as fast.

    The interpreter patches ``triton.language`` at a kernel's launch and once more at every call of a
    device function inside it. The launch's patch serves all our device functions, and one more, for the
    length of a test, those of Triton's own library.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    scope = interpreter._patch_lang(tl.sum.fn)
    yield
    scope.restore()
