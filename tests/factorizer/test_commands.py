"""train, predict and evaluate as the command line runs them: results, bad input, being interrupted."""

import csv
import errno
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import checkpoint_for, plan_for
from matplotlib.image import imread
from typer.testing import CliRunner

from factorizer.commands.cli import app
from factorizer.commands.demo import write_synthetic
from factorizer.segmentation.checkpoint import load_network, read_checkpoint
from factorizer.segmentation.explanation import agreement

REGIONS = {"ET": (3,), "TC": (2, 3), "WT": (1, 2, 3)}
TUMOUR = {0: "background", 1: "edema", 2: "core", 3: "enhancing"}
MODALITIES = ("FLAIR", "T1w", "T1gd", "T2w")


def run(*arguments, code=0):
    """Runs the command line; returns what it printed, on one line, as a terminal may break it anywhere."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    printed = " ".join((result.output + result.stderr).split())
    assert result.exit_code == code, (printed, result.exception)
    assert "Traceback" not in printed
    return printed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("data"), cases=5, shape=(18, 18, 18))


@pytest.fixture(scope="module")
def tumour(tmp_path_factory):
    """Checkpoint of an untrained network for four modalities and three nested regions."""
    plan = plan_for(MODALITIES, TUMOUR, REGIONS, {"num_deep_supr": 1}, flips=(0, 1))
    return checkpoint_for(plan, tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt")


def four_modalities(folder, name, seed=0, shape=(15, 20, 17), affine=None):
    """One file for each modality, as name_0000.nii.gz and so on."""
    rng = np.random.default_rng(seed)
    affine = np.diag([1.0, 1, 1, 1]) if affine is None else affine
    folder.mkdir(parents=True, exist_ok=True)
    for channel in range(4):
        voxels = rng.gamma(2, 100, shape).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, affine), folder / f"{name}_{channel:04d}.nii.gz")


ODD = np.array([[0, -1.5, 0, 5], [0, 0, -1, 6], [2, 0, 0, 7], [0, 0, 0, 1.0]])


def test_predict_four_modalities_of_any_orientation(tumour, tmp_path):
    four_modalities(tmp_path / "in", "straight")
    four_modalities(tmp_path / "in", "odd", affine=ODD)
    run("predict", "--checkpoint", tumour, "--input", tmp_path / "in", "--output", tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"straight.nii.gz", "odd.nii.gz", "settings.json"}
    for name, affine in (("straight", np.eye(4)), ("odd", ODD)):
        labels = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert labels.shape == (15, 20, 17)
        np.testing.assert_allclose(labels.affine, affine)
        assert labels.get_data_dtype() == np.uint8
        assert set(np.unique(labels.dataobj)) <= set(TUMOUR)


def test_cases_that_fail_are_named_and_the_others_go_on(tumour, tmp_path):
    four_modalities(tmp_path / "in", "good")
    four_modalities(tmp_path / "in", "three")
    (tmp_path / "in" / "three_0003.nii.gz").unlink()
    four_modalities(tmp_path / "in", "corrupt")
    (tmp_path / "in" / "corrupt_0002.nii.gz").write_bytes(b"not an image")
    four_modalities(tmp_path / "in", "apart")
    nib.save(
        nib.Nifti1Image(np.ones((15, 20, 17), np.float32), 2 * np.eye(4)),
        tmp_path / "in" / "apart_0001.nii.gz",
    )
    options = ["--checkpoint", tumour, "--output", tmp_path / "out"]
    inputs = ["--input", tmp_path / "in", "--input", tmp_path / "absent.nii.gz"]
    printed = run("predict", *options, *inputs, code=1)
    assert re.search(r"three: failed: .*3 channels; there must be one for each of the 4", printed)
    assert re.search(r"corrupt: failed: .*corrupt_0002.nii.gz: not readable as NIfTI", printed)
    assert re.search(r"apart: failed: .*apart_0001.nii.gz: lies on another grid", printed)
    assert re.search(r"absent: failed: .*absent.nii.gz: there is no such file", printed)
    assert "1 segmented" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"good.nii.gz", "settings.json"}
    before = (tmp_path / "out" / "good.nii.gz").stat().st_mtime_ns
    printed = run("predict", *options, *inputs, code=1)
    assert "0 segmented, 1 were there, 4 failed" in printed
    assert (tmp_path / "out" / "good.nii.gz").stat().st_mtime_ns == before
    printed = run("predict", *options, *inputs, "--num-iters", 1, code=2)
    assert "made with other settings (num_iters)" in printed


def test_modalities_on_one_grid_but_for_rounding(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a [b]", affine=ODD)
    path = tmp_path / "in" / "a [b]_0002.nii.gz"
    image = nib.load(path)
    near = ODD.copy()
    near[:3, 3] += 2e-3
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), near), path)
    options = ["--checkpoint", tumour, "--input", tmp_path / "in", "--output"]
    run("predict", *options, tmp_path / "out")
    np.testing.assert_array_equal(nib.load(tmp_path / "out" / "a [b].nii.gz").affine, ODD.astype(np.float32))
    path.write_bytes(b"")
    assert "a [b]: failed:" in run("predict", *options, tmp_path / "again", code=1)  # brackets are no markup


def test_a_full_disk_leaves_nothing_half_written(tumour, tmp_path, monkeypatch):
    four_modalities(tmp_path / "in", "case")

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("factorizer.segmentation.volumes.nib.save", full)
    options = ["--checkpoint", tumour, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert re.search(r"No space left on device: '.*case.nii.gz'", run("predict", *options, code=1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


def test_checkpoints_that_cannot_be_used(tumour, tmp_path):
    four_modalities(tmp_path / "in", "case")
    options = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--checkpoint"]
    assert "there is no" in run("predict", *options, tmp_path / "absent.pt", code=2)
    (tmp_path / "text.pt").write_text("no tensors")
    assert "text.pt: not a checkpoint" in run("predict", *options, tmp_path / "text.pt", code=2)
    other = checkpoint_for(plan_for(MODALITIES), tmp_path / "other.pt")
    printed = run("predict", *options, tumour, "--checkpoint", other, code=2)
    assert "checkpoint 2: labels = " in printed
    state = torch.load(tumour, weights_only=True)
    state["network"] = torch.load(other, weights_only=True)["network"]
    torch.save(state, tmp_path / "mixed.pt")
    assert "its weights do not fit the network" in run("predict", *options, tmp_path / "mixed.pt", code=2)
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_used(tumour, tmp_path):
    options = ["predict", "--checkpoint", tumour, "--output", tmp_path / "out", "--input"]
    (tmp_path / "empty").mkdir()
    assert "no cases" in run(*options, tmp_path / "empty", code=2)
    assert "typo does not exist, and is no NIfTI file" in run(*options, tmp_path / "typo", code=2)
    four_modalities(tmp_path / "out", "case")
    assert "out holds the inputs" in run(*options, tmp_path / "out", code=2)
    (tmp_path / "list.json").write_text("{}")
    assert "list.json: needs one of the lists" in run(*options, tmp_path / "list.json", code=2)


def evaluate(tmp_path, prediction, truth, *options, code=0):
    """Evaluates one case; returns what was printed and the CSV's lines."""
    for kind, volume in (("p", prediction), ("t", truth)):
        (tmp_path / kind).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.diag([1.0, 2, 3, 1])), tmp_path / kind / "case.nii.gz")
    table = tmp_path / "scores.csv"
    arguments = ["--predictions", tmp_path / "p", "--labels", tmp_path / "t", "--output", table]
    printed = run("evaluate", *arguments, *options, code=code)
    with table.open() as file:
        return printed, {row["target"]: row for row in csv.DictReader(file)}


