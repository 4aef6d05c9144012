"""factorizer train, with predict and evaluate after it; options that it refuses."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from factorizer_support import run_command, save_volume

from factorizer.segmentation.checkpoint import load_network, read_checkpoint
from factorizer.segmentation.evaluation import MeanDice
from factorizer.segmentation.files import save_tensors


def test_train_predict_evaluate(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.screen.LINE_SECONDS", 0.0)
    out = tmp_path / "run"
    options = ["train", synthetic, "--out", out, "--steps", 4, "--validate-every", 2]
    printed = run_command(*options)
    assert "4 to train on, 1 held out" in printed
    assert re.search(
        r"step 3 of 4, loss [\d.]+, Dice [\d.]+ step 4: validating on 1 case step 4 of 4", printed
    )
    assert {"checkpoint.pt", "best.pt", "plan.json", "log"} == {path.name for path in out.iterdir()}
    assert list((out / "log").iterdir())
    plan, state = read_checkpoint(out / "checkpoint.pt")
    assert [step for step, _ in state["scores"]] == [2, 4]
    assert json.loads((out / "plan.json").read_text())["steps"] == 4
    _, same = load_network(out / "best.pt")
    assert same == plan
    assert "4 steps are done" in run_command(*options)

    predict = ["predict", "--checkpoint", out / "checkpoint.pt", "--input", synthetic / "dataset.json"]
    run_command(*predict, "--output", tmp_path / "p")
    run_command(*predict, "--output", tmp_path / "w", "--whole", "--mirror", "--checkpoint", out / "best.pt")
    arguments = ["--labels", synthetic, "--output", tmp_path / "scores.csv"]
    printed = run_command("evaluate", "--predictions", tmp_path / "p", *arguments)
    assert "halo" in printed
    rows = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 5 * 2
    # The validation that training made is the evaluation of what predict writes.
    held_out = [row.split(",") for row in rows[1:] if row.split(",")[0] in plan.held_out]
    mean = np.mean([float(row[2]) for row in held_out])
    assert mean == pytest.approx(state["scores"][-1][1], abs=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", 0], "steps: got 0"),
        (["--patience", 2], "needs validate-every"),
        (["--config", "four_shifts"], "needs --bundle"),
        (["--bundle", "nowhere"], "nowhere/configs/train.json is missing"),
        (["--fold", 7], "fold: got 7 of 5 folds"),
        (["--device", "cuda:9"], "device: 'cuda:9'"),
        (["--device", "abacus"], "device: 'abacus' is no device"),
        (["--device", "meta"], "device: 'meta' is not supported"),
        (["--workers", -1], "workers: got -1"),
        (["--device", "cpu:5"], "device: got 'cpu:5'"),
        (["--init", "nope.pt"], "init: there is no nope.pt"),
    ],
)
def test_train_errors(synthetic, tmp_path, options, words):
    assert words in run_command("train", synthetic, "--out", tmp_path / "run", *options, code=2)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_plan_of_others_stays(synthetic, tmp_path):
    (tmp_path / "plan.json").write_text('{"task": "mine"}')
    bundle = Path(__file__).parents[3] / "bundles" / "hippocampus_factorizer"
    for options in ([], ["--bundle", bundle]):
        data = hippocampus(tmp_path / "data") if options else synthetic
        printed = run_command("train", data, "--out", tmp_path, "--steps", 1, *options, code=2)
        assert "plan.json is there, and is no plan of a training; give another out" in printed
        assert (tmp_path / "plan.json").read_text() == '{"task": "mine"}'
        assert not (tmp_path / "checkpoint.pt").exists()


def hippocampus(folder):
    """Without volumes: enough for what comes before they are read."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    entries = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in range(5)]
    for entry in entries:
        for file in entry.values():
            save_volume(folder / file, (8, 8, 8), varied=True)
    labels = {"0": "background", "1": "Anterior", "2": "Posterior"}
    content = {"name": "h", "modality": {"0": "MRI"}, "labels": labels, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def test_best_network_is_of_this_run(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(MeanDice, "__call__", lambda self, network: 0.5)
    options = ["train", synthetic, "--out", tmp_path, "--steps", 2]
    printed = run_command(*options, "--validate-every", 1)
    assert "0.500 after step 2, in best.pt" in printed
    assert read_checkpoint(tmp_path / "best.pt")[1]["losses"][1:]  # of two equals the second
    (tmp_path / "checkpoint.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    assert "best.pt is there without a checkpoint.pt" in run_command(*options, code=2)
    assert (tmp_path / "best.pt").read_bytes() == before
    plan, state = read_checkpoint(tmp_path / "best.pt")
    # As of a run that was killed before its first checkpoint.
    save_tensors({**state, "plan": asdict(plan), "scores": state["scores"][:1]}, tmp_path / "best.pt")
    run_command(*options)
    assert not (tmp_path / "best.pt").exists()


def test_the_best_network_of_another_run_stays(synthetic, tmp_path, monkeypatch):
    monkeypatch.setattr(MeanDice, "__call__", lambda self, network: 0.5)
    options = ["train", synthetic, "--out", tmp_path, "--steps", 1]
    run_command(*options, "--validate-every", 1)
    (tmp_path / "checkpoint.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    printed = run_command(*options, "--learning-rate", 1e-3, code=2)
    assert "best.pt is there without a checkpoint.pt" in printed
    assert (tmp_path / "best.pt").read_bytes() == before
