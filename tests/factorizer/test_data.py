"""Decathlon folders: what is read from them, and what is wrong with them; other ways to name cases."""

import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest

from factorizer.commands.demo import write_synthetic
from factorizer.segmentation.cases import Case, Task, find_cases, read_decathlon, split_cases
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic
from factorizer.segmentation.volumes import check_case, check_image, write_nifti


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("data"), cases=4, shape=(18, 18, 18))


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "task")


def edit(folder, **changes):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def check_all(folder):
    task = read_decathlon(folder)
    return [check_case(task, case) for case in task.cases]


def rewrite(path, change):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


def test_reads_what_the_folder_says(folder):
    task = read_decathlon(folder)
    assert task.name == "Synthetic lesions"
    assert task.modalities == ("contrast A", "contrast B")
    assert task.labels == {0: "background", 1: "halo", 2: "core"}
    assert [case.name for case in task.cases] == [f"synthetic_{i:03d}" for i in range(1, 5)]
    for case in task.cases:
        nonzero = np.asarray(nib.load(case.image).dataobj).any(axis=3)
        box = tuple(np.ptp(places) + 1 for places in np.nonzero(nonzero))
        geometry = check_case(task, case)
        assert geometry.shape == box
        assert geometry.spacing == (1, 1, 1)
        voxels, label = (np.asarray(nib.load(f).dataobj) for f in (case.image, case.label))
        assert geometry.window == pytest.approx(np.quantile(voxels[label > 0], (0.005, 0.995)))


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


@pytest.mark.parametrize("kind", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_nifti(folder, kind, content):
    path = folder / kind / "synthetic_002.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(DataError, match=rf"{kind}/synthetic_002.nii.gz: not readable as NIfTI"):
        check_all(folder)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("labelsTr", lambda x: x[:-1], r"labelsTr/.*shape .* does not match"),
        ("imagesTr", lambda x: x[..., :1], "1 channels; there must be one for each of the 2 modalities"),
        ("imagesTr", lambda x: x[..., 0], "1 channels; there must be one for each of the 2 modalities"),
        ("imagesTr", lambda x: x[..., None], "has shape"),
        ("imagesTr", lambda x: np.where(x == x.max(), np.nan, x), "NaN or infinite"),
        ("imagesTr", lambda x: x * 0, "nothing but zeros"),
        ("labelsTr", lambda x: np.where(x == 2, 3, x).astype(np.uint8), "label value 3 has no"),
        ("labelsTr", lambda x: np.where(x == 2, 1.5, x), r"label value 1\.5 has no class"),
    ],
)
def test_volume_errors(folder, kind, change, words):
    rewrite(folder / kind / "synthetic_003.nii.gz", change)
    with pytest.raises(DataError, match=words) as error:
        check_all(folder)
    assert "synthetic_003" in str(error.value)


def test_label_on_another_grid(folder):
    path = folder / "labelsTr" / "synthetic_001.nii.gz"
    label = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), np.diag([2.0, 2, 2, 1])), path)
    with pytest.raises(DataError, match="its affine differs from its image's"):
        check_all(folder)


def write_case(folder, image, label, affine):
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, volume in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(volume, affine), path)
    return Case("case", paths[:1], paths[1])


def test_geometry_is_told_in_canonical_axes(tmp_path):
    # Array axes run superior, left, posterior, 2, 3 and 4 mm apart.
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    label = np.zeros((4, 5, 6), dtype=np.uint8)
    case = write_case(tmp_path, label.astype(np.float32) + 1, label, affine)
    geometry = check_case(Task("t", ("MRI",), {0: "background", 1: "a"}, (case,)), case)
    assert geometry.shape == (5, 6, 4)
    assert geometry.spacing == pytest.approx((3, 4, 2))


def test_split_is_seeded_disjoint_and_blind_to_order(original):
    cases = read_decathlon(original).cases
    cases = [Case(f"{i:02d}", case.images, case.label) for i in range(10) for case in cases[:1]]
    training, held_out = split_cases(cases, seed=0)
    assert len(training) == 8
    assert sorted(training + held_out, key=lambda case: case.name) == cases
    assert split_cases(cases[::-1], seed=0) == (training, held_out)
    assert split_cases(cases, seed=1) != (training, held_out)