def test_evaluate_classes(tmp_path):
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2, 2, 2:5] = 1
    prediction = np.zeros_like(truth)
    prediction[2, 2, 3:6] = 1
    truth[6, 6, 6] = 2  # and nowhere in the prediction
    _, rows = evaluate(tmp_path, prediction, truth)
    assert float(rows["1"]["dice"]) == pytest.approx(2 * 2 / 6)
    assert float(rows["1"]["hd95_mm"]) == pytest.approx(0.9 * 3)  # 95 % of the way from 0, 0 to 3 mm
    assert (float(rows["2"]["dice"]), float(rows["2"]["hd95_mm"])) == (0, np.inf)


def test_evaluate_regions_and_empty_masks(tumour, tmp_path):
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:4, 1:4, 1:4] = 1
    prediction = truth.copy()
    prediction[1, 1, 1] = 2
    printed, rows = evaluate(tmp_path, prediction, truth, "--checkpoint", tumour)
    assert (float(rows["ET"]["dice"]), float(rows["ET"]["hd95_mm"])) == (1, 0)  # both empty
    assert (float(rows["TC"]["dice"]), float(rows["TC"]["hd95_mm"])) == (0, np.inf)
    assert (float(rows["WT"]["dice"]), float(rows["WT"]["hd95_mm"])) == (1, 0)
    assert "one mask empty" in printed


