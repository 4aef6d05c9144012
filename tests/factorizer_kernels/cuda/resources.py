"""Compiles CUDA kernels and prints, as JSON, what they take of a multiprocessor.

``python resources.py ARCHITECTURES FILES``, as in ``80,90 rank_one compose``.
``python resources.py --record`` compiles all of them for all the architectures, some minutes, and writes
resources.json.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from machine_code import instructions

CSRC = Path(__file__).parents[3] / "csrc"
RECORD = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
WITHOUT_KERNELS = ("swin_nmf", "versions")
SOURCES = {p.stem: p for p in sorted((CSRC / "cuda").rglob("*.cu")) if p.stem not in WITHOUT_KERNELS}
NVCC = shutil.which("nvcc")
# Files whose instructions are counted, of one architecture: the kernels of most calls.
COUNTED, COUNTED_ARCHITECTURE = ("rank_one", "compose"), 90

Table = dict[str, tuple]
# A kernel's name, its first constant, and the type of the map where it has one: f, or N..8bfloat16E.
KERNEL = r"_Z.*?\d([a-z_]+_kernel)ILi(\d+)E(?:(f)|N\w*?\d(b?float16)E)?"


def name(file: str, found: re.Match, architecture: str) -> str:
    of = "float" if found[3] else found[4]
    return f"{file} {found[1]}<{found[2]}{f', {of}' if of else ''}> {architecture}"


def version() -> str:
    """Of nvcc, as in 13.0."""
    words = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", words)[1]


def resources(file: str, architectures) -> Table:
    """(registers, bytes of shared memory, bytes of spills) of "file kernel<K> sm_N".

    Of COUNTED files the instructions of COUNTED_ARCHITECTURE, by class, are the fourth.
    """
    # The flags are those of CMakeLists.txt.
    codes = ",".join(f"sm_{a}" for a in architectures)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(NVCC, "-std=c++17", "-O3", "--prec-div=false", "-Xptxas", "-v"),
            *(f"-gencode=arch=compute_{min(architectures)},code=[{codes}]", "-I", CSRC),
            *("-c", SOURCES[file], "-o", Path(folder) / "object.o"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counted = file in COUNTED and COUNTED_ARCHITECTURE in architectures
        counts = instruction_counts(file, Path(folder) / "object.o") if counted else {}
    table: Table = {}
    kernel, spills = "", 0
    for line in done.stderr.splitlines():
        if found := re.search(rf"Compiling entry function '{KERNEL}.*' for '(sm_\d+)'", line):
            kernel = name(file, found, found[5])
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            table[kernel] = (int(found[1]), int(shared[1]) if shared else 0, spills)
            if kernel in counts:
                table[kernel] += (counts[kernel],)
    assert table, done.stderr
    return table


def _cuobjdump() -> str:
    """The toolkit's, or that of Triton's wheel, which can be newer."""
    import triton

    beside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or str(beside)


def instruction_counts(file: str, compiled: Path) -> dict[str, dict[str, int]]:
    """Of each kernel in an object file."""
    architecture = f"sm_{COUNTED_ARCHITECTURE}"
    command = [_cuobjdump(), "-sass", "-arch", architecture, compiled]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {}
    for part in listing.split("Function : ")[1:]:
        if found := re.match(KERNEL, part):
            counts[name(file, found, architecture)] = instructions(part)
    return counts


def all_resources(files, architectures) -> Table:
    with ThreadPoolExecutor(2) as threads:
        tables = threads.map(lambda file: resources(file, architectures), files)
    return {kernel: used for table in tables for kernel, used in table.items()}


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        table = sorted(all_resources(SOURCES, ARCHITECTURES).items())
        lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(used)}" for kernel, used in table)
        RECORD.write_text(f'{{\n  "nvcc": "{version()}",\n  "kernels": {{\n{lines}\n  }}\n}}\n')
    else:
        table = all_resources(sys.argv[2:], [int(a) for a in sys.argv[1].split(",")])
        print(json.dumps({"nvcc": version(), "kernels": table}))
