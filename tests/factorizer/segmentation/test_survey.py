"""What is allowed in a task, seldom meant, and told."""

import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np

from factorizer.segmentation.cases import Case, Task, read_decathlon
from factorizer.segmentation.survey import check_case, doubts, doubts_of_files, doubts_of_image


def test_doubts_are_told_before_training(synthetic):
    task = read_decathlon(synthetic)
    task = replace(task, labels={**task.labels, 3: "necrosis"})
    geometries = {case.name: check_case(task, case) for case in task.cases}
    names = list(geometries)
    learned = "nothing can be learned about it"
    assert doubts(task, geometries, names) == [
        f"no training case has a voxel of 'necrosis' (label value 3): {learned}"
    ]
    held_out = geometries | {names[0]: replace(geometries[names[0]], labelled={0: 9, 3: 1})}
    assert doubts(task, held_out, names[1:]) == [
        f"no training case has a voxel of 'necrosis' (label value 3), but only {names[0]}: {learned}"
    ]
    odd = [replace(g, sides={}, constant=(1,), identical=((0, 1),), digest="d") for g in geometries.values()]
    told = " ".join(doubts(task, dict(zip(names, odd, strict=True)), names))
    for words in (
        "the label map is empty in 5 of 5 cases: synthetic_001, ",
        "contrast B holds a single value in 5 cases",
        "contrast A and contrast B are the same volume in 5 cases",
        "these cases hold the same image: synthetic_001, ",
    ):
        assert words in told


def test_a_copy_of_a_modality_is_seen_on_another_scale_too(tmp_path):
    rng = np.random.default_rng(0)
    first = rng.gamma(5, 100, (12, 12, 12)).astype(np.float32)
    label = (first > 500).astype(np.uint8)
    others = {"copy": np.rint(first * 0.5 + 3), "other": first + rng.normal(0, 50, first.shape)}
    found = {}
    for name, second in others.items():
        for part, voxels in (("0000", first), ("0001", second.astype(np.int16)), ("label", label)):
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}_{part}.nii.gz")
        images = tuple(tmp_path / f"{name}_{k:04d}.nii.gz" for k in range(2))
        case = Case(name, images, tmp_path / f"{name}_label.nii.gz")
        task = Task("task", ("A", "B"), {0: "background", 1: "lesion"}, (case,))
        found[name] = check_case(task, case).identical
    assert found == {"copy": ((0, 1),), "other": ()}


def test_headers_that_do_not_say_which_side_is_left(tmp_path):
    voxels, affine = np.ones((4, 5, 6), np.uint8), np.diag([-1.0, 1, 1, 1])
    images = {name: nib.Nifti1Image(voxels, affine) for name in ("silent", "two", "sform", "qform")}
    images["silent"] = nib.Nifti1Image(voxels, None)
    images["two"].set_qform(np.eye(4), 1)
    images["two"].set_sform(affine, 1)
    images["qform"].set_qform(affine, 1)
    images["qform"].set_sform(None, 0)
    for name, image in images.items():
        nib.save(image, tmp_path / f"{name}.nii.gz")
    names = [*images, "missing"]
    found = doubts_of_files([Case(name, (tmp_path / f"{name}.nii.gz",)) for name in names])
    assert [text.split()[-1] for text in found] == ["silent", "two"]
    assert "sform_code and qform_code are 0" in found[0]
    assert "the sform is believed" in found[1]


def test_files_of_other_cases_are_seen_by_their_numbers(tmp_path):
    def case(name, *files):
        return Case(name, tuple(tmp_path / file for file in files[:-1]), tmp_path / files[-1])

    right = [
        case("a", "t1/img_01.nii.gz", "t2/img_01.nii.gz", "label_1.nii.gz"),
        case("b", "t1/img_02.nii.gz", "t2/img_02.nii.gz", "label_2.nii.gz"),
        case("c", "pat_3/t1.nii.gz", "pat_3/t2.nii.gz", "pat_3/seg.nii.gz"),
        case("d", "scan_0000.nii.gz", "scan_0001.nii.gz", "seg.nii.gz"),
    ]
    assert doubts_of_files(right) == []
    swapped = [replace(right[0], label=right[1].label), replace(right[1], label=right[0].label), *right[2:]]
    (told,) = doubts_of_files(swapped)
    assert "a has label_2.nii.gz, which by its name is of b, b has label_1.nii.gz" in told
    mixed = replace(right[2], images=(right[2].images[0], right[0].images[1]))
    assert "c has img_01.nii.gz, which by its name is of a" in doubts_of_files([*right[:2], mixed])[0]


def test_two_cases_with_one_label_file_are_told(synthetic):
    task = read_decathlon(synthetic)
    first, second, *others = task.cases
    task = replace(task, cases=(first, replace(second, label=first.label), *others))
    geometries = {case.name: check_case(task, case) for case in task.cases[2:]}
    assert f"these cases have the same label file: {first.name}, {second.name}" in doubts(
        task, geometries, list(geometries)
    )


def test_ct_whose_offset_was_lost(tmp_path):
    voxels = np.random.default_rng(0).normal(-200, 300, (6, 7, 8)).astype(np.float32)
    found = []
    for offset in (0, 1024):
        image = (voxels + offset).clip(-1000 + offset)[..., None]
        found.append(doubts_of_image(image, ("CT",)))
    assert found[0] == []
    assert "CT holds no value below 0" in found[1][0]
    assert doubts_of_image(image, ("MR",)) == []


def test_one_image_trained_on_and_held_out(synthetic, tmp_path):
    """Whatever its files are called, and however they were written."""
    folder = shutil.copytree(synthetic, tmp_path / "task")
    image = nib.load(folder / "imagesTr" / "synthetic_001.nii.gz")
    voxels = np.asarray(image.dataobj).astype(np.float64)
    nib.save(nib.Nifti1Image(voxels, image.affine), folder / "imagesTr" / "synthetic_002.nii.gz")
    shutil.copy(folder / "labelsTr" / "synthetic_001.nii.gz", folder / "labelsTr" / "synthetic_002.nii.gz")
    task = read_decathlon(folder)
    geometries = {case.name: check_case(task, case) for case in task.cases}
    names = [case.name for case in task.cases]
    same = f"these cases hold the same image: {names[0]}, {names[1]}"
    assert doubts(task, geometries, names) == [same]
    assert doubts(task, geometries, names[1:]) == [f"{same}; some are trained on, others held out"]
