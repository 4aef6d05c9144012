"""The demo from end to end, on small made-up volumes and few steps; its errors; being stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import MODALITIES, REGIONS, TUMOUR, plan_for, planned
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from factorizer.commands.cli import app
from factorizer.commands.demo import run_demo, write_synthetic
from factorizer.commands.demo.run import segment_with_shipped
from factorizer.commands.demo.timing import time_networks
from factorizer.segmentation.cases import read_decathlon, split_cases
from factorizer.segmentation.checkpoint import load_network, read_checkpoint
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.trained import TrainedModel, save_model

small_synthetic = partial(write_synthetic, cases=6, shape=(18, 18, 18))


RESULTS = {"report.json", "segmentation.png", "components.png", "checkpoint.pt", "predictions"}


def quiet():
    return Console(file=open(os.devnull, "w"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_synthetic(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run as the command line makes it, without --data: (output folder, what it printed)."""
    out = tmp_path_factory.mktemp("finished") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("factorizer.commands.demo.run.write_synthetic", small_synthetic)
        patch.setenv("COLUMNS", "120")
        result = CliRunner().invoke(app, ["demo", "--out", str(out), "--steps", "4"])
    assert result.exit_code == 0, result.output
    return out, result.output


def test_everything_is_there(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == RESULTS | {"data"}
    assert not list(out.rglob(".part-*"))


@pytest.mark.parametrize("trained_on", ["the others", "all"])
def test_a_shipped_model_that_fits_comes_first(finished, trained_on, tmp_path, monkeypatch):
    """On cases that it has not seen; where it has seen all, it says so."""
    out, _ = finished
    task = read_decathlon(out / "data")
    network, plan = load_network(out / "checkpoint.pt")
    held_out = split_cases(task.cases, plan.seed)[1]
    if trained_on == "all":
        plan = replace(plan, training=tuple(case.name for case in task.cases))
    save_model(TrainedModel(((network, plan),)), tmp_path / "lesions.pt")
    monkeypatch.setattr("factorizer.commands.demo.run.SHIPPED", tmp_path)
    with (tmp_path / "screen").open("w+") as screen:
        found = segment_with_shipped(Console(file=screen, width=200), task, task.cases, tmp_path / "shipped")
        screen.seek(0)
        said = screen.read()
    names = task.cases if trained_on == "all" else held_out
    assert found is not None
    assert (found["model"], found["cases"]) == ("lesions", len(names))
    written = {path.name for path in (tmp_path / "shipped").glob("*.nii.gz")}
    assert written == {f"{case.name}.nii.gz" for case in names}
    assert f"{len(names)} case" in said
    assert ("that it was trained on" in said) == (trained_on == "all")
    assert found["trained_on_them"] == (trained_on == "all")
    last = tmp_path / "shipped" / f"{names[-1].name}.nii.gz"
    last.write_text("of others")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shipped").iterdir()}
    with pytest.raises(DataError, match=rf"{last.name}: is there, .*; give another --out"):
        segment_with_shipped(quiet(), task, task.cases, tmp_path / "shipped")
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_report(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    assert report["synthetic"] is True
    assert "SYNTHETIC" in report["data"]
    assert set(report["dice"]) == {"mean", "halo", "core"}
    assert report["seconds"] > report["seconds_training"] > 0
    assert report["backend"] in ("cpu", "reference")
    assert len(report["split"]["training"]) == 5
    assert list(report["dice_per_case"]) == report["split"]["held_out"]
    assert not set(report["split"]["training"]) & set(report["split"]["held_out"])
    assert report["settings"]["steps"] == 4
    assert report["versions"]["torch"] == torch.__version__
    names = [network["name"] for network in report["timings"]["networks"]]
    assert any("reference" in name for name in names)
    assert any("SegResNet" in name for name in names)
    for network in report["timings"]["networks"]:
        assert network["parameters"] > 0
        assert 0 < network["forward_ms"] < network["training_step_ms"]
    for depth in ("shallow", "deep"):
        best = report["components"][depth]["best"]
        assert set(best) == {"halo", "core"}
        assert all(component["marks"] in ("label", "outside") for component in best.values())


@pytest.mark.parametrize(
    "plan",
    [
        plan_for(MODALITIES, TUMOUR, REGIONS, {"num_deep_supr": 1}),
        planned(shape=(32, 32, 10), spacing=(1.0, 1.0, 4.0)),
    ],
    ids=["regions", "thick slices"],
)
def test_networks_are_timed_whatever_the_task_is(plan):
    """SegResNet gives the outputs that the loss takes, and takes a crop that it cannot halve that often."""
    names = [speed.name for speed in time_networks(plan)]
    assert names[-1] == "SegResNet (MONAI)"


def test_report_agrees_with_the_predictions_on_disk(finished):
    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    for name, scores in report["dice_per_case"].items():
        prediction = nib.load(out / "predictions" / f"{name}.nii.gz")
        image = nib.load(out / "data" / "imagesTr" / f"{name}.nii.gz")
        truth = np.asarray(nib.load(out / "data" / "labelsTr" / f"{name}.nii.gz").dataobj)
        np.testing.assert_array_equal(prediction.affine, image.affine)
        assert prediction.shape == image.shape[:3]
        labels = np.asarray(prediction.dataobj)
        for value, class_name in ((1, "halo"), (2, "core")):
            shared = 2 * ((labels == value) & (truth == value)).sum()
            both = (labels == value).sum() + (truth == value).sum()
            assert scores[class_name] == pytest.approx(shared / both, abs=1e-4)


@pytest.mark.parametrize("name", ["segmentation.png", "components.png"])
def test_figures_decode_and_show_something(finished, name):
    pixels = imread(finished[0] / name)
    assert min(pixels.shape[:2]) > 300
    assert pixels[..., :3].std() > 0.05


def test_checkpoint_gives_the_predictions_again(finished):
    out, _ = finished
    network, plan = load_network(out / "checkpoint.pt")
    assert plan.held_out == tuple(sorted(plan.held_out))
    image = torch.randn(1, 2, *plan.crop)
    with torch.no_grad():
        assert network(image)[0].shape == (1, 3, *plan.crop)  # the finest of several heads


def test_screen_says_what_is_done_and_that_it_is_synthetic(finished):
    _, printed = finished
    for words in ("SYNTHETIC", "5 to train on, 1 held out", "4 steps", "time expected", "halo"):
        assert words in printed
    for words in ("training step", "SegResNet", "report.json"):
        assert words in printed


def test_a_finished_run_is_not_trained_again(finished, monkeypatch):
    out, _ = finished
    monkeypatch.setattr("factorizer.commands.demo.run.time_networks", lambda plan: [])
    monkeypatch.setattr("factorizer.commands.demo.screen.conclude", lambda *args: None)
    monkeypatch.setattr("factorizer.commands.demo.run.fit", None)
    before = json.loads((out / "report.json").read_text())
    after = run_demo(out, out / "data", steps=4, console=quiet())
    assert after["dice"] == before["dice"]


def test_other_settings_do_not_continue_a_run(finished):
    out, _ = finished
    with pytest.raises(DataError, match=r"steps = 4, this one has 5; give another output folder"):
        run_demo(out, out / "data", steps=5, console=quiet())


def test_a_killed_run_continues_where_it_was_saved(data, tmp_path):
    """SIGINT, then SIGKILL: each time the checkpoint is whole, and the next run goes on from it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # A shell's background job is started with SIGINT ignored, and hands that on.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "import factorizer.segmentation.training as t; t.SAVE_EVERY = 2; "
        "import factorizer.commands.cli as c; c.main()"
    )
    options = ["demo", "--data", data, "--out", tmp_path / "out", "--steps", "400"]
    command = [sys.executable, "-c", code, *map(str, options)]
    checkpoint, steps = tmp_path / "out" / "checkpoint.pt", []
    for stop in (signal.SIGINT, signal.SIGKILL):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            while not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            process.send_signal(stop)
            printed, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        steps.append(len(read_checkpoint(checkpoint)[1]["losses"]))
        if stop == signal.SIGINT:
            assert process.returncode == 130, errors
            assert re.search(rf"continue: factorizer demo --data {data}", errors)
            assert {p.name for p in (tmp_path / "out").iterdir()} == {
                "checkpoint.pt",
                "predictions",
            }
        else:
            assert process.returncode == -signal.SIGKILL
            assert f"{steps[0]} steps are done" in printed
    assert 0 < steps[0] < steps[1] < 400


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: (data / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda data: (data / "labelsTr" / "synthetic_002.nii.gz").unlink(), "files .* missing"),
        (
            lambda data: (data / "imagesTr" / "synthetic_002.nii.gz").write_bytes(b"x"),
            "synthetic_002.nii.gz: not readable",
        ),
    ],
)
def test_data_errors_come_before_training(tmp_path, spoil, words):
    spoil(small_synthetic(tmp_path / "data"))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["demo", "--data", str(tmp_path / "data"), "--out", str(out)])
    assert result.exit_code == 2
    assert re.search(words, result.stderr)
    assert "Traceback" not in result.output
    assert not (out / "checkpoint.pt").exists()


def test_out_errors(data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"out: .*file is a file"):
        run_demo(tmp_path / "file", data, console=quiet())
    with pytest.raises(DataError, match=r"out: .* cannot be written to"):
        run_demo(tmp_path / "file" / "below", data, console=quiet())
    (tmp_path / "checkpoint.pt").write_text("something else")
    with pytest.raises(DataError, match=r"checkpoint.pt: not a checkpoint"):
        run_demo(tmp_path, data, console=quiet())


@pytest.mark.parametrize("name", ["report.json", "components.png", "predictions/{}.nii.gz"])
def test_files_of_others_are_kept(data, tmp_path, name):
    held_out = split_cases(read_decathlon(data).cases, 0)[1]
    other = tmp_path / name.format(held_out[0].name)
    other.parent.mkdir(exist_ok=True)
    other.write_text("of others")
    with pytest.raises(
        DataError, match=rf"out: .*{other.name} is there, and this run.s training has not ended"
    ):
        run_demo(tmp_path, data, steps=1, console=quiet())
    assert other.read_text() == "of others"
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_prediction_that_was_changed_is_kept(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (prediction,) = (out / "predictions").glob("*.nii.gz")
    prediction.write_text("of others")
    with pytest.raises(DataError, match=rf"{prediction.name}: is there, and was changed"):
        run_demo(out, steps=4, console=quiet())
    assert prediction.read_text() == "of others"


@pytest.mark.parametrize("part", ["", "imagesTr", "labelsTr"])
def test_out_holds_no_data(data, part):
    with pytest.raises(DataError, match=r"out: .* holds the inputs"):
        run_demo(data / part, data, steps=1, console=quiet())


def test_a_flat_held_out_volume_gets_an_empty_label_map(tmp_path, monkeypatch):
    """It ends nothing, but where it is the only one: then it is told before the training."""
    monkeypatch.setattr("factorizer.commands.demo.run.time_networks", lambda plan: [])
    monkeypatch.setattr("factorizer.commands.demo.screen.conclude", lambda *args: None)
    root, out = write_synthetic(tmp_path / "data", cases=10, shape=(18, 18, 18)), tmp_path / "out"
    flat, other = split_cases(read_decathlon(root).cases, 0)[1]

    def flatten(case):
        volume = nib.load(case.image)
        nib.save(nib.Nifti1Image(np.full(volume.shape, 3, np.float32), volume.affine), case.image)

    flatten(flat)
    with (tmp_path / "screen").open("w+") as screen:
        report = run_demo(out, root, steps=1, console=Console(file=screen, width=200))
        screen.seek(0)
        assert re.search(rf"warning: {flat.name}: .*its label map is empty", screen.read())
    assert list(report["dice_per_case"]) == [flat.name, other.name]
    written = nib.load(out / "predictions" / f"{flat.name}.nii.gz")
    assert written.shape == nib.load(flat.label).shape
    assert not np.asarray(written.dataobj).any()
    flatten(other)
    with pytest.raises(DataError, match="data: the held-out images hold a single value each"):
        run_demo(tmp_path / "none", root, steps=1, console=quiet())
    assert not (tmp_path / "none" / "checkpoint.pt").exists()


def test_data_of_others_are_not_called_synthetic(data, tmp_path):
    content = json.loads((data / "dataset.json").read_text())
    shutil.copytree(data, tmp_path / "data")
    for other in ({**content, "description": "patients"}, [content]):
        (tmp_path / "data" / "dataset.json").write_text(json.dumps(other))
        with pytest.raises(DataError, match=r"out: .*data holds other data"):
            run_demo(tmp_path, steps=1, console=quiet())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_out_without_permission(data, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="cannot be written to"):
        run_demo(tmp_path / "out", data, console=quiet())


def test_steps_error(data, tmp_path):
    with pytest.raises(DataError, match="steps: got 0"):
        run_demo(tmp_path, data, steps=0, console=quiet())


def test_split_is_the_one_reported(finished):
    from factorizer.segmentation.cases import read_decathlon

    out, _ = finished
    report = json.loads((out / "report.json").read_text())
    training, held_out = split_cases(read_decathlon(out / "data").cases, report["settings"]["seed"])
    assert [case.name for case in training] == report["split"]["training"]
    assert [case.name for case in held_out] == report["split"]["held_out"]
