"""The texts that the planted faults replace stand in the sources, once; planting them is ``make mutants``."""

from pathlib import Path

import pytest
from mutants.faults import FAULTS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the sources are not here")


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_stands_once(fault):
    assert (ROOT / fault.file).read_text().count(fault.right) == 1, "the sources have changed: mend the fault"


def test_the_page_names_the_same():
    page = (ROOT / "docs/compatibility.md").read_text()
    assert [f.name for f in FAULTS if f"| {f.name} | `{f.file}` |" not in page] == []
