"""Two processes, as torchrun starts them, end where one does; inference shares the cases out."""

import os
import subprocess
import sys

import pytest
import torch
from factorizer_support import checkpoint_for, plan_for

from factorizer.segmentation.checkpoint import read_checkpoint


def command_line(*arguments, processes=1, fails=False):
    """Runs the command line in one process, or in several that torchrun starts."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "factorizer", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_as_one(synthetic, tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        options = ["train", synthetic, "--out", out, "--steps", 3, "--validate-every", 3, "--device", "cpu"]
        printed = command_line(*options, processes=processes)
        assert printed.count("results in") == 1
    (one, first), (two, second) = (read_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("1", "2"))
    assert one == two
    # The mean of two crops' gradients is taken after their sums over voxels instead of before:
    # a few roundings of float32 a step, which AdamW's division by small second moments amplifies.
    torch.testing.assert_close(second["losses"], first["losses"], rtol=1e-4, atol=1e-5)
    assert second["scores"][0][0] == 3
    assert second["scores"][0][1] == pytest.approx(first["scores"][0][1], abs=0.02)
    moved = 0
    for name, value in first["network"].items():
        if value.is_floating_point():
            distance = (second["network"][name] - value).norm() / value.norm().clamp_min(1e-6)
            moved = max(moved, distance.item())
    assert moved < 1e-2


def test_inference_splits_the_cases(synthetic, tmp_path):
    checkpoint = checkpoint_for(plan_for(), tmp_path / "checkpoint.pt")
    options = [
        "predict",
        "--checkpoint",
        checkpoint,
        "--input",
        synthetic / "dataset.json",
        "--device",
        "cpu",
    ]
    broken = tmp_path / "broken.nii.gz"
    broken.touch()  # the sixth case: the second process's, which is silent
    options += ["--input", broken, "--output", tmp_path / "two"]
    printed = " ".join(command_line(*options, processes=2, fails=True).split())
    assert "broken: failed:" in printed
    assert "5 segmented" in printed
    assert "1 failed" in printed
    names = {f"synthetic_{i:03d}.nii.gz" for i in range(1, 6)}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names | {"settings.json", "made_from"}
