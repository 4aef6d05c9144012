"""factorizer train --fold all."""

import csv
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import run_command

from factorizer.commands.cross_validation import choose
from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.evaluation import Score
from factorizer.segmentation.recipe import BUDGETS
from factorizer.segmentation.trained import load_model


def test_five_folds(synthetic, tmp_path):
    out = tmp_path / "folds"
    options = ["train", synthetic, "--out", out, "--fold", "all", "--steps", 1]
    printed = run_command(*options)
    assert "5 cases, each by the network that has not seen it" in printed
    rows = list(csv.DictReader((out / "cross_validation.csv").open()))
    cases = [row["case"] for row in rows]
    plans = [read_checkpoint(out / f"fold-{fold}" / "checkpoint.pt")[0] for fold in range(5)]
    assert cases == [case for plan in plans for case in plan.held_out for _ in plan.targets]
    assert len(set(cases)) == 5
    model = load_model(out / "ensemble.pt")
    assert [plan for _, plan in model.members] == plans
    before = {path: path.stat().st_mtime_ns for path in out.glob("fold-*/scores.json")}
    assert len(before) == 5
    run_command(*options)  # finds everything done
    assert {path: path.stat().st_mtime_ns for path in before} == before
    ensemble = ["--checkpoint", out / "ensemble.pt", "--input", synthetic / "dataset.json"]
    run_command("predict", *ensemble, "--output", tmp_path / "p")
    assert len(list((tmp_path / "p").glob("*.nii.gz"))) == 5


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ((0.5, 0.6, 0.4, 0.7), (False, True)),  # mirror images by the plain masks, then components
        ((0.5, 0.5, 0.5, 0.5), (False, False)),  # no gain, no change
        ((0.5, 0.4, 0.6, 0.5), (True, False)),
    ],
)
def test_what_helps_is_chosen(dice, chosen):
    variants = [(False, False), (False, True), (True, False), (True, True)]
    scores = {v: [Score("case", "a", d, 0.0, 1.0)] for v, d in zip(variants, dice, strict=True)}
    assert choose(scores) == chosen


def test_fold_and_init_errors(synthetic, tmp_path):
    options = ["train", synthetic, "--out", tmp_path / "run", "--steps", 1]
    assert "fold: got 'every'" in run_command(*options, "--fold", "every", code=2)
    assert "init: there is no" in run_command(*options, "--init", tmp_path / "absent.pt", code=2)
    bundle = ["--bundle", tmp_path, "--fold", "all"]
    assert "are not for a bundle" in run_command(*options, *bundle, code=2)
    bundle = ["--bundle", tmp_path, "--grid", "half"]
    assert "grid, budget: are not for a bundle" in run_command(*options, *bundle, code=2)
    bundle = ["--bundle", tmp_path, "--budget", "quick"]
    assert "budget: are not for a bundle" in run_command(*options, *bundle, code=2)
    assert "seed: got -1" in run_command(*options, "--seed", -1, code=2)
    assert "grid: got 'coarse'" in run_command(*options, "--grid", "coarse", code=2)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--width", "32,64"], "width: got (32, 64), and --init"),
        (["--rank", 3], "rank: got 3, and --init"),
        (["--network", "global"], "network: got global, and --init"),
        (["--grid", "full"], "grid: got full, and --init"),
    ],
)
def test_what_the_initial_network_decides(synthetic, tmp_path, options, words):
    command = ["train", synthetic, "--out", tmp_path / "run", "--init", tmp_path / "c.pt", *options]
    assert words in run_command(*command, code=2)


def test_all_folds_are_for_one_process(synthetic, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    printed = run_command("train", synthetic, "--out", tmp_path / "run", "--fold", "all", code=2)
    assert "fold: got all, in 2 processes" in printed
    assert not (tmp_path / "run").exists()


def test_a_flat_volume_does_not_end_the_folds(synthetic, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(synthetic, data)
    file = min((data / "imagesTr").glob("*.nii.gz"))
    volume = nib.load(file)
    nib.save(nib.Nifti1Image(np.full(volume.shape, 7, np.float32), volume.affine), file)
    run_command("train", data, "--out", tmp_path / "folds", "--fold", "all", "--steps", 1)
    rows = list(csv.DictReader((tmp_path / "folds" / "cross_validation.csv").open()))
    assert len({row["case"] for row in rows}) == 5
    assert {row["dice"] for row in rows if row["case"] == file.name.removesuffix(".nii.gz")} == {"0.000000"}


def test_budget_and_init(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.MIN_STEPS", 2)
    monkeypatch.setitem(BUDGETS, "quick", 0)
    first = ["train", synthetic, "--out", tmp_path / "a", "--budget", "quick"]
    assert "expected" in run_command(*first)
    plan = read_checkpoint(tmp_path / "a" / "checkpoint.pt")[0]
    assert plan.steps == 2
    assert plan.network["stem_stride"] == 2
    monkeypatch.setattr("factorizer.segmentation.training.MIN_STEPS", 5)
    assert "2 steps are done" in run_command(*first)  # what is continued keeps its number
    assert "budget: got 'long'" in run_command(*first[:-1], "long", code=2)
    init = ["--init", tmp_path / "a" / "checkpoint.pt"]
    second = ["train", synthetic, "--out", tmp_path / "b", "--steps", 1, *init]
    assert "tensors start from it, 0 at random" in run_command(*second)
    plan, state = read_checkpoint(tmp_path / "b" / "checkpoint.pt")
    assert plan.init.startswith(str(tmp_path / "a" / "checkpoint.pt"))
    start = read_checkpoint(tmp_path / "a" / "checkpoint.pt")[1]["network"]
    rate = plan.learning_rate
    for name, value in state["network"].items():  # one step of AdamW away
        if value.is_floating_point():
            assert torch.allclose(value, start[name], atol=1.1 * rate, rtol=0.01)
    shutil.copy(tmp_path / "b" / "checkpoint.pt", tmp_path / "a" / "checkpoint.pt")
    assert "belongs to a run with init" in run_command(*second, code=2)  # of the same name, other weights


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("cross_validation.csv", "file of scores"),
        ("ensemble.pt", "model"),
        ("fold-4/plan.json", "plan of a training"),
        ("fold-0/scores.json", "file of a fold's scores"),
    ],
)
@pytest.mark.parametrize("content", ["of others", '{"mine": 1}'])
def test_files_of_others_stay(synthetic, tmp_path, name, what, content):
    file = tmp_path / "folds" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    options = ["--out", tmp_path / "folds", "--fold", "all", "--steps", 1]
    printed = run_command("train", synthetic, *options, code=2)
    assert f"{name} is there, and is no {what}; give another out" in printed
    assert file.read_text() == content
    assert not list((tmp_path / "folds").rglob("checkpoint.pt"))