def test_evaluate_names_what_is_wrong(tumour, tmp_path):
    volume = np.zeros((4, 4, 4), np.uint8)
    printed, rows = evaluate(tmp_path, volume, volume[:3], code=1)
    assert re.search(r"case: failed: .*t/case.nii.gz: shape \(3, 4, 4\) does not match", printed)
    assert rows == {}
    printed, rows = evaluate(tmp_path, volume + 9, volume, "--checkpoint", tumour, code=1)
    assert "label value 9 has no class" in printed
    (tmp_path / "t" / "case.nii.gz").unlink()
    arguments = ["--predictions", tmp_path / "p", "--output", tmp_path / "s.csv", "--labels"]
    assert "p/case.nii.gz: there is no label for it" in run("evaluate", *arguments, tmp_path / "t", code=1)
    (tmp_path / "list.json").write_text('[{"image": "other.nii"}]')
    assert "no case has a label" in run("evaluate", *arguments, tmp_path / "list.json", code=2)
    assert "no folder and no data list" in run("evaluate", *arguments, tmp_path / "absent", code=2)
    (tmp_path / "s.csv").unlink()
    (tmp_path / "s.csv").mkdir()
    assert "s.csv is a folder; it must be a file" in run("evaluate", *arguments, tmp_path / "t", code=2)


