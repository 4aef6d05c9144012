"""factorizer explain: components, their ranking and figures."""

import csv

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import ODD, four_modalities, run_command
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
    assert "no 'nowhere'" in run_command(*options, "--layer", "nowhere", "--output", out, code=2)
