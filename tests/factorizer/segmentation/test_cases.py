"""Decathlon folders: what is read from them, and what is wrong with them; other ways to name cases."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import save_volume

from factorizer.segmentation.cases import Case, find_cases, read_decathlon, split_cases
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.volumes import check_case


@pytest.fixture
def folder(synthetic, tmp_path):
    return shutil.copytree(synthetic, tmp_path / "task")


def edit(folder, **changes):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_reads_what_the_folder_says(folder):
    task = read_decathlon(folder)
    assert task.name == "Synthetic lesions"
    assert task.modalities == ("contrast A", "contrast B")
    assert task.labels == {0: "background", 1: "halo", 2: "core"}
    assert [case.name for case in task.cases] == [f"synthetic_{i:03d}" for i in range(1, 6)]
    for case in task.cases:
        nonzero = np.asarray(nib.load(case.image).dataobj).any(axis=3)
        box = tuple(np.ptp(places) + 1 for places in np.nonzero(nonzero))
        geometry = check_case(task, case)
        assert geometry.shape == box
        assert geometry.spacing == (1, 1, 1)
        voxels, label = (np.asarray(nib.load(f).dataobj) for f in (case.image, case.label))
        assert geometry.intensity_range == pytest.approx(np.quantile(voxels[label > 0], (0.005, 0.995)))


def test_labels_are_sorted_by_value(folder):
    edit(folder, labels={"10": "b", "0": "background", "9": "a", "2": "core", "1": "halo"})
    assert list(read_decathlon(folder).labels) == [0, 1, 2, 9, 10]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": None}, "'modality' is missing"),
        ({"labels": None}, "'labels' is missing"),
        ({"training": None}, "'training' is missing"),
        ({"labels": ["background", "halo"]}, "'labels' is"),
        ({"training": []}, "'training' is"),
        ({"labels": {"background": 0, "halo": 1}}, "'labels' must be label values"),
        ({"labels": {"1": "halo", "2": "core"}}, "it needs 0, the background"),
        ({"labels": {"0": "background"}}, "at least one more"),
        ({"labels": {"0": "background", "300": "halo"}}, "none above 255"),
        ({"training": [{"image": "./imagesTr/a.nii.gz"}]}, r"training\[0\]"),
        ({"training": ["./imagesTr/a.nii.gz"]}, r"training\[0\]"),
        (
            {"training": [{"image": "imagesTr/no.nii.gz", "label": "labelsTr/no.nii.gz"}]},
            r"missing: .*imagesTr/no.nii.gz",
        ),
    ],
)
def test_dataset_json_errors(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(DataError, match=words):
        read_decathlon(folder)


def test_folder_errors(folder, tmp_path):
    with pytest.raises(DataError, match=r"absent is not a folder"):
        read_decathlon(tmp_path / "absent")
    with pytest.raises(DataError, match=r"dataset\.json is missing"):
        read_decathlon(tmp_path)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        read_decathlon(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object"):
        read_decathlon(folder)


def test_too_few_cases(folder):
    training = json.loads((folder / "dataset.json").read_text())["training"]
    edit(folder, training=training[:2])
    with pytest.raises(DataError, match="too few cases: 2; at least 3"):
        read_decathlon(folder)


def test_two_cases_of_one_name(folder):
    training = json.loads((folder / "dataset.json").read_text())["training"]
    edit(folder, training=[*training, training[0]])
    with pytest.raises(DataError, match="two cases are called 'synthetic_001'"):
        read_decathlon(folder)


def test_split_is_seeded_disjoint_and_blind_to_order(synthetic):
    cases = read_decathlon(synthetic).cases
    cases = [Case(f"{i:02d}", case.images, case.label) for i in range(10) for case in cases[:1]]
    training, held_out = split_cases(cases, seed=0)
    assert len(training) == 8
    assert sorted(training + held_out, key=lambda case: case.name) == cases
    assert split_cases(cases[::-1], seed=0) == (training, held_out)
    assert split_cases(cases, seed=1) != (training, held_out)


def test_folds_hold_every_case_out_once(synthetic):
    case = read_decathlon(synthetic).cases[0]
    cases = [Case(f"{i:02d}", case.images, case.label) for i in range(12)]
    splits = [split_cases(cases, seed=0, fold=fold) for fold in range(5)]
    assert sorted(c.name for _, held_out in splits for c in held_out) == [c.name for c in cases]
    assert all(set(t) | set(h) == set(cases) for t, h in splits)
    with pytest.raises(DataError, match="fold: got 5 of 5 folds"):
        split_cases(cases, seed=0, fold=5)


def test_ways_to_name_cases(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c"):
        save_volume(tmp_path / f"{name}.nii.gz")
    (tmp_path / ".part-d.nii.gz").touch()  # what a killed run may leave
    a, b, c = find_cases([tmp_path])
    assert [case.name for case in (a, b, c)] == ["a", "b", "c"]
    assert [path.name for path in a.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert len(c.images) == 1
    pair = ",".join(map(str, b.images))
    assert find_cases([pair]) == (b,)
    assert [case.name for case in find_cases([b.images[0], c.image])] == ["b_0000", "c"]
    (tmp_path / "a_0000.nii.gz").unlink()  # without a first modality these are numbers of cases
    assert [case.name for case in find_cases([tmp_path])] == ["a_0001", "b", "c"]
    save_volume(tmp_path / "a_0000.nii.gz")
    with_comma = save_volume(tmp_path / "one, two.nii")
    assert find_cases([with_comma])[0].images == (with_comma,)
    with_comma.rename(tmp_path / "c.nii")
    with pytest.raises(DataError, match="two cases are called 'c'"):
        find_cases([tmp_path])
    entries = [{"image": ["a_0000.nii.gz", "a_0001.nii.gz"]}, {"image": "c.nii.gz", "label": "l.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    listed = find_cases([tmp_path / "list.json"])
    assert [case.name for case in listed] == ["a", "c"]
    assert listed[0].images == tuple(path.resolve() for path in a.images)
    assert listed[1].label == (tmp_path / "l.nii.gz").resolve()


def test_sections_of_a_data_list(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"test": [], "training": [{"image": "a.nii", "label": "b.nii"}]}))
    assert [case.name for case in find_cases([path])] == ["a"]
    path.write_text(json.dumps({"test": ["c.nii"], "training": [{"image": "a.nii"}]}))
    assert [case.name for case in find_cases([path])] == ["c"]
    assert [case.name for case in find_cases([path], "training")] == ["a"]
    assert find_cases([tmp_path], "training") == find_cases([path], "training")
    with pytest.raises(DataError, match="needs a list 'validation'"):
        find_cases([path], "validation")
    path.write_text(json.dumps({"test": ["c.nii"], "training": [{"image": "a.nii", "label": "b.nii"}]}))
    assert [case.name for case in find_cases([path], labelled=True)] == ["a"]
    with pytest.raises(DataError, match="no case has a label"):
        find_cases([path], "test", labelled=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable as JSON"),
        ("[1]", r"entry\[0\] is 1"),
        ('[{"image": []}]', r"entry\[0\]"),
        ('[{"image": "a.nii", "label": 3}]', r"entry\[0\]"),
        ('["a.nii", "x/a.nii"]', "two cases are called 'a'"),
        ("[]", "no cases"),
    ],
)
def test_data_list_errors(tmp_path, content, words):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=words):
        find_cases([tmp_path / "list.json"])
