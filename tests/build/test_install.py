"""What the package promises about installing it, tried on copies of the source tree."""

import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("factorizer", "factorizer_kernels")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None,
    reason="copies the files that git lists, and here is no git checkout",
)


def run(*command, cwd=None, **env):
    """Run a command with some environment variables changed; stdout and stderr come as one."""
    env = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def files_of_a_clone():
    """Their paths, with the changes not committed yet."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT).stdout
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


def copy_tree(to):
    """The project as a clone would have it."""
    for name in files_of_a_clone():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    return to


def python_files(folder):
    return {
        path.relative_to(folder).as_posix()
        for package in PACKAGES
        for path in (folder / package).rglob("*.py")
    }


def build_wheel(tree, out, **env):
    """pip wheel with this environment's build tools; no network, kernels not optimised."""
    return run(
        *(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-index"),
        *("--no-build-isolation", "-w", out, tree),
        **{
            "FACTORIZER_KERNELS_NATIVE": "",
            "FACTORIZER_KERNELS_CUDA": 0,
            "FACTORIZER_KERNELS_ISAS": "",
            "CMAKE_BUILD_TYPE": "Debug",
            **env,
        },
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def installed(tree, tmp_path_factory):
    """An empty environment, without torch, after `pip install --no-deps .`.

    Optimised less than a real one, in half the time: that inlines less, so test_runs_on_older_processors has
    more functions to look at.
    """
    venv = tmp_path_factory.mktemp("venv")
    assert run(sys.executable, "-m", "venv", venv).returncode == 0
    python = venv / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = run(
        *(python, "-m", "pip", "install", "--no-deps", "."),
        cwd=tree,
        FACTORIZER_KERNELS_NATIVE=1,
        FACTORIZER_KERNELS_CUDA=0,
        FACTORIZER_KERNELS_ISAS="baseline;native",
        CMAKE_BUILD_TYPE="None",
        CXXFLAGS="-O1 -DNDEBUG",
    )
    if "No matching distribution found" in done.stdout:
        pytest.skip("an isolated build fetches its tools, and no package index answers")
    assert done.returncode == 0, done.stdout
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))")
    return python, Path(where.stdout.strip())


def native_module(packages):
    (module,) = (packages / "factorizer_kernels").glob("_native.*")
    return module


def test_builds_and_loads_without_torch(installed):
    python, packages = installed
    script = (
        "import importlib.util as util, sys\n"
        "assert util.find_spec('torch') is None\n"
        "spec = util.spec_from_file_location('_native', sys.argv[1])\n"
        "spec.loader.exec_module(util.module_from_spec(spec))\n"
    )
    done = run(python, "-c", script, native_module(packages))
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd here")
def test_links_the_systems_libraries_only(installed):
    _, packages = installed
    linked = run("ldd", native_module(packages)).stdout
    assert "libc.so" in linked  # ldd did its work
    assert "not found" not in linked
    names = " ".join(line.split()[0] for line in linked.splitlines())
    for library in ("torch", "c10", "python", "cuda"):
        assert library not in names


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump here")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other instruction sets")
def test_runs_on_older_processors(installed):
    """AVX instructions stand only in the functions of the namespaces avx2 and avx512."""
    _, packages = installed
    listing = run("objdump", "-d", "--no-show-raw-insn", native_module(packages)).stdout
    using_avx, function = set(), ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1]
        elif re.search(r"[yz]mm\d|\tv\w+ .*xmm\d", line):
            using_avx.add(function)
    spaces = ("4avx2", "6avx512")
    assert any(
        space in name for name in using_avx for space in spaces
    )  # objdump did its work, names are there
    assert not [name for name in using_avx if not any(space in name for space in spaces)]


def test_installs_the_two_packages_and_nothing_else(installed, tree):
    _, packages = installed
    (info,) = packages.glob("factorizer_kernels-*.dist-info")
    files = {path.as_posix() for path in Distribution.at(info).files}
    inside = {name for name in files if not name.startswith("..")}  # the console script is outside
    assert {name.split("/")[0] for name in inside} == {*PACKAGES, info.name}
    assert {n for n in inside if n.endswith(".py")} == python_files(tree)
    assert {n for n in files - inside if "__pycache__" not in n} == {"../../../bin/factorizer"}


