"""The command line itself: what it loads, and how it ends."""

import subprocess
import sys


def test_help_loads_nothing_heavy():
    code = (
        "import sys, factorizer.cli; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'monai', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_are_imported_at_their_first_use():
    code = "import factorizer; assert set(factorizer.__all__) <= set(dir(factorizer)); factorizer.NMF"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
