"""The command line itself: what it loads, and how it ends."""

import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import factorizer.__main__
import factorizer_kernels
from factorizer.commands.cli import _errors, app
from factorizer.segmentation.errors import DataError


def test_help_loads_nothing_heavy():
    code = (
        "import sys, factorizer.commands.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'monai', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "factorizer.commands.cli")
    with pytest.raises(SystemExit, match=r"needs typer: pip install 'factorizer-kernels\[seg\]'"):
        factorizer.__main__.main()


@pytest.mark.parametrize(
    "options",
    [
        "predict --checkpoint no.pt --input no --output no",
        "explain --checkpoint no.pt --input no --output no",
        "speed --checkpoint no.pt --input no --output no",
        "train no --out no",
        "demo --data no --out no",
    ],
)
def test_networks_run_in_memory_that_is_kept(options, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(factorizer_kernels, "keep_freed_memory", lambda: calls.append(1))
    assert CliRunner().invoke(app, options.split()).exit_code == 2
    assert calls == [1]


def test_names_are_imported_at_their_first_use():
    code = "import factorizer; assert set(factorizer.__all__) <= set(dir(factorizer)); factorizer.NMF"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_of_a_worker_is_told_without_its_traceback(capsys):
    text = "Caught DataError in DataLoader worker process 2.\nOriginal Traceback:\n  File\n"
    with pytest.raises(typer.Exit) as end, _errors():
        raise DataError(f"{text}factorizer.segmentation.errors.DataError: a.nii: not readable\n")
    assert end.value.exit_code == 2
    assert capsys.readouterr().err == "a.nii: not readable\n"


def test_names_that_the_terminal_cannot_show(tmp_path):
    """A case that fails is told, and the next is segmented."""
    (tmp_path / "in").mkdir()
    for name, voxels in (
        ("Müller 日本", np.zeros((9, 9, 9))),
        ("z", np.random.default_rng(0).random((9, 9, 9))),
    ):
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), np.eye(4)), tmp_path / "in" / f"{name}.nii.gz")
    options = ["predict", "--model", "hippocampus", "--input", tmp_path / "in", "--output", tmp_path / "out"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "factorizer", *map(str, options)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "M?ller ??: failed:" in done.stdout
    assert (tmp_path / "out" / "z.nii.gz").exists()


def test_a_user_without_a_name():
    """As in a container run with --user: MONAI asks for the name when it is imported."""
    code = (
        "import os, sys\n"
        "def unknown(uid): raise KeyError(f'getpwuid(): uid not found: {uid}')\n"
        "try:\n"
        "    import pwd\n"
        "    pwd.getpwuid = unknown\n"
        "except ImportError: pass\n"  # Windows has no names but those of the environment
        "from factorizer import segment\n"
        "import factorizer.commands.demo.run\n"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
