"""Volumes as the network sees them, and the crops that training draws from them."""

import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import plan_for

from factorizer.commands.demo import write_synthetic
from factorizer.segmentation.cases import Case, read_decathlon
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.transforms import Crops, augmentation, files_of, preprocessing, training_volumes
from factorizer.segmentation.volumes import check_case

CROP = (16, 16, 16)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("data"), cases=4, shape=(18, 18, 18))


def test_preprocessing(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    image = rng.gamma(2.0, 100, (4, 5, 6, 2)).astype(np.float32)
    image[0] = 0  # air, which is cut off
    image[2, 3, 4] = 0  # a hole, which the z-scores leave out
    label = rng.choice([0, 2, 5], (4, 5, 6)).astype(np.uint8)
    for name, volume in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / f"{name}.nii")
    case = Case("case", (tmp_path / "image.nii",), tmp_path / "label.nii")
    plan = plan_for(labels={0: "background", 2: "a", 5: "b"}, spacing=(3, 4, 2))
    item = preprocessing(plan, ("image", "label"))(files_of(case))
    # Right is minus the second array axis, anterior minus the third, superior the first.
    expected = image[1:, ::-1, ::-1].transpose(3, 1, 2, 0)
    voxels = expected != 0
    for channel, inside, got in zip(expected, voxels, item["image"].numpy(), strict=True):
        scores = (channel - channel[inside].mean()) / channel[inside].std()
        np.testing.assert_allclose(got, np.where(inside, scores, 0), atol=1e-5)
    classes = np.searchsorted([0, 2, 5], label[1:, ::-1, ::-1].transpose(1, 2, 0))
    np.testing.assert_array_equal(item["label"].numpy()[0], classes)


@pytest.fixture(scope="module")
def volumes(original):
    task = read_decathlon(original)
    geometries = {case.name: check_case(task, case) for case in task.cases}
    return training_volumes(plan_for(), task.cases, geometries)


def test_volumes_are_kept_until_what_they_depend_on_changes(original, tmp_path):
    data = shutil.copytree(original, tmp_path / "data")
    cases, cache = read_decathlon(data).cases, tmp_path / "cache"
    volumes = training_volumes(plan_for(), cases, cache=cache)
    first = volumes[0]
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    again = training_volumes(plan_for(), cases, cache=cache)[0]
    assert all(torch.equal(again[key], first[key]) for key in ("image", "label"))
    assert kept.stat().st_mtime_ns == before
    coarse = training_volumes(plan_for(spacing=(2.0, 2.0, 2.0)), cases, cache=cache)[0]
    assert coarse["image"].sum() != first["image"].sum()
    cases[0].image.write_bytes(cases[0].image.read_bytes()[:1000])
    with pytest.raises(DataError, match=rf"{cases[0].image.name}: not readable"):
        volumes[0]
    assert len(list(cache.iterdir())) == 2


def test_batches_are_a_function_of_seed_and_step(volumes):
    augment = augmentation(plan_for())
    crops = Crops(volumes, augment, batch_size=2, seed=0)
    expected = [crops[step] for step in range(3)]
    for image, label in expected:
        assert image.shape == (2, 2, *CROP)
        assert label.shape == (2, 1, *CROP)
        assert type(image) is torch.Tensor
        assert image.dtype == torch.float32
        assert set(label.unique().tolist()) <= {0, 1, 2}
    again = Crops(volumes, augmentation(plan_for()), batch_size=2, seed=0)
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


@pytest.mark.parametrize("flips", [(0,), ()])
def test_axes_are_flipped_as_planned(flips):
    # A ramp from left to right of one class: it runs backwards where the crop was flipped.
    image = torch.arange(16.0).view(1, 16, 1, 1).expand(1, *CROP).contiguous()
    label = torch.zeros(1, *CROP, dtype=torch.uint8)
    places = [torch.arange(16**3), torch.empty(0, dtype=torch.long)]
    volume = {"image": image, "label": label, "label_cls_indices": places}
    plan = plan_for(modalities=("A",), labels={0: "background", 1: "a"}, flips=flips)
    augment = augmentation(plan)
    crops = Crops([volume], augment, batch_size=1, seed=0)
    images = [crops[step][0] for step in range(40)]
    flipped = sum((x[:, :, -1] - x[:, :, 0]).mean().item() < 0 for x in images)
    # Of 40 fair coins fewer than 8 or more than 32 fall the same way once in 10 000 tries.
    assert 8 <= flipped <= 32 if flips else flipped == 0


def test_processes_share_every_batch(volumes):
    def crops(**share):
        return Crops(volumes, augmentation(plan_for()), batch_size=4, seed=0, **share)

    whole = crops()[3]
    parts = [crops(part=part, parts=2)[3] for part in range(2)]
    for together, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.stack(shares, dim=1).flatten(0, 1))
    with pytest.raises(ValueError, match="multiple of the 3 processes"):
        crops(part=0, parts=3)


def test_a_window_clips_and_scales(tmp_path):
    image = np.linspace(-1000, 1000, 60, dtype=np.float32).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii")
    plan = plan_for(modalities=("CT",), window=(-100.0, 300.0))
    item = preprocessing(plan, ("image",))(files_of(Case("case", (tmp_path / "image.nii",))))
    expected = np.clip((image + 100) / 200 - 1, -1, 1)
    np.testing.assert_allclose(item["image"].numpy()[0], expected, atol=1e-6)
