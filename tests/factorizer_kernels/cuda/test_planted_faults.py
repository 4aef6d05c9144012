"""Faults planted into copies of the CUDA kernels' sources: the tests in ``emulated`` must find each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation.build import CSRC, build, missing

import factorizer_kernels as fk

pytest.importorskip("pybind11")

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def run(module: Path, test: str) -> subprocess.CompletedProcess:
    path = [str(Path(fk.__file__).parents[1]), str(HERE.parents[1])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(path), "FACTORIZER_KERNELS_EMULATED": str(module),
    }  # fmt: skip
    plugin = ["-p", "cuda_emulation.replace_native"]
    command = [sys.executable, "-m", "pytest", *plugin, "-q", f"{HERE / 'emulated'}{test}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# What is broken: the file, the text and what it becomes, the test that must fail, and words of its failure.
FAULTS = {
    "a shift off by one": (
        "windows/windows.cuh", "cell + size[axis] - roll", "cell + size[axis] - roll - 1",
        "test_maps[hals-1-relu-one copy]", "assert",
    ),
    "a lane left out of a sum": (
        "common/sums.cuh", "v[i + HALF] : v[i]) + given",
        "v[i + HALF] : v[i]) + (lane() == 5 ? 0.0f : given)",
        "test_maps[mu-2-relu-2-D odd]", "assert",
    ),
    "a wrong sign in the backward": (
        "nmf/iterations.cuh", "return -(f_new", "return (f_new", "test_maps[hals-2-None-2-D odd]", "assert",
    ),
}  # fmt: skip
MORE_FAULTS = {
    "a barrier that some threads pass by": (
        "common/sums.cuh", "    __syncthreads();", "    if (first_warp()) __syncthreads();",
        "test_window_sizes[10-[None, 3]]", "wait for others that never come",
    ),
    "a copy's window off by one": (
        "windows/boxes.cuh", "start[axis] + windows.shifts[copy][axis]",
        "start[axis] + windows.shifts[copy][axis] + 1",
        "test_maps[hals-1-relu-2-D odd]", "assert",
    ),
    "a window of four left out": (
        "windows/windows.cuh", "if (index >= per_shift) return", "if (index + 1 >= per_shift) return",
        "test_the_shape_that_matters[hals-1-torch.float32]", "assert",
    ),
    "a matrix of the tensor cores read from half its columns": (
        "nmf/rank_one.cu", "lane() / 8 * 8", "lane() / 8 * 4",
        "test_the_shape_that_matters[hals-1-torch.bfloat16]", "assert",
    ),
    "a row of the pairs' sums in another's place": (
        "nmf/rank_one.cu", "g * max_rows + 2 * t", "(g ^ 1) * max_rows + 2 * t",
        "test_the_shape_that_matters[hals-1-torch.float16]", "assert",
    ),
    "a warp left out of a sum": (
        "common/sums.cuh", "warp < blockDim.x / 32; ++warp", "warp + 1 < blockDim.x / 32; ++warp",
        "test_window_sizes[10-[None, 3]]", "assert",
    ),
    # The derivative of a scale that cancels but for eps, so only where eps can be seen.
    "a wrong sign in the rank-1 backward": (
        "nmf/rank_one.cuh", "db = -over_rows", "db = over_rows",
        "test_rank_one_identity[one copy-4-None-0.01]", "assert",
    ),
    "a shuffle that some lanes pass by": (
        "nmf/rank_one.cuh", "  const int m = lane() % max_rows;\n  float a = moments.a",
        "  const int m = lane() % max_rows;\n  if (lane() == 9) return Step(0.0f, eps);\n"
        "  float a = moments.a",
        "test_maps[hals-1-relu-2-D odd]", "wait for others that never come",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault", [*FAULTS.items(), *(pytest.param(f, marks=pytest.mark.slow) for f in MORE_FAULTS.items())],
    ids=[*FAULTS, *MORE_FAULTS],
)  # fmt: skip
def test_planted_faults_are_found(fault, tmp_path):
    _, (name, text, broken, test, words) = fault
    shutil.copytree(CSRC, tmp_path / "csrc")
    file = tmp_path / "csrc" / "cuda" / name
    source = file.read_text()
    assert source.count(text) == 1
    file.write_text(source.replace(text, broken))
    build(tmp_path / "csrc", tmp_path / "_native.so")
    done = run(tmp_path / "_native.so", f"/test_operators.py::{test}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout
    assert "1 failed" in done.stdout.splitlines()[-1]
