"""The Python programs printed in README.md and docs/ run as they stand, page by page."""

import re
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import checkpoint_for, plan_for

import factorizer

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^-+8<-+ "(.+)"$')


def blocks(page: Path) -> list[str]:
    """The page's Python blocks; one that is the snippet of a file is that file's text."""
    found = []
    for match in FENCE.finditer(page.read_text()):
        code = textwrap.dedent(match[2])
        snippet = SNIPPET.match(code.strip())
        found.append((ROOT / snippet[1]).read_text() if snippet else code)
    return found


PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks(page)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the pages speak of: a trained network's checkpoint, and scans."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "runs" / "hippocampus").mkdir(parents=True)
    checkpoint_for(plan_for(("MRI",)), folder / "runs" / "hippocampus" / "checkpoint.pt")
    (folder / "scans").mkdir()
    image = np.random.default_rng(0).gamma(2, 100, (20, 24, 20)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "scans" / "a.nii.gz")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_printed_programs_run(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    # `network` is what a page calls a network of the reader's.
    namespace = {"__name__": "printed", "network": factorizer.preset("swin-isles22")}
    for number, code in enumerate(blocks(page), 1):
        exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)


def test_every_fence_is_understood():
    """A snippet marker that a formatter has broken would be printed instead of the file."""
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        assert text.count("```") % 2 == 0, page
        for line in text.splitlines():
            if "8" in line and re.search(r"-+ *8 *< *-+", line):
                match = SNIPPET.match(line.strip())
                assert match, f"{page.name}: {line!r} is no snippet marker"
                assert (ROOT / match[1]).is_file(), f"{page.name}: {match[1]} is not there"
