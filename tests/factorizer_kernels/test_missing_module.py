"""Where the compiled module is missing the package works, and says why and what to do."""

import importlib.machinery
import os
import shutil
import site
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import factorizer_kernels as fk
from factorizer_kernels.shared import native

PROGRAM = """
import torch, factorizer_kernels as fk
for backend in fk.backends():
    print(backend.name, backend.available, backend.reason)
for _ in range(2):
    fk.nmf(torch.rand(3, 4), torch.rand(3, 1), torch.rand(4, 1))
"""
SLOW = "RuntimeWarning: factorizer_kernels runs on plain PyTorch, many times slower on a CPU: "


@pytest.fixture
def package(tmp_path):
    """A copy of the package without its module."""
    kept = shutil.ignore_patterns("_native*", "_left_out.txt", "__pycache__")
    shutil.copytree(Path(fk.__file__).parent, tmp_path / "factorizer_kernels", ignore=kept)
    return tmp_path


def run(package: Path, program: str, native: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    # -S: no .pth file, which might bring in another installation's module.
    command = [sys.executable, "-S", "-c", program]
    path = os.pathsep.join([str(package), *site.getsitepackages()])
    environment = {**os.environ, "PYTHONPATH": path, "FACTORIZER_KERNELS_NATIVE": native, **more}
    return subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True)


def reasons(package: Path, **more: str) -> dict[str, str]:
    done = run(package, PROGRAM, **more)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(SLOW) == 1  # however many calls
    return dict(line.split(" ", 1) for line in done.stdout.splitlines())


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


def test_a_build_that_pip_has_kept(package):
    """Of a time without a compiler: no cache passes it for the compiled one."""
    left_out = package / "factorizer_kernels" / "_left_out.txt"
    left_out.write_text("no compiler\n")
    told = "the package was built without its compiled module (no compiler): install a C++17 compiler, then "
    assert f"False {told}`pip cache remove factorizer_kernels`" in reasons(package)["cpu"]
    done = run(package, PROGRAM, native="1")
    assert done.returncode != 0
    assert f"ImportError: FACTORIZER_KERNELS_NATIVE=1, but {told}" in done.stderr


def test_a_module_left_out_on_request_is_not_warned_of(monkeypatch):
    for reason, warned in (("no compiler", True), ("FACTORIZER_KERNELS_NATIVE=0", False)):
        monkeypatch.setattr(native, "_left_out", lambda reason=reason: reason)
        native._warn.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            native.warn_once()
        assert bool(told) == warned
    native._warn.cache_clear()


def test_a_triton_that_is_too_old(package):
    """Of which no more is looked at than the version."""
    (package / "triton/language").mkdir(parents=True)
    (package / "triton/language/__init__.py").touch()
    (package / "triton/__init__.py").write_text("__version__ = '3.3.1+git'\n")
    reason = "False Triton 3.3.1+git is too old: pip install 'triton>=3.4'"
    # Interpreted, so that a PyTorch without CUDA looks for it too.
    assert reasons(package, TRITON_INTERPRET="1")["triton"].startswith(reason)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch may have a device for Triton")
def test_triton_is_not_imported_where_it_could_run_nothing():
    """It takes 0.08 GB, and 0.2 s of every start. `backends()` says why it is left out."""
    program = (
        "import sys, factorizer_kernels as fk; print([b for b in fk.backends() if b.name == 'triton']); "
        "assert 'triton' not in sys.modules"
    )
    done = run(Path(fk.__file__).parents[1], program, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert f"available=False, reason='PyTorch {torch.__version__} is built without CUDA'" in done.stdout


def test_a_module_that_cannot_be_loaded(package):
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / "factorizer_kernels" / f"_native{suffix}").write_text("no machine code")
    assert reasons(package)["cpu"].startswith("False the compiled module cannot be loaded: ")
