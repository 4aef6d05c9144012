"""Builds the native module ``factorizer_kernels._native`` by CMake and Ninja.

What is installed without it works through the reference (and Triton), so a machine that lacks
something the build needs (a C++17 compiler, Python's headers, CMake) gets a notice and an
installation without the module. An error *in compiling* the sources is another matter: it is shown
in full and stops the installation, because a silent fallback would hide it.

Environment variables:

``FACTORIZER_KERNELS_NATIVE``
    ``0`` leaves the native module out, ``1`` makes whatever hinders it an error. Unset: as above.
``FACTORIZER_KERNELS_CUDA``
    ``0`` leaves the CUDA kernels out, ``1`` makes a missing nvcc an error. Unset: they are built
    where a working nvcc is found, and a card that they can run on.
``FACTORIZER_KERNELS_CUDA_ARCHS``
    CUDA architectures separated by semicolons, as in ``"80;90"``, or ``all``, for a wheel. Unset: those of
    the cards in this machine; without one 80, whose PTX the drivers of newer cards compile at the first use.
``FACTORIZER_KERNELS_ISAS``
    Instruction sets of the CPU kernels separated by semicolons (``baseline``, ``avx2``, ``avx512``, and
    ``native``, the best that this machine has), or ``all``, for a wheel, an image, or machines that share an
    installation. Unset: ``native``, which a processor without it cannot use.
``CXX``, ``CUDACXX``, ``CXXFLAGS``, ``CMAKE_BUILD_PARALLEL_LEVEL`` and the like
    are CMake's own and work as ever. A compiler that is named and not there is an error. ``CMAKE_ARGS`` is
    handed to CMake as it is, as other build backends do.

An installation without the module keeps the reason in ``factorizer_kernels/_left_out.txt``, and
``factorizer_kernels.backends()`` gives it: pip keeps the wheels that it builds of a fixed commit or a source
archive, and comes back with one of a time before there was a compiler, without asking this file. So the
package itself warns when it runs without the module, and raises ImportError where
``FACTORIZER_KERNELS_NATIVE=1`` stands in its environment.
"""

import contextlib
import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LEFT_OUT = "_left_out.txt"  # read by factorizer_kernels/shared/native.py
COMPILER_VARIABLES = ("PATH", "CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CMAKE_ARGS")

NOTICE = """
----------------------------------------------------------------------------------------
factorizer-kernels is installed WITHOUT its native kernels.

{reason}

Everything works, through PyTorch alone (or Triton), but more slowly. For the fast
kernels install a C++17 compiler (Debian, Ubuntu: apt install g++ python3-dev;
macOS: xcode-select --install; conda: conda install cxx-compiler; Windows: Clang,
with CXX=clang-cl in the environment), then
`pip cache remove factorizer_kernels`, as pip may have kept this build, and install
again with `pip install --force-reinstall --no-deps`.
----------------------------------------------------------------------------------------
"""


class NotHere(Exception):
    """Something the native build needs is not on this machine."""


def find_tool(name: str) -> str:
    """A build tool: the one installed with the build requirements, else the machine's."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    with contextlib.suppress(ImportError):
        folders.insert(0, importlib.import_module("cmake").CMAKE_BIN_DIR)
    tool = shutil.which(name, path=os.pathsep.join(folders))
    if tool is None:
        raise NotHere(f"{name} was not found: pip install {name}")
    return tool


def named_compilers() -> None:
    """Stop where CXX or CUDACXX names a program that is not there: it was asked for."""
    for name in ("CXX", "CUDACXX"):
        words = shlex.split(os.environ.get(name, ""))
        if words and shutil.which(words[0]) is None:
            sys.exit(f"error: {name} is {os.environ[name]!r}, and there is no program {words[0]!r}")


def environment(name: str) -> str:
    """0, 1, or AUTO where the variable is unset or empty."""
    value = os.environ.get(name, "").strip() or "AUTO"
    if value not in ("0", "1", "AUTO"):
        sys.exit(f"error: {name} is {value!r}: give 0 or 1, or leave it unset")
    return value


def in_a_line(reason: NotHere) -> str:
    """The first line, or of CMake's many what stands under its first error."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    errors = [place for place, line in enumerate(lines[:-1]) if line.startswith("CMake Error")]
    return f"{lines[0]} {lines[errors[0] + 1]}" if errors else lines[0]