def test_evaluate_finds_labels_beside_a_list_of_unlabelled_cases(tmp_path):
    """As in the Decathlon's own folders; with names that end as those of modalities do."""
    for name in ("case_0000", "case_0001", "case_0002"):
        volume = np.zeros((4, 4, 4), np.uint8)
        volume[: int(name[-1]) + 1] = 1
        for folder in ("p", "labelsTr") if name != "case_0002" else ("labelsTr",):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / folder / f"{name}.nii.gz")
    training = [
        {"image": f"imagesTr/case_000{n}.nii.gz", "label": f"labelsTr/case_000{n}.nii.gz"} for n in range(3)
    ]
    content = {
        "labels": {"0": "background", "1": "lesion"},
        "test": ["imagesTs/b.nii.gz"],
        "training": training,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    for labels, target in ((tmp_path, "lesion"), (tmp_path / "labelsTr", "1")):
        options = ["--predictions", tmp_path / "p", "--labels", labels, "--output", tmp_path / "scores.csv"]
        assert "1 of 3 labels have no prediction" in run("evaluate", *options)
        rows = [line.split(",")[:3] for line in (tmp_path / "scores.csv").read_text().splitlines()]
        assert rows[1:] == [[f"case_000{n}", target, "1.000000"] for n in range(2)]


def test_train_predict_evaluate(data, tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.LINE_SECONDS", 0.0)
    out = tmp_path / "run"
    options = ["train", data, "--out", out, "--steps", 4, "--validate-every", 2]
    printed = run(*options)
    assert "4 to train on, 1 held out" in printed
    assert re.search(r"step 3 of 4, loss [\d.]+, Dice [\d.]+ step 4 of 4", printed)
    assert {"checkpoint.pt", "best.pt", "plan.json", "log"} == {path.name for path in out.iterdir()}
    assert list((out / "log").iterdir())
    plan, state = read_checkpoint(out / "checkpoint.pt")
    assert [step for step, _ in state["scores"]] == [2, 4]
    assert json.loads((out / "plan.json").read_text())["steps"] == 4
    _, same = load_network(out / "best.pt")
    assert same == plan
    assert "4 steps are done" in run(*options)

    predict = ["predict", "--checkpoint", out / "checkpoint.pt", "--input", data / "dataset.json"]
    run(*predict, "--output", tmp_path / "p")
    run(*predict, "--output", tmp_path / "w", "--whole", "--mirror", "--checkpoint", out / "best.pt")
    arguments = ["--labels", data, "--output", tmp_path / "scores.csv"]
    printed = run("evaluate", "--predictions", tmp_path / "p", *arguments)
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
        (["--fold", 7], "fold: got 7"),
        (["--device", "cuda:9"], "device: 'cuda:9'"),
        (["--device", "abacus"], "device: 'abacus' is no device"),
        (["--device", "meta"], "device: 'meta' is not supported"),
        (["--workers", -1], "workers: got -1"),
    ],
)
def test_train_errors(data, tmp_path, options, words):
    assert words in run("train", data, "--out", tmp_path / "run", *options, code=2)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_explain_writes_components_and_ranks_them(tumour, tmp_path):
    four_modalities(tmp_path / "in", "odd", affine=ODD)
    label = np.zeros((15, 20, 17), np.uint8)
    label[4:9, 5:12, 6:11] = 2
    (tmp_path / "labels").mkdir()
    nib.save(nib.Nifti1Image(label, ODD), tmp_path / "labels" / "odd.nii.gz")
    options = ["explain", "--checkpoint", tumour, "--input", tmp_path / "in"]
    out = tmp_path / "out"
    printed = run(*options, "--labels", tmp_path / "labels", "--output", out)
    assert "best Dice" in printed
    assert {path.name for path in out.iterdir()} == {
        *("components.csv", "odd.png", "odd_prediction.nii.gz"),
        *("odd_shallow.nii.gz", "odd_deep.nii.gz"),
    }
    deep = nib.load(out / "odd_deep.nii.gz")
    np.testing.assert_allclose(deep.affine, ODD)
    assert deep.shape == (15, 20, 17, 2)  # 16 channels in heads of 8, each of rank 1
    with (out / "components.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["compared_with"] for row in rows} == {"label"}
    of_deep = [row for row in rows if (row["layer"], row["target"]) == ("deep", "TC")]
    assert float(of_deep[0]["auc"]) >= float(of_deep[1]["auc"])
    best = np.asarray(deep.dataobj)[..., int(of_deep[0]["component"])]
    found = agreement(torch.from_numpy(best), torch.from_numpy(label == 2))
    assert found.auc == pytest.approx(float(of_deep[0]["auc"]), abs=1e-4)
    assert found.dice == pytest.approx(float(of_deep[0]["best_dice"]), abs=1e-4)
    assert {row["auc"] for row in rows if row["target"] == "ET"} == {"nan"}  # an empty region
    pixels = imread(out / "odd.png")
    assert pixels[..., :3].std() > 0.05
    run(*options, "--layer", "deep", "--output", tmp_path / "without")
    assert "prediction" in (tmp_path / "without" / "components.csv").read_text()
    assert "no 'nowhere'" in run(*options, "--layer", "nowhere", "--output", out, code=2)


def test_speed(data, tmp_path):
    plan = plan_for(held_out=("synthetic_002",), network={"rank": 1, "num_iters": 3})
    checkpoint = checkpoint_for(plan, tmp_path / "checkpoint.pt")
    options = ["speed", "--checkpoint", checkpoint, "--output", tmp_path, "--input"]
    printed = run(*options, data / "dataset.json", "--num-iters", "0,5", "--ranks", "1,2")
    assert "task: 1 case " in printed
    with (tmp_path / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = [(int(row["num_iters"]), int(row["rank"])) for row in rows]
    assert settings == [(0, 1), (5, 1), (3, 1), (3, 2)]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert imread(tmp_path / "speed.png").std() > 0.05
    assert "ranks: got 'x'" in run(*options, data / "dataset.json", "--ranks", "x", code=2)
    assert "ranks: got 0; it must be" in run(*options, data / "dataset.json", "--ranks", "2,0", code=2)
    four_modalities(tmp_path / "in", "case")
    assert "no case has a label" in run(*options, tmp_path / "in", code=2)


def test_doctor(monkeypatch):
    monkeypatch.setattr("factorizer.commands.doctor.ROUNDS", 1)
    printed = run("doctor")
    assert "All usable backends are right." in printed
    monkeypatch.setattr("factorizer.commands.doctor.TOLERANCE", 0.0)
    assert "WRONG" in run("doctor", code=1)

    def broken(backend, device):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("factorizer.commands.doctor._errors", broken)
    assert "FAILS" in run("doctor", code=1)
