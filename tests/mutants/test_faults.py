"""Every planted fault makes a test fail. ``make mutants``; the last run stands in docs/compatibility.md.

The sources are copied and the C++ is built once, for the baseline instruction set; a fault in C++ then
costs the compilation of what includes it, and of what included the one before.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.faults import FAULTS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "factorizer", "factorizer_kernels", "tests", "CMakeLists.txt", "pyproject.toml")
CLEAN = tuple(dict.fromkeys(test for fault in FAULTS for test in fault.tests))


class Copy:
    """A copy of the sources that is built and tested, and forgets every fault."""

    def __init__(self, root: Path):
        self.root = root
        for name in SOURCES:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, root / name)
        for built in (root / "factorizer_kernels").glob("_native*.so"):
            built.unlink()
        cmake = pytest.importorskip("cmake").CMAKE_BIN_DIR
        ninja = pytest.importorskip("ninja").BIN_DIR
        path = os.pathsep.join([cmake, ninja, os.environ["PATH"]])
        self.environment = {**os.environ, "PYTHONPATH": str(root), "PATH": path}
        self.run(
            "cmake", "-S", root, "-B", root / "build", "-G", "Ninja", "-DFACTORIZER_KERNELS_PYTHON=ON",
            "-DFACTORIZER_KERNELS_CUDA=0", "-DFACTORIZER_KERNELS_ISAS=baseline", "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_FLAGS=-O1", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pytest.importorskip('pybind11').get_cmake_dir()}",
        )  # fmt: skip
        self.build()

    def run(self, *command, check=True, **environment) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [*map(str, command)], cwd=self.root, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done

    def build(self) -> None:
        self.run("cmake", "--build", "build")
        for built in (self.root / "build").glob("_native*.so"):
            shutil.copy(built, self.root / "factorizer_kernels")

    def failing(self, tests) -> str | None:
        """The first test that fails, or what ended them all, or None."""
        interpreted = "1" if any("interpreted" in test for test in tests) else "0"
        done = self.run(
            sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider", *tests,
            TRITON_INTERPRET=interpreted, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return None
        if done.returncode < 0:
            return f"the tests' process, ended by signal {-done.returncode}"
        found = re.search(r"^FAILED (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        assert found, done.stdout  # nothing was collected
        return found[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("mutants"))


@pytest.mark.parametrize("tests", [CLEAN[:-1], CLEAN[-1:]], ids=["native", "interpreted"])
def test_without_a_fault(copy, tests):
    assert copy.failing(tests) is None


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_fault_is_seen(copy, fault):
    path = copy.root / fault.file
    right = path.read_text()
    assert right.count(fault.right) == 1, "the sources have changed: mend the fault"
    path.write_text(right.replace(fault.right, fault.wrong))
    try:
        copy.build()  # and what an earlier fault has left: restoring costs no compilation of its own
        seen = copy.failing(fault.tests)
    finally:
        path.write_text(right)
    print(f"\n{fault.name}: {seen}")
    assert seen, "no test failed"