class BuildNative(build_ext):
    """Builds the module, or drops it from the distribution and says why."""

    def run(self):
        native = environment("FACTORIZER_KERNELS_NATIVE")
        cuda = environment("FACTORIZER_KERNELS_CUDA")
        self.remove_old()
        if native == "0":
            print("FACTORIZER_KERNELS_NATIVE=0: the native module is left out", flush=True)
            self.leave_out("FACTORIZER_KERNELS_NATIVE=0")
        else:
            named_compilers()
            try:
                self.build(cuda)
            except NotHere as reason:
                if "1" in (native, cuda):
                    sys.exit(f"error: the native module cannot be built: {reason}")
                print(NOTICE.format(reason=reason), file=sys.stderr, flush=True)
                self.leave_out(in_a_line(reason))
        super().run()

    def leave_out(self, reason):
        self.extensions = []
        self.distribution.ext_modules = None
        for folder in self.packages():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LEFT_OUT).write_text(f"{reason}\n", encoding="utf-8")

    def packages(self):
        """Where the package is built; an editable installation has its module in the source folder."""
        built = Path(self.build_lib) / "factorizer_kernels"
        return (built, ROOT / "factorizer_kernels") if self.inplace else (built,)

    def build_extension(self, ext):
        """Nothing: CMake has built it when run() comes here."""

    def remove_old(self):
        """What an earlier build left must not pass for this one's."""
        for folder in self.packages():
            for old in (*folder.glob("_native.*so"), *folder.glob("_native.*pyd"), folder / LEFT_OUT):
                old.unlink(missing_ok=True)

    def build(self, cuda):
        cmake = find_tool("cmake")
        ninja = find_tool("ninja")
        try:
            import pybind11
        except ImportError:
            raise NotHere("pybind11 was not found: pip install pybind11") from None

        # A build folder remembers the paths of the tools that made it, and those of an isolated
        # build are gone when it ends: only a folder made by the same tools is used again. For an
        # editable installation setuptools offers one that is deleted; developers want theirs kept.
        folder = ROOT / "build/editable" if self.editable_mode else Path(self.build_temp).resolve()
        folder /= "native"
        tools = [cmake, ninja, pybind11.get_cmake_dir(), sys.executable, str(ROOT)]
        tools += [f"{name}={os.environ.get(name)}" for name in COMPILER_VARIABLES]
        record = folder / "tools.json"
        if not record.is_file() or json.loads(record.read_text()) != tools:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record.write_text(json.dumps(tools))

        archs = os.environ.get("FACTORIZER_KERNELS_CUDA_ARCHS", "")
        configure = [
            *(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DFACTORIZER_KERNELS_PYTHON=ON",
            f"-DFACTORIZER_KERNELS_CUDA={cuda}",
            f"-DFACTORIZER_KERNELS_CUDA_ARCHS={archs}",
            f"-DFACTORIZER_KERNELS_ISAS={os.environ.get('FACTORIZER_KERNELS_ISAS', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        done = subprocess.run(configure, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            shutil.rmtree(folder)  # CMake would remember what it did not find
            raise NotHere(f"CMake could not set up the build:\n{done.stdout.rstrip()}")
        print(done.stdout, flush=True)

        if subprocess.run([cmake, "--build", folder]).returncode:
            sys.exit(
                "error: compiling the native module failed; the compiler's words are above.\n"
                "FACTORIZER_KERNELS_CUDA=0 leaves the CUDA kernels out, "
                "FACTORIZER_KERNELS_NATIVE=0 the native module."
            )
        prefix = Path(self.build_lib).resolve()
        subprocess.run([cmake, "--install", folder, "--prefix", prefix], check=True)


class Wheel(bdist_wheel):
    """Tags the wheel for this platform only if there is a native module in it."""

    def run(self):
        # What an earlier build of this folder gathered may be gone from the sources.
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(
    ext_modules=[Extension("factorizer_kernels._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
