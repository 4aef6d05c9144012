"""factorizer evaluate: scores of classes and regions, and what cannot be compared."""

import csv
import json
import re

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import checkpoint_for, four_modalities, plan_for, run_command


def evaluate(tmp_path, prediction, truth, *options, code=0):
    """Evaluates one case; returns what was printed and the CSV's lines."""
    for kind, volume in (("p", prediction), ("t", truth)):
        (tmp_path / kind).mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.diag([1.0, 2, 3, 1])), tmp_path / kind / "case.nii.gz")
    table = tmp_path / "scores.csv"
    arguments = ["--predictions", tmp_path / "p", "--labels", tmp_path / "t", "--output", table]
    printed = run_command("evaluate", *arguments, *options, code=code)
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
    # Two voxels of three lie on the other's surface, the third 3 mm away.
    assert float(rows["1"]["surface_dice_1mm"]) == pytest.approx(2 / 3)
    assert (float(rows["2"]["dice"]), float(rows["2"]["hd95_mm"])) == (0, np.inf)
    assert float(rows["2"]["surface_dice_1mm"]) == 0


def test_evaluate_regions_and_empty_masks(tumour, tmp_path):
    truth = np.zeros((6, 6, 6), np.uint8)
    truth[1:4, 1:4, 1:4] = 1
    prediction = truth.copy()
    prediction[1, 1, 1] = 2
    printed, rows = evaluate(tmp_path, prediction, truth, "--checkpoint", tumour)
    assert (float(rows["ET"]["dice"]), float(rows["ET"]["hd95_mm"])) == (1, 0)  # both empty
    assert [float(rows[region]["surface_dice_1mm"]) for region in ("ET", "TC", "WT")] == [1, 0, 1]
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
    assert "p/case.nii.gz: there is no label for it" in run_command(
        "evaluate", *arguments, tmp_path / "t", code=1
    )
    (tmp_path / "list.json").write_text('[{"image": "other.nii"}]')
    assert "no case has a label" in run_command("evaluate", *arguments, tmp_path / "list.json", code=2)
    assert "no folder and no data list" in run_command("evaluate", *arguments, tmp_path / "absent", code=2)
    (tmp_path / "s.csv").unlink()
    (tmp_path / "s.csv").mkdir()
    assert "s.csv is a folder; it must be a file" in run_command(
        "evaluate", *arguments, tmp_path / "t", code=2
    )


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
        assert "1 of 3 labels have no prediction" in run_command("evaluate", *options)
        rows = [line.split(",")[:3] for line in (tmp_path / "scores.csv").read_text().splitlines()]
        assert rows[1:] == [[f"case_000{n}", target, "1.000000"] for n in range(2)]


