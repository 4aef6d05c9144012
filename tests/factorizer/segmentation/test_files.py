"""Files are whole or not there at all."""

import pytest
import torch

from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic, load_tensors, save_tensors


def test_atomic_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_checkpoint_is_refused(tmp_path):
    """One bit of a weight: torch.load does not look at the checksums that it writes."""
    path = tmp_path / "checkpoint.pt"
    save_tensors({"network": {"weight": torch.full((1000,), 0.5)}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), 0.5).numpy().tobytes()) + 2003] ^= 0x40
    path.write_bytes(content)
    assert not torch.load(path)["network"]["weight"].eq(0.5).all()
    with pytest.raises(DataError, match=r"checkpoint.pt: .*data/0 is damaged"):
        load_tensors(path)
