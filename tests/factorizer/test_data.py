"""Decathlon folders: what is read from them, what is wrong with them, and the crops they give."""

import json
import math
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from factorizer.data import (
    Case,
    Crops,
    DataError,
    Geometry,
    Task,
    atomic,
    augmentation,
    check_case,
    preprocessing,
    read_decathlon,
    split_cases,
    training_volumes,
)
from factorizer.demo import write_synthetic

CROP = (16, 16, 16)


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
        assert check_case(task, case) == Geometry(box, (1.0, 1.0, 1.0))


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
    with pytest.raises(DataError, match="two training cases are called 'synthetic_001'"):
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
        ("imagesTr", lambda x: x[..., :1], "1 channels; dataset.json lists 2"),
        ("imagesTr", lambda x: x[..., 0], "1 channels; dataset.json lists 2"),
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
    return Case("case", *paths)


def test_geometry_is_told_in_canonical_axes(tmp_path):
    # Array axes run superior, left, posterior, 2, 3 and 4 mm apart.
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    label = np.zeros((4, 5, 6), dtype=np.uint8)
    case = write_case(tmp_path, label.astype(np.float32) + 1, label, affine)
    geometry = check_case(Task("t", ("MRI",), {0: "background", 1: "a"}, (case,)), case)
    assert geometry.shape == (5, 6, 4)
    assert geometry.spacing == pytest.approx((3, 4, 2))


def test_preprocessing(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    image = rng.gamma(2.0, 100, (4, 5, 6, 2)).astype(np.float32)
    image[0] = 0  # air, which is cut off
    image[2, 3, 4] = 0  # a hole, which the z-scores leave out
    label = rng.choice([0, 2, 5], (4, 5, 6)).astype(np.uint8)
    case = write_case(tmp_path, image, label, affine)
    before = preprocessing(("image", "label"), (3, 4, 2), (0, 2, 5))
    item = before({"image": str(case.image), "label": str(case.label)})
    # Right is minus the second array axis, anterior minus the third, superior the first.
    expected = image[1:, ::-1, ::-1].transpose(3, 1, 2, 0)
    voxels = expected != 0
    for channel, inside, got in zip(expected, voxels, item["image"].numpy(), strict=True):
        scores = (channel - channel[inside].mean()) / channel[inside].std()
        np.testing.assert_allclose(got, np.where(inside, scores, 0), atol=1e-5)
    classes = np.searchsorted([0, 2, 5], label[1:, ::-1, ::-1].transpose(1, 2, 0))
    np.testing.assert_array_equal(item["label"].numpy()[0], classes)


def test_split_is_seeded_disjoint_and_blind_to_order(original):
    cases = read_decathlon(original).cases
    cases = [Case(f"{i:02d}", case.image, case.label) for i in range(10) for case in cases[:1]]
    training, held_out = split_cases(cases, seed=0)
    assert len(training) == 8
    assert sorted(training + held_out, key=lambda case: case.name) == cases
    assert split_cases(cases[::-1], seed=0) == (training, held_out)
    assert split_cases(cases, seed=1) != (training, held_out)


@pytest.fixture(scope="module")
def volumes(original):
    task = read_decathlon(original)
    geometries = [check_case(task, case) for case in task.cases]
    return training_volumes(task.cases, geometries, 2, (1, 1, 1), list(task.labels), CROP)


def test_batches_are_a_function_of_seed_and_step(volumes):
    augment = augmentation(CROP, num_classes=3, sided=False)
    crops = Crops(volumes, augment, batch_size=2, seed=0)
    expected = [crops[step] for step in range(3)]
    for image, label in expected:
        assert image.shape == (2, 2, *CROP)
        assert label.shape == (2, 1, *CROP)
        assert type(image) is torch.Tensor
        assert image.dtype == torch.float32
        assert set(label.unique().tolist()) <= {0, 1, 2}
    again = Crops(volumes, augmentation(CROP, num_classes=3, sided=False), batch_size=2, seed=0)
    for step in (2, 0, 1):  # in any order, as after a resumption
        for got, wanted in zip(again[step], expected[step], strict=True):
            assert torch.equal(got, wanted)
    assert not torch.equal(Crops(volumes, augment, batch_size=2, seed=1)[0][0], expected[0][0])


def test_every_round_uses_every_volume():
    seen = []
    volumes = [{"index": i} for i in range(5)]

    class Augment:
        def set_random_state(self, seed):
            pass

        def __call__(self, volume):
            seen.append(volume["index"])
            return [{"image": torch.zeros(1), "label": torch.zeros(1)}]

    crops = Crops(volumes, Augment(), batch_size=2, seed=0)
    for step in range(5):
        crops[step]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen[:5] != seen[5:]


@pytest.mark.parametrize("sided", [False, True])
def test_sides_are_exchanged_unless_classes_are_sided(sided):
    # A ramp from left to right of one class: it runs backwards where the crop was flipped.
    image = torch.arange(16.0).view(1, 16, 1, 1).expand(1, *CROP).contiguous()
    label = torch.zeros(1, *CROP, dtype=torch.uint8)
    places = [torch.arange(16**3), torch.empty(0, dtype=torch.long)]
    volume = {"image": image, "label": label, "label_cls_indices": places}
    augment = augmentation(CROP, num_classes=2, sided=sided)
    crops = Crops([volume], augment, batch_size=1, seed=0)
    images = [crops[step][0] for step in range(40)]
    flipped = sum((x[:, :, -1] - x[:, :, 0]).mean().item() < 0 for x in images)
    # Of 40 fair coins fewer than 8 or more than 32 fall the same way once in 10 000 tries.
    assert flipped == 0 if sided else 8 <= flipped <= 32


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
