"""Builds the native module with its CUDA kernels for the CPU: ``python build.py CSRC OUTPUT``.

The same sources that nvcc compiles, against tests/cuda_emulation instead of CUDA. The module stands for
``factorizer_kernels._native``, in a process of its own.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATION = Path(__file__).parent
OBJECTS = EMULATION.parents[1] / "build" / "cuda_emulation"  # kept, under the hash of what they are made of
MOST_OBJECTS = 64
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
CSRC = EMULATION.parents[1] / "csrc"


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which(COMPILER[0]) is None:
        return f"no C++ compiler ({COMPILER[0]})"
    return None if CSRC.is_dir() else "the sources are not here"


def build(csrc: Path, output: Path) -> None:
    """Compile the folder ``csrc`` into the module ``output``."""
    import pybind11

    folders = [EMULATION, csrc, pybind11.get_include(), sysconfig.get_path("include")]
    flags = [
        *(
            "-std=c++17",
            "-O1",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-unknown-pragmas",
        ),
        *("-DFK_WITH_CUDA", '-DFK_CUDA_ARCHITECTURES="80+"'),
    ]
    kernels = sorted((csrc / "cuda").rglob("*.cu"))
    others = [*sorted((csrc / "bindings").glob("*.cpp")), *sorted(EMULATION.glob("*.cpp"))]
    headers = [*csrc.rglob("*.h"), *csrc.rglob("*.def"), *csrc.rglob("*.cuh"), *EMULATION.glob("*.h")]
    OBJECTS.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        # Of the CUDA headers only offsets.cpp, beside the kernels, needs more than the host's.
        device = source.suffix == ".cu" or source.name == "offsets.cpp"
        parts = [source, *(h for h in headers if device or h.suffix != ".cuh")]
        made_of = hashlib.sha256(repr([COMPILER, flags, folders[2:]]).encode())
        for part in sorted(parts, key=lambda path: path.name):
            made_of.update(part.read_bytes())
        made = OBJECTS / f"{source.stem}-{made_of.hexdigest()[:16]}.o"
        if not made.exists():
            part = made.with_suffix(f".{os.getpid()}.part")
            includes = [f"-I{folder}" for folder in folders]
            subprocess.run([*COMPILER, *flags, *includes, "-x", "c++", "-c", source, "-o", part], check=True)
            os.replace(part, made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, [*kernels, *others]))
    linked = output.with_name(f"{output.name}.part")
    subprocess.run([*COMPILER, "-shared", "-o", linked, *objects], check=True)
    os.replace(linked, output)
    for stale in sorted(OBJECTS.glob("*.o"), key=lambda path: path.stat().st_mtime)[:-MOST_OBJECTS]:
        stale.unlink(missing_ok=True)


if __name__ == "__main__":
    build(*map(Path, sys.argv[1:]))
