"""Where the compiled module is missing the package works, and says why and what to do."""

import importlib.machinery
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

import factorizer_kernels as fk

PROGRAM = """
import torch, factorizer_kernels as fk
for backend in fk.backends():
    print(backend.name, backend.available, backend.reason)
fk.nmf(torch.rand(3, 4), torch.rand(3, 1), torch.rand(4, 1))
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its module."""
    kept = shutil.ignore_patterns("_native*", "_left_out.txt", "__pycache__")
    shutil.copytree(Path(fk.__file__).parent, tmp_path / "factorizer_kernels", ignore=kept)
    return tmp_path


def run(package: Path, program: str) -> str:
    # -S: no .pth file, which might bring in another installation's module.
    command = [sys.executable, "-S", "-c", program]
    path = os.pathsep.join([str(package), *site.getsitepackages()])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=True)
    return done.stdout


def reasons(package: Path) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in run(package, PROGRAM).splitlines())


def test_a_source_folder(package):
    (package / "CMakeLists.txt").touch()
    reason = f"False {package} is a source folder without a compiled module: start Python in another folder"
    found = reasons(package)
    assert found["cpu"].startswith(reason)
    assert found["cuda"].startswith(reason)
    assert f"pip install -e {package}" in found["cpu"]


def test_an_installation_without_a_compiler(package):
    assert (
        "installed without its compiled module: reinstall it with a C++17 compiler" in reasons(package)["cpu"]
    )


def test_a_triton_that_is_too_old(package):
    """Of which no more is looked at than the version."""
    (package / "triton/language").mkdir(parents=True)
    (package / "triton/language/__init__.py").touch()
    (package / "triton/__init__.py").write_text("__version__ = '3.3.1+git'\n")
    reason = "False Triton 3.3.1+git is too old: pip install 'triton>=3.4'"
    assert reasons(package)["triton"].startswith(reason)


def test_a_module_that_cannot_be_loaded(package):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / "factorizer_kernels" / f"_native{suffix}").write_text("no machine code")
    assert reasons(package)["cpu"].startswith("False the compiled module cannot be loaded: ")
