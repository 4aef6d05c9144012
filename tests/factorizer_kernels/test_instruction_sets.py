"""The kernels of each instruction set that this processor has and the module would not pick here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import factorizer_kernels as fk

SETS = ("baseline", "avx2", "avx512")  # each processor of the last has the others
REASON = next(b.reason for b in fk.backends() if b.name == "cpu")
PICKED = next((name for name in SETS if name in REASON.split()), "baseline")


@pytest.mark.skipif(PICKED == "baseline", reason=f"no other instruction set here: {REASON}")
@pytest.mark.parametrize("name", SETS[: SETS.index(PICKED)])
def test_kernels_of(name):
    """What compares the C++ kernels with the reference, on all of the operators, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, "-k", "test_cpu_meets_reference or test_against_float64", str(Path(__file__).parent)],
        env={**os.environ, "FACTORIZER_KERNELS_ISA": name, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 300
