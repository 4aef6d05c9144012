"""The demo's made-up volumes."""

import json
import math

import nibabel as nib
import numpy as np

from factorizer.commands.demo import write_synthetic
from factorizer.segmentation.cases import read_decathlon


def test_synthetic_volumes_are_seeded_and_whole(synthetic, tmp_path):
    def voxels(root):
        task = read_decathlon(root)
        return [np.asarray(nib.load(f).dataobj) for c in task.cases for f in (c.image, c.label)]

    wanted = voxels(synthetic)
    same = voxels(write_synthetic(tmp_path / "same", cases=5, shape=(18, 18, 18), seed=0))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, same, strict=True))
    other = voxels(write_synthetic(tmp_path / "other", cases=5, shape=(18, 18, 18), seed=1))
    assert not any(np.array_equal(a, b) for a, b in zip(wanted, other, strict=True))
    labels = np.concatenate([volume.ravel() for volume in wanted[1::2]])
    assert set(np.unique(labels)) == {0, 1, 2}
    assert "SYNTHETIC" in json.loads((synthetic / "dataset.json").read_text())["description"]
    assert math.isclose(np.mean(labels > 0), 0.04, abs_tol=0.035)
