"""The CUDA sources compile for the architectures named, and take no more of them than was recorded.

No GPU is needed. The C++ library's own build compiles the same sources with the same flags.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RECORDED = json.loads((HERE / "resources.json").read_text())
# Another nvcc allocates differently; of one that was not recorded only the main kernels' spills are asked.
REGISTER_SLACK = 16
MORE_INSTRUCTIONS = 1.05
SHARED_OF_A_CARD = 99 * 1024  # the least of compute capabilities 8.0 to 9.0, that of 8.9

MAIN = ("rank_one", "compose", "iterations_forward", "iterations_backward_1_4")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def compiled(architectures: str, *files: str) -> dict:
    command = [sys.executable, str(HERE / "resources.py"), architectures, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("architectures", "files"),
    [
        ("80,90", MAIN),
        pytest.param("80,86,89,90,100,120", (*MAIN, "iterations_backward_5_8"), marks=pytest.mark.slow),
    ],
    ids=["main", "all"],
)
def test_compiles_within_the_recorded_resources(architectures, files):
    made = compiled(architectures, *files)
    kernels = made["kernels"]
    for kernel, (registers, shared, spilled, *counts) in kernels.items():
        print(f"{kernel:50s} {registers:4d} registers {shared:6d} shared {spilled:5d} spilled", *counts)
    assert {kernel.rsplit(" ", 1)[1] for kernel in kernels} == {f"sm_{a}" for a in architectures.split(",")}
    expected = {
        k for k in RECORDED["kernels"] if k.split()[0] in files and k.rsplit("_", 1)[1] in architectures
    }
    assert kernels.keys() == expected, "a new kernel: record it with resources.py --record"
    for kernel, (registers, shared, spilled, *counts) in kernels.items():
        most_registers, most_shared, most_spilled, *most_counts = RECORDED["kernels"][kernel]
        assert shared <= SHARED_OF_A_CARD, kernel
        if kernel.split()[0] in MAIN:
            assert spilled == 0, kernel
        if made["nvcc"] == RECORDED["nvcc"]:
            assert spilled <= most_spilled, kernel
            assert shared <= most_shared, kernel
            assert registers <= min(most_registers + REGISTER_SLACK, 255), kernel
            assert len(counts) == len(most_counts), kernel
            for of, count in counts[0].items() if counts else ():
                assert count <= MORE_INSTRUCTIONS * most_counts[0][of], f"{kernel}: {of}"
