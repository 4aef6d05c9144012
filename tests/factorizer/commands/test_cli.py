"""The command line itself: what it loads, and how it ends."""

import subprocess
import sys

import pytest
import typer

from factorizer.commands.cli import _errors
from factorizer.segmentation.errors import DataError


def test_help_loads_nothing_heavy():
    code = (
        "import sys, factorizer.commands.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'monai', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_imported_at_their_first_use():
    code = "import factorizer; assert set(factorizer.__all__) <= set(dir(factorizer)); factorizer.NMF"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_error_of_a_worker_is_told_without_its_traceback(capsys):
    text = "Caught DataError in DataLoader worker process 2.\nOriginal Traceback:\n  File\n"
    with pytest.raises(typer.Exit) as end, _errors():
        raise DataError(f"{text}factorizer.segmentation.errors.DataError: a.nii: not readable\n")
    assert end.value.exit_code == 2
    assert capsys.readouterr().err == "a.nii: not readable\n"
