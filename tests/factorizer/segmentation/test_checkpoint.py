"""Checkpoints: what they hold, and files that are none."""

from dataclasses import asdict, replace

import pytest
import torch
from factorizer_support import Batches, planned, trainer_for

from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.errors import DataError


def test_checkpoint_holds_plain_data_only(tmp_path):
    plan = planned(steps=1)
    trainer = trainer_for(plan)
    trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["plan"] == asdict(plan)
    assert len(state["losses"]) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pt"]


def test_read_checkpoint_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    plan = asdict(replace(planned(), steps=1))
    torch.save({"plan": {**plan, "colour": "red"}}, tmp_path / "newer.pt")
    for name in ("text.pt", "other.pt", "newer.pt"):
        with pytest.raises(DataError, match=rf"{name}: not a checkpoint"):
            read_checkpoint(tmp_path / name)
