"""The kernels of the instruction sets that this processor has beside the one in use; a module without any."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from factorizer_kernels.shared.native import missing, native

if missing:
    pytest.skip(missing, allow_module_level=True)
SETS = native.compiled_isas().rstrip(",").split(",")  # each processor of the last has the others


def test_a_module_for_other_processors():
    """Said, and passed over: nothing is computed by code that the processor has not."""
    script = (
        "import torch, factorizer_kernels as fk\n"
        "print({b.name: b for b in fk.backends()}['cpu'])\n"
        "assert fk.nmf(torch.rand(4, 6), torch.rand(4, 1), torch.rand(6, 1)).isfinite().all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "FACTORIZER_KERNELS_ISA": "none", "FACTORIZER_KERNELS_NATIVE": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = f"it was compiled for {', '.join(SETS)}, and FACTORIZER_KERNELS_ISA is 'none': reinstall it here"
    assert "Backend(name='cpu', available=False" in done.stdout
    assert told in done.stdout
    assert "RuntimeWarning" in done.stderr  # plain PyTorch in place of kernels is told


@pytest.mark.parametrize("name", SETS[: SETS.index(native.isa())])
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


def test_an_empty_name_is_none():
    script = "import factorizer_kernels as fk; print({b.name: b.available for b in fk.backends()}['cpu'])"
    environment = {**os.environ, "FACTORIZER_KERNELS_ISA": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
