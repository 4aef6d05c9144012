"""factorizer explain: components, their ranking and figures."""

import csv
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import ODD, REGIONS, four_modalities, run_command
from matplotlib.image import imread

from factorizer.segmentation.explanation import agreement
from factorizer.segmentation.transforms import PreparedCase


def test_explain_writes_components_and_ranks_them(tumour, tmp_path, monkeypatch):
    four_modalities(tmp_path / "in", "odd", affine=ODD)
    label = np.zeros((15, 20, 17), np.uint8)
    label[4:9, 5:12, 6:11] = 2
    (tmp_path / "labels").mkdir()
    nib.save(nib.Nifti1Image(label, ODD), tmp_path / "labels" / "odd.nii.gz")
    options = ["explain", "--checkpoint", tumour, "--input", tmp_path / "in"]
    out = tmp_path / "out"
    printed = run_command(*options, "--labels", tmp_path / "labels", "--output", out)
    assert "best Dice" in printed
    assert {path.name for path in out.iterdir()} == {
        *("components.csv", "odd.png", "odd_prediction.nii.gz"),
        *("odd_shallow.nii.gz", "odd_deep.nii.gz", "made_from"),
    }
    deep = nib.load(out / "odd_deep.nii.gz")
    np.testing.assert_allclose(deep.affine, ODD)
    assert deep.shape == (15, 20, 17, 2)  # 16 channels in heads of 8, each of rank 1
    with (out / "components.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["compared_with"] for row in rows} == {"label"}
    of_deep = [row for row in rows if (row["layer"], row["target"]) == ("deep", "TC")]
    clarity = [abs(float(row["auc"]) - 0.5) for row in of_deep]
    assert clarity == sorted(clarity, reverse=True)  # far below chance tells as much as far above
    sides = [(row["marks"], "label" if float(row["auc"]) >= 0.5 else "outside") for row in of_deep]
    assert all(told == meant for told, meant in sides)
    best = np.asarray(deep.dataobj)[..., int(of_deep[0]["component"])]
    found = agreement(torch.from_numpy(best), torch.from_numpy(label == 2))
    assert found.auc == pytest.approx(float(of_deep[0]["auc"]), abs=1e-4)
    assert found.dice == pytest.approx(float(of_deep[0]["best_dice"]), abs=1e-4)
    assert {row["auc"] for row in rows if row["target"] == "ET"} == {"nan"}  # an empty region
    before = (out / "components.csv").read_text()
    run_command(*options, "--labels", tmp_path / "labels", "--output", out)  # its own are written anew
    assert (out / "components.csv").read_text() == before
    pixels = imread(out / "odd.png")
    assert pixels[..., :3].std() > 0.05
    prepared = []

    class Counted(PreparedCase):
        def __init__(self, *arguments):
            prepared.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("factorizer.commands.explain.PreparedCase", Counted)
    monkeypatch.setattr("factorizer.segmentation.explanation.PreparedCase", Counted)
    monkeypatch.setattr("factorizer.segmentation.inference.PreparedCase", Counted)
    run_command(*options, "--layer", "deep", "--output", tmp_path / "without")
    assert len(prepared) == 1
    assert "prediction" in (tmp_path / "without" / "components.csv").read_text()
    stored = nib.load(tmp_path / "without" / "odd_deep.nii.gz")
    assert stored.get_data_dtype() == np.uint16
    assert "background: got 'PD'; it must be one of" in run_command(
        *options, "--background", "PD", "--output", out, code=2
    )
    assert "no 'nowhere'" in run_command(*options, "--layer", "nowhere", "--output", out, code=2)


def test_explain_takes_lists_and_calls_empty_what_is(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a")
    four_modalities(tmp_path / "in", "b")
    nib.save(nib.Nifti1Image(np.zeros((15, 20, 17), np.uint8), np.eye(4)), tmp_path / "a_seg.nii.gz")
    entry = {"name": "a", "image": [f"in/a_{k:04d}.nii.gz" for k in range(4)], "label": "a_seg.nii.gz"}
    (tmp_path / "list.json").write_text(json.dumps({"training": [entry]}))
    options = ["explain", "--checkpoint", tumour, "--input", tmp_path / "in", "--layer", "deep"]
    options += ["--output", tmp_path / "out", "--background", "t1GD"]
    printed = run_command(*options, "--labels", tmp_path / "list.json", code=1)
    assert "a: the label is empty: no component can agree with it" in printed
    assert "b: failed:" in printed
    assert "has no label for it" in printed
    with (tmp_path / "out" / "components.csv").open() as file:
        assert {row["compared_with"] for row in csv.DictReader(file)} == {"label is empty"}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a.png"}
    assert "no folder and no data list" in run_command(*options, "--labels", tmp_path / "typo", code=2)


def test_explain_writes_over_no_other_case(tumour, tmp_path):
    four_modalities(tmp_path / "a", "scan")
    four_modalities(tmp_path / "b", "scan", seed=1)
    options = ["explain", "--checkpoint", tumour, "--layer", "deep", "--output", tmp_path / "out", "--input"]
    run_command(*options, tmp_path / "a", "--layer", "shallow")
    before = (tmp_path / "out" / "scan_deep.nii.gz").read_bytes()
    printed = run_command(*options, tmp_path / "b", code=1)
    assert "scan: failed:" in printed
    assert "was made from other inputs" in printed
    assert (tmp_path / "out" / "scan_deep.nii.gz").read_bytes() == before
    assert "scan,deep," in (tmp_path / "out" / "components.csv").read_text()
    run_command(*options, tmp_path / "a")
    assert not (tmp_path / "out" / "scan_shallow.nii.gz").exists()  # it might be of another network
    run_command(*options, tmp_path / "b", "--overwrite")
    assert (tmp_path / "out" / "scan_deep.nii.gz").read_bytes() != before


def deep_layer(network, folder):
    """The command for one scan, and where it writes to."""
    four_modalities(folder / "in", "scan")
    files = ["--checkpoint", network, "--input", folder / "in", "--output", folder / "out"]
    return ["explain", *files, "--layer", "deep"], folder / "out"


@pytest.mark.parametrize("name", ["scan_deep.nii.gz", "scan.png"])
def test_explain_leaves_what_it_did_not_make(tumour, tmp_path, name):
    options, out = deep_layer(tumour, tmp_path)
    out.mkdir()
    for file in (name, "scan_shallow.nii.gz", "scan_deep_more.nii.gz"):
        (out / file).write_bytes(b"of another program")
    assert f"{name}: is there, and nothing says what" in run_command(*options, code=1)
    for file in (name, "scan_shallow.nii.gz", "scan_deep_more.nii.gz"):
        assert (out / file).read_bytes() == b"of another program"
    (out / name).unlink()
    run_command(*options)
    assert (out / "scan_shallow.nii.gz").read_bytes() == b"of another program"


def test_the_threshold_makes_the_mask_of_the_best_dice(tumour, tmp_path):
    options, out = deep_layer(tumour, tmp_path)
    run_command(*options)
    maps = np.asarray(nib.load(out / "scan_deep.nii.gz").dataobj)
    prediction = np.asarray(nib.load(out / "scan_prediction.nii.gz").dataobj)
    rows = [row for row in csv.DictReader((out / "components.csv").open()) if row["marks"]]
    assert rows
    for row in rows:
        truth = np.isin(prediction, REGIONS[row["target"]])
        map_, threshold = maps[..., int(row["component"])], float(row["threshold"])
        mask = map_ >= threshold if row["marks"] == "label" else map_ <= threshold
        dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
        assert dice == pytest.approx(float(row["best_dice"]), abs=6e-5)


def test_a_network_whose_output_is_not_finite_explains_nothing(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a")
    state = torch.load(tumour, weights_only=True)
    state["network"] = {name: value * float("nan") for name, value in state["network"].items()}
    torch.save(state, tmp_path / "nan.pt")
    options = ["--checkpoint", tmp_path / "nan.pt", "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert "output for it is not finite" in run_command("explain", *options, "--layer", "deep", code=1)
    assert not list((tmp_path / "out").iterdir())


def test_a_table_of_others_stays(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a")
    out = tmp_path / "out"
    out.mkdir()
    (out / "components.csv").write_text("my,own,table\n")
    options = ["--checkpoint", tumour, "--input", tmp_path / "in", "--output", out]
    printed = run_command("explain", *options, code=2)
    assert "output: " in printed
    assert "components.csv is there, and is no table of components" in printed
    assert [path.name for path in out.iterdir()] == ["components.csv"]
    assert (out / "components.csv").read_text() == "my,own,table\n"