def test_source_distribution_can_be_built_from(tree, tmp_path):
    script = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = run(sys.executable, "-c", script, tmp_path, cwd=tree)
    assert done.returncode == 0, done.stdout
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        metadata = tar.extractfile(f"{archive.name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    assert "\nLicense-Expression: Apache-2.0 AND CC-BY-SA-4.0\n" in metadata
    licences = re.findall(r"^License-File: (.+)$", metadata, re.MULTILINE)
    assert licences == ["LICENSE", "NOTICE"]
    assert {f"!{name}" for name in licences} <= set((ROOT / ".dockerignore").read_text().splitlines())
    # The tests read the documentation, examples and benchmarks too. Dotted files are git's and the like.
    wanted = {name for name in files_of_a_clone() if not name.startswith(".")} - {"Dockerfile"}
    assert wanted <= names, sorted(wanted - names)


def test_build_folder_of_tools_that_are_gone(installed, tree, tmp_path):
    """The isolated build above left its folder behind; its CMake and Ninja were deleted."""
    assert list(tree.glob("build/temp*/native/CMakeCache.txt"))
    quick = "-DFACTORIZER_KERNELS_ISAS=baseline"
    done = build_wheel(tree, tmp_path, FACTORIZER_KERNELS_NATIVE=1, CMAKE_ARGS=quick)
    assert done.returncode == 0, done.stdout
    assert (
        json.loads(next(tree.glob("build/temp*/native/tools.json")).read_text())[-1] == f"CMAKE_ARGS={quick}"
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert any("/_native." in name for name in zipfile.ZipFile(wheel).namelist())


def test_without_a_compiler(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    done = build_wheel(tree, tmp_path, PATH=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "installed WITHOUT its native kernels" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert python_files(tmp_path / "site") == python_files(tree)

    script = (
        "import sys, torch, factorizer_kernels as fk\n"
        "assert fk.__file__.startswith(sys.argv[1]), fk.__file__\n"
        "print([b.name for b in fk.backends() if b.available])\n"
        "print({b.name: b for b in fk.backends()}['cpu'].reason)\n"
        "assert fk.nmf(torch.rand(4, 6), torch.rand(4, 1), torch.rand(6, 1)).isfinite().all()\n"
    )
    # -S: no .pth file, which might bring in the checkout's own module.
    path = os.pathsep.join([str(tmp_path / "site"), *site.getsitepackages()])
    environment = {"PYTHONPATH": path, "FACTORIZER_KERNELS_NATIVE": ""}
    done = run(sys.executable, "-S", "-c", script, tmp_path, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stdout
    assert "reference" in done.stdout
    assert "'cpu'" not in done.stdout
    assert "pip cache remove factorizer_kernels" in done.stdout  # pip would bring the same wheel again


def test_left_out_on_request(installed, tree, tmp_path):
    """Also where the build folder holds an earlier build's compiled module, and a source that is gone."""
    (module,) = tree.glob("build/lib*/factorizer_kernels/_native.*")
    gone = module.with_name("gone.py")
    gone.touch()
    done = build_wheel(tree, tmp_path, FACTORIZER_KERNELS_NATIVE=0)
    assert done.returncode == 0, done.stdout
    (wheel,) = tmp_path.glob("*-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any("/_native." in name or name.endswith("/gone.py") for name in names)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CXX": "no-compiler"}, "CXX is 'no-compiler', and there is no program"),
        ({"CUDACXX": "no-nvcc"}, "CUDACXX is 'no-nvcc', and there is no program"),
        ({"FACTORIZER_KERNELS_NATIVE": "1", "CXX": "false"}, "cannot be built"),
        ({"FACTORIZER_KERNELS_CUDA": "1", "CUDACXX": "false"}, "FACTORIZER_KERNELS_CUDA=1, but"),
        ({"FACTORIZER_KERNELS_CUDA": "yes"}, "FACTORIZER_KERNELS_CUDA is 'yes': give 0 or 1"),
    ],
)
def test_what_was_asked_for_is_never_dropped_silently(tmp_path, env, words):
    done = build_wheel(copy_tree(tmp_path / "tree"), tmp_path, **env)
    assert done.returncode != 0
    assert words in done.stdout
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_an_nvcc_that_is_too_old_counts_as_absent(tmp_path):
    """Ubuntu 22.04's own: it has no cudaLaunchKernelEx, and stopped the installation."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 11.5, V11.5.119" && exit\n'
        f'exec {shutil.which("nvcc")} "$@"\n'
    )
    nvcc.chmod(0o755)
    done = build_wheel(
        copy_tree(tmp_path / "tree"), tmp_path, FACTORIZER_KERNELS_CUDA=1, CUDACXX=nvcc
    )  # fmt: skip
    assert done.returncode != 0
    assert "nvcc is of CUDA 11.5, and the kernels need 11.8 or later" in " ".join(done.stdout.split())


def test_error_in_the_sources_is_shown(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    with (tree / "csrc/cpu/common/dispatch.cpp").open("a") as source:
        source.write('\n#error "broken on purpose"\n')
    done = build_wheel(tree, tmp_path)
    assert done.returncode != 0
    assert "broken on purpose" in done.stdout
    assert "compiling the native module failed" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_refuses_a_python_that_is_too_old(tmp_path):
    """Before it makes a .venv of it, which every later call would take."""
    old = tmp_path / "old-python"
    pretend = "import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    tree = copy_tree(tmp_path / "tree")
    done = run("make", f"PYTHON={old}", ".venv/.installed-build", cwd=tree)
    assert done.returncode != 0
    assert f"PYTHON: {old} is Python 3.9; it must be 3.10 or later" in done.stdout
    assert not (tree / ".venv").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_works_in_a_folder_with_a_space(tmp_path):
    tree = copy_tree(tmp_path / "a tree")
    planned = run("make", "--dry-run", "sanitize-undefined", cwd=tree)
    assert planned.returncode == 0, planned.stdout
    assert f"-DCMAKE_MAKE_PROGRAM={tree}/.venv/bin/ninja" in shlex.split(planned.stdout, comments=True)
