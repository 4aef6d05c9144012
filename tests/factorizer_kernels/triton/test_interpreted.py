"""Runs the tests in ``interpreted`` under Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is decorated, so the variable cannot be set for a part of a
session; and set for the whole session it would hide the compiled kernels from the other tests.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import factorizer_kernels as fk

pytest.importorskip("triton")

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "marker", ["not slow", pytest.param("slow", marks=pytest.mark.slow)], ids=["main", "slow"]
)
def test_interpreted(marker):
    environment = {**os.environ, "PYTHONPATH": str(Path(fk.__file__).parents[1]), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE / "interpreted"), "-q", "-m", marker]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