def test_folds_hold_every_case_out_once(original):
    case = read_decathlon(original).cases[0]
    cases = [Case(f"{i:02d}", case.images, case.label) for i in range(12)]
    splits = [split_cases(cases, seed=0, fold=fold) for fold in range(5)]
    assert sorted(c.name for _, held_out in splits for c in held_out) == [c.name for c in cases]
    assert all(set(t) | set(h) == set(cases) for t, h in splits)
    with pytest.raises(DataError, match="fold: got 5 of 5 folds"):
        split_cases(cases, seed=0, fold=5)


def test_atomic_leaves_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def interrupted():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def save(path, shape=(4, 5, 6), affine=None, fill=1.0):
    voxels = np.full(shape, fill, dtype=np.float32)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def test_ways_to_name_cases(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c"):
        save(tmp_path / f"{name}.nii.gz")
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
    save(tmp_path / "a_0000.nii.gz")
    with_comma = save(tmp_path / "one, two.nii")
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


def test_modalities_in_several_files(tmp_path):
    affine = np.diag([1.0, 2, 3, 1])
    a, b = save(tmp_path / "a.nii", affine=affine), save(tmp_path / "b.nii", affine=affine, fill=2)
    found, image = check_image(Case("case", (a, b)), ("A", "B"))
    assert np.array_equal(found, affine)
    assert image.shape == (4, 5, 6, 2)
    assert image[..., 1].min() == 2
    other = save(tmp_path / "other.nii", affine=np.diag([1.0, 2, 3.1, 1]))
    with pytest.raises(DataError, match=r"other.nii: lies on another grid than .*a.nii"):
        check_image(Case("case", (a, other)), ("A", "B"))
    larger = save(tmp_path / "larger.nii", shape=(4, 5, 7), affine=affine)
    with pytest.raises(DataError, match=r"larger.nii: shape \(4, 5, 7\) does not match \(4, 5, 6\)"):
        check_image(Case("case", (a, larger)), ("A", "B"))
    with pytest.raises(DataError, match="2 channels; there must be one for each of the 3 modalities"):
        check_image(Case("case", (a, b)), ("A", "B", "C"))
    with pytest.raises(DataError, match=r"absent.nii: there is no such file"):
        check_image(Case("case", (a, tmp_path / "absent.nii")), ("A", "B"))


def test_volumes_that_are_no_images(tmp_path):
    header = bytearray(save(tmp_path / "a.nii").read_bytes())
    header[70:72] = (999).to_bytes(2, "little")  # no code of a data type
    (tmp_path / "code.nii").write_bytes(header)
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    colours = np.zeros((4, 5, 6), [(channel, "u1") for channel in "RGB"])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "colours.nii")
    for name, words in (("code", "999"), ("complex", "must be real"), ("colours", "must be real")):
        with pytest.raises(DataError, match=rf"{name}\.nii: .*{words}"):
            check_image(Case("case", (tmp_path / f"{name}.nii",)), ("A",))


def test_what_is_written_lies_on_the_grid_by_qform_and_by_sform(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.diag([2.0, 1, 3, 1]))
    image.set_qform(np.diag([-2.0, -1, 3, 1]), code=1)
    image.set_sform(np.diag([2.0, 1, 3, 1]), code=4)
    nib.save(image, tmp_path / "image.nii")
    write_nifti(np.ones((4, 5, 6), np.uint8), tmp_path / "image.nii", tmp_path / "label.nii.gz")
    label = nib.load(tmp_path / "label.nii.gz")
    for form in ("get_qform", "get_sform"):
        wanted, code = getattr(image, form)(coded=True)
        found, found_code = getattr(label, form)(coded=True)
        np.testing.assert_allclose(found, wanted)
        assert found_code == code


def test_synthetic_volumes_are_seeded_and_whole(original, tmp_path):
    def voxels(root):
        task = read_decathlon(root)
        return [np.asarray(nib.load(f).dataobj) for c in task.cases for f in (c.image, c.label)]

    wanted = voxels(original)
    same = voxels(write_synthetic(tmp_path / "same", cases=4, shape=(18, 18, 18), seed=0))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, same, strict=True))
    other = voxels(write_synthetic(tmp_path / "other", cases=4, shape=(18, 18, 18), seed=1))
    assert not any(np.array_equal(a, b) for a, b in zip(wanted, other, strict=True))
    labels = np.concatenate([volume.ravel() for volume in wanted[1::2]])
    assert set(np.unique(labels)) == {0, 1, 2}
    assert "SYNTHETIC" in json.loads((original / "dataset.json").read_text())["description"]
    assert math.isclose(np.mean(labels > 0), 0.04, abs_tol=0.035)
