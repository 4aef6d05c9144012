"""The memory of an inference on a CPU: the peak of a process of its own, above what it has before."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import factorizer
import factorizer_kernels as fk

# As the command line does it, but for the reading. VmHWM, the process's peak, begins anew where 5 is written.
PROGRAM = """
import re, sys
from pathlib import Path
import torch
import factorizer_kernels as fk
from factorizer_support import plan_for
from factorizer.models.build import build_network
from factorizer.segmentation.inference import Predictor

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(2)
fk.keep_freed_memory()
network = {
    "spatial_size": (64,) * 3, "encoder_depth": (1, 1, 1), "encoder_width": (24, 48, 96),
    "strides": (1, 2, 2), "decoder_depth": (1, 1), "local": 3,
}
plan = plan_for(("A", "B", "C", "D"), crop=(64,) * 3, network=network)
predictor = Predictor([(build_network(plan.network, 0), plan)], whole=sys.argv[1] == "whole")
image = torch.randn(4, *map(int, sys.argv[2:]))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
predictor.run(*predictor.models[0], image)
print(status("VmHWM") - before)
"""


def peak(*arguments: str) -> float:
    """MiB of a process above what it had before the network ran."""
    folders = [Path(factorizer.__file__).parents[1], Path(__file__).parents[2]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize(
    ("how", "size", "finest", "most"),
    [
        # 4.5 to 5.5 maps, measured; 8.2 where nothing is overwritten, 9.6 where torch convolves.
        ("windows", (96, 96, 64), (64, 64, 64), 6.5),
        # 2.1 to 2.4 maps; 3.4 without slabs, 6.4 where nothing is overwritten.
        ("whole", (160, 96, 96), (160, 96, 96), 3),
    ],
)
def test_peak_is_a_few_maps(how, size, finest, most):
    """In maps of the finest level, with all that the network keeps, the logits and their sums."""
    if "cpu" not in [backend.name for backend in fk.backends() if backend.available]:
        pytest.skip("without kernels nothing is overwritten")
    one = 4 * 24 * math.prod(finest) / 2**20
    assert peak(how, *map(str, size)) < most * one
