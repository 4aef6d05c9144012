"""Pictures of cases with their label maps, and volumes in ml."""

import csv

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import ODD
from matplotlib.image import imread

from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.preview import class_indices, draw_preview
from factorizer.segmentation.statistics import volumes, write_statistics

TARGETS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}


def test_volumes_are_in_ml_whatever_the_axes_and_the_unit(tmp_path):
    labels = np.zeros((4, 5, 6), np.uint8)
    labels[1, 1, :5], labels[2, 2, 2] = 2, 4
    assert volumes(labels, ODD, TARGETS) == pytest.approx({"WT": 0.018, "TC": 0.003, "ET": 0.003})
    image = nib.Nifti1Image(labels, np.diag([500.0, 500, 500, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "a.nii.gz")
    write_statistics(tmp_path / "s.csv", {"a": tmp_path / "a.nii.gz"}, TARGETS)
    with (tmp_path / "s.csv").open() as file:
        rows = {row["target"]: row for row in csv.DictReader(file)}
    assert float(rows["WT"]["ml"]) == pytest.approx(6 * 0.125e-3)
    assert rows["WT"]["voxels"] == "6"


def test_the_innermost_region_is_what_is_drawn():
    assert class_indices(np.array([0, 1, 2, 4, 9]), TARGETS).tolist() == [0, 2, 1, 3, 0]


def test_air_around_the_head_is_not_drawn(tmp_path):
    labels, image = np.zeros((60, 50, 40), np.uint8), np.zeros((60, 50, 40), np.float32)
    image[20:40, 20:38, 10:30] = np.random.default_rng(0).gamma(2, 100, (20, 18, 20))
    labels[25:30, 25:30, 15:20] = 2
    for name, voxels in (("image", image), ("p", labels)):
        nib.save(nib.Nifti1Image(voxels, ODD), tmp_path / f"{name}.nii.gz")
    shape = []
    for seen in (image, image + 5000):  # the second has no air
        nib.save(nib.Nifti1Image(seen, ODD), tmp_path / "image.nii.gz")
        case = Case("case", (tmp_path / "image.nii.gz",))
        draw_preview(tmp_path / "case.png", case, tmp_path / "p.nii.gz", TARGETS, {}, ("T1",))
        pixels = imread(tmp_path / "case.png")[..., :3]
        panels = pixels[: len(pixels) * 17 // 20]  # above the legend
        shape.append((panels.max(-1) - panels.min(-1) > 0.3).mean())
    assert shape[0] > 2 * shape[1]  # the same structure, in more of the picture


def test_a_picture_lies_on_the_grid_of_the_prediction(tmp_path):
    labels, image = np.zeros((8, 9, 10), np.uint8), np.random.default_rng(0).gamma(2, 100, (8, 9, 10))
    labels[1:3, 2:4, 2:5] = 2
    flipped = np.array([[-1.0, 0, 0, 7], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "p.nii.gz")
    drawn = []
    for voxels, affine in ((image, np.eye(4)), (image[::-1], flipped)):
        nib.save(nib.Nifti1Image(voxels.astype(np.float32), affine), tmp_path / "image.nii.gz")
        case = Case("case", (tmp_path / "image.nii.gz",))
        draw_preview(tmp_path / "case.png", case, tmp_path / "p.nii.gz", TARGETS, {}, ("T1",))
        drawn.append(imread(tmp_path / "case.png"))
    np.testing.assert_array_equal(*drawn)
    nib.save(nib.Nifti1Image(image.astype(np.float32), flipped + 1), tmp_path / "image.nii.gz")
    with pytest.raises(DataError, match="lies on another grid than its image"):
        draw_preview(tmp_path / "case.png", case, tmp_path / "p.nii.gz", TARGETS, {}, ("T1",))


@pytest.mark.parametrize("kind", ["with a label", "an empty prediction", "without an image"])
def test_a_picture_is_drawn(tmp_path, kind):
    labels = np.zeros((15, 20, 17), np.uint8)
    labels[4:9, 5:12, 6:11] = 2
    image = np.random.default_rng(0).gamma(2, 100, (*labels.shape, 2)).astype(np.float32)
    for name, voxels in (
        ("image", image),
        ("label", labels),
        ("p", labels * (kind != "an empty prediction")),
    ):
        nib.save(nib.Nifti1Image(voxels, ODD), tmp_path / f"{name}.nii.gz")
    case = Case(
        "case",
        () if kind == "without an image" else (tmp_path / "image.nii.gz",),
        None if kind == "an empty prediction" else tmp_path / "label.nii.gz",
    )
    draw_preview(tmp_path / "case.png", case, tmp_path / "p.nii.gz", TARGETS, {"TC": "Dice 1"}, ("T1", "T2"))
    pixels = imread(tmp_path / "case.png")[..., :3]
    assert pixels.std() > 0.03
    panels = pixels[: len(pixels) * 17 // 20]  # above the legend
    colourful = (panels.max(-1) - panels.min(-1) > 0.3).mean()
    assert (colourful > 0.002) == (kind != "an empty prediction")


def test_dollars_in_names_are_no_mathematics(tmp_path):
    path = tmp_path / "p.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.uint8), ODD), path)
    draw_preview(tmp_path / "case.png", Case("cost$_{1$", ()), path, {"$_{WT$": (1,)}, {})
    assert imread(tmp_path / "case.png").std() > 0.03