def test_evaluate_draws_over_the_image_that_a_list_names(tumour, tmp_path):
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2:5, 2:6, 2:5] = 1
    evaluate(tmp_path, truth, truth, "--preview")
    plain = (tmp_path / "scores_previews" / "case.png").stat().st_size
    image = np.random.default_rng(0).gamma(2, 100, truth.shape).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([1.0, 2, 3, 1])), tmp_path / "case.nii.gz")
    content = {
        "labels": {"0": "background", "1": "lesion"},
        "modality": {"0": "T1"},
        "training": [
            {"image": "case.nii.gz", "label": "t/case.nii.gz"},
            {"image": "no.nii.gz", "label": "t/no.nii.gz"},
        ],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    options = [
        "--predictions",
        tmp_path / "p",
        "--labels",
        tmp_path,
        "--output",
        tmp_path / "s.csv",
        "--preview",
    ]
    run_command("evaluate", *options)
    assert (tmp_path / "s_previews" / "case.png").stat().st_size > 1.2 * plain
    (tmp_path / "case.nii.gz").write_bytes(b"broken")
    assert "case: no picture: " in run_command("evaluate", *options, "--preview")
    assert "lesion" in (tmp_path / "s.csv").read_text()


def test_evaluate_tells_what_its_scores_do_not_mean(tmp_path):
    volume = np.zeros((8, 8, 8), np.uint8)
    volume[2:5, 2:6, 2:5] = 1
    printed, rows = evaluate(tmp_path, volume * np.uint8(255), volume)
    assert "no label has the values [255] that segmentations have" in printed
    assert float(rows["1"]["dice"]) == float(rows["255"]["dice"]) == 0
    network = checkpoint_for(
        plan_for(labels={0: "background", 1: "lesion"}, training=("case",)), tmp_path / "c.pt"
    )
    told = "the network was trained on cases of these names, whose scores say nothing about new ones: case"
    assert told in evaluate(tmp_path, volume, volume, "--checkpoint", network)[0]
    other = checkpoint_for(
        plan_for(labels={0: "background", 1: "lesion"}, training=("b",)), tmp_path / "d.pt"
    )
    both = [option for file in (other, network) for option in ("--checkpoint", file)]
    run_command("models", "export", *both, "--output", tmp_path / "both.pt")
    told = told.replace("network was", "networks were")  # by the second of them
    assert told in evaluate(tmp_path, volume, volume, "--checkpoint", tmp_path / "both.pt")[0]


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    volume = np.zeros((8, 8, 8), np.uint8)
    volume[2:5, 2:6, 2:5] = 1
    labels = {0: "background", 1: "lesion [/old]"}
    network = checkpoint_for(plan_for(labels=labels), tmp_path / "c.pt")
    printed, rows = evaluate(tmp_path, volume, volume, "--checkpoint", network)
    assert "lesion [/old]" in printed
    assert list(rows) == ["lesion [/old]"]


def test_evaluate_measures_volumes_of_prediction_and_label(tmp_path):
    truth = np.zeros((8, 8, 8), np.uint8)
    truth[2:5, 2:6, 2:5] = 1
    evaluate(tmp_path, truth * (np.arange(8) < 4), truth, "--statistics", "--preview")
    with (tmp_path / "scores_statistics.csv").open() as file:
        (row,) = csv.DictReader(file)
    expected = {"voxels": 24, "ml": 24 * 6e-3, "label_voxels": 36, "label_ml": 36 * 6e-3}
    assert {key: float(row[key]) for key in expected} == pytest.approx(expected)
    evaluate(tmp_path, truth, truth)  # without these, none of an earlier command's stay beside its scores
    assert not (tmp_path / "scores_statistics.csv").exists()
    assert not list((tmp_path / "scores_previews").glob("*.png"))


@pytest.mark.parametrize("options", [[], ["--statistics"], ["--preview"]], ids=str)
def test_evaluate_leaves_what_it_did_not_make(tmp_path, options):
    volume = np.zeros((8, 8, 8), np.uint8)
    volume[2:5, 2:6, 2:5] = 1
    evaluate(tmp_path, volume, volume)
    files = [tmp_path / "scores_statistics.csv", tmp_path / "scores_previews" / "case.png"]
    files[1].parent.mkdir()
    for file in files:
        file.write_text("case,p-value")
    printed, _ = evaluate(tmp_path, volume, volume, *options, code=2 if options else 0)
    assert not options or "is there, and is no" in printed
    assert [file.read_text() for file in files] == ["case,p-value"] * 2


def test_evaluate_writes_over_scores_alone(tumour, tmp_path):
    volume = np.zeros((8, 8, 8), np.uint8)
    evaluate(tmp_path, volume, volume)
    listing = tmp_path / "dataset.json"
    listing.write_text("{}")
    inputs = [tumour, listing, tmp_path / "p" / "case.nii.gz", tmp_path / "t" / "case.nii.gz"]
    before = [file.read_bytes() for file in inputs]
    options = ["evaluate", "--predictions", tmp_path / "p", "--labels", tmp_path / "t"]
    for file in inputs:
        printed = run_command(*options, "--output", file, code=2)
        assert f"output: {file} is there, and is no file of scores" in printed
    assert [file.read_bytes() for file in inputs] == before
    assert "checkpoint: there is no" in run_command(
        *options, "--output", tmp_path / "scores.csv", "--checkpoint", tmp_path / "nope.pt", code=2
    )


def test_evaluate_tells_of_a_segmentation_of_another_scan(tumour, tmp_path):
    four_modalities(tmp_path / "a", "scan")
    four_modalities(tmp_path / "b", "scan", seed=1)
    run_command("predict", "--checkpoint", tumour, "--input", tmp_path / "a", "--output", tmp_path / "p")
    nib.save(nib.load(tmp_path / "p" / "scan.nii.gz"), tmp_path / "label.nii.gz")
    for folder, told in (("a", False), ("b", True)):
        images = [f"{folder}/scan_{k:04d}.nii.gz" for k in range(4)]
        entry = {"name": "scan", "image": images, "label": "label.nii.gz"}
        (tmp_path / "list.json").write_text(json.dumps([entry]))
        options = ["--predictions", tmp_path / "p", "--labels", tmp_path / "list.json"]
        printed = run_command("evaluate", *options, "--output", tmp_path / "s.csv")
        assert ("was made from other files" in printed) == told
