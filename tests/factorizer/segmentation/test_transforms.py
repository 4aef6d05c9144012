"""Volumes as the network sees them, and the crops that training draws from them."""

import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import plan_for
from monai.data import MetaTensor
from monai.transforms import Invertd

from factorizer.segmentation.cases import Case, read_decathlon
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.recipe import RECIPE
from factorizer.segmentation.survey import check_case
from factorizer.segmentation.transforms import (
    CropBatches,
    PreparedCase,
    augmentation,
    files_of,
    preprocessing,
    training_volumes,
)

CROP = (16, 16, 16)


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
def volumes(synthetic):
    task = read_decathlon(synthetic)
    geometries = {case.name: check_case(task, case) for case in task.cases}
    return training_volumes(plan_for(), task.cases, geometries)


def test_volumes_are_kept_until_what_they_depend_on_changes(synthetic, tmp_path):
    data = shutil.copytree(synthetic, tmp_path / "data")
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


def test_batches_are_a_function_of_plan_and_step(volumes):
    batches = CropBatches(plan_for(), volumes)
    expected = [batches[step] for step in range(3)]
    for image, label in expected:
        assert image.shape == (2, 2, *CROP)
        assert label.shape == (2, 1, *CROP)
        assert type(image) is torch.Tensor
        assert image.dtype == torch.float32
        assert set(label.unique().tolist()) <= {0, 1, 2}
    again = CropBatches(plan_for(), volumes)
    for step in (2, 0, 1):  # in any order, as after a resumption
        for got, wanted in zip(again[step], expected[step], strict=True):
            assert torch.equal(got, wanted)
    assert not torch.equal(CropBatches(plan_for(seed=1), volumes)[0][0], expected[0][0])


NUMBERS = {"rotation": 45, "scaling": 0.5, "padding": "zeros", "noise_std": 1.0, "scale": 0.9, "shift": 0.9}
NUMBERS |= {"gamma": (3, 4), "balanced": False, "affine_prob": 0, "noise_prob": 0, "scale_prob": 0}
NUMBERS |= {"shift_prob": 0, "gamma_prob": 0, "flip_prob": 0, "blur_prob": 1}


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_of_the_augmentation_is_the_recipes(volumes, number):
    always = {f"{name}_prob": 1 for name in ("affine", "flip", "noise", "scale", "shift", "gamma")}

    def crop(**changes):
        plan = plan_for(batch_size=4, flips=(0,), recipe={**always, **changes})
        return CropBatches(plan, volumes)[0][0]

    assert torch.equal(crop(), crop())
    assert not torch.equal(crop(**{number: NUMBERS[number]}), crop())


def test_middles_are_drawn_from_as_many_voxels_as_the_recipe_says(synthetic):
    task = read_decathlon(synthetic)
    geometries = {case.name: check_case(task, case) for case in task.cases}
    few = training_volumes(plan_for(recipe={"class_voxels": 5}), task.cases, geometries)[0]
    assert max(map(len, few["label_cls_indices"])) == 5


def ball(size, radius=6.0):
    """A soft ball as image (1, X, Y, Z), and the labels of its inside."""
    places = torch.stack(torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in size), indexing="ij"))
    image = torch.sigmoid(3 * (radius - places.norm(dim=0)))[None]
    return image, (image > 0.5).to(torch.uint8)


def middle(mass):
    places = torch.stack(torch.meshgrid(*map(torch.arange, mass.shape), indexing="ij")).double()
    return (places * mass.double()).sum((1, 2, 3)) / mass.double().sum()


@pytest.mark.parametrize("change", ["affine_prob", "zoom_prob", "low_resolution_prob", "flip_prob"])
def test_image_and_label_stay_where_the_other_is(change):
    size = (36, 44, 32)
    recipe = replace(RECIPE, **{name: 0.0 for name in vars(RECIPE) if name.endswith("_prob")})
    plan = plan_for(("A",), crop=size, flips=(0, 1, 2), recipe=replace(recipe, **{change: 1.0}))
    image, label = ball(size)
    augment = augmentation(plan)
    shifts = []
    for seed in range(20):
        augment.set_random_state(seed)
        drawn = augment({"image": image, "label": label})
        drawn = drawn[0] if isinstance(drawn, list) else drawn
        shifts.append(middle(drawn["image"][0]) - middle(drawn["label"][0]))
    moved = torch.stack(shifts)
    assert moved.mean(0).abs().max() < 0.06  # 0.4 and 0.65 voxels where the voxel below is taken
    assert moved.abs().max() < 0.5


def test_thick_slices_are_turned_in_their_plane():
    size = (40, 40, 12)
    quiet = {name: 0.0 for name in vars(RECIPE) if name.endswith("_prob")} | {"affine_prob": 1.0}
    image = torch.zeros(1, *size)
    image[..., 5:7] = 1
    for in_plane, stays in ((RECIPE.in_plane, True), (0.0, False)):
        plan = plan_for(("A",), crop=size, recipe=replace(RECIPE, **quiet, in_plane=in_plane))
        augment = augmentation(plan)
        augment.set_random_state(3)
        drawn = augment({"image": image, "label": image.to(torch.uint8)})
        drawn = drawn[0] if isinstance(drawn, list) else drawn
        assert (float(drawn["image"][..., [2, 9]].abs().max()) < 1e-5) == stays


def test_long_volumes_are_turned_about_their_length():
    """About another axis most of such a crop would become zeros."""
    quiet = {name: 0.0 for name in vars(RECIPE) if name.endswith("_prob")} | {"affine_prob": 1.0}
    image = torch.ones(1, 16, 16, 160)
    augment = augmentation(plan_for(("A",), crop=(16, 16, 160), recipe=replace(RECIPE, **quiet)))
    kept = []
    for seed in range(10):
        augment.set_random_state(seed)
        drawn = augment({"image": image, "label": image.to(torch.uint8)})
        drawn = drawn[0] if isinstance(drawn, list) else drawn
        kept.append(float(drawn["image"].mean()))
    assert 0.8 < min(kept) < max(kept)  # about the others a third at least


def test_one_slice_is_not_made_smaller():
    crop = (12, 12, 1)
    quiet = {name: 0.0 for name in vars(RECIPE) if name.endswith("_prob")} | {"zoom_prob": 1.0}
    augment = augmentation(plan_for(("A",), crop=crop, recipe=replace(RECIPE, **quiet)))
    image = torch.rand(1, *crop)
    for seed in range(20):
        augment.set_random_state(seed)
        drawn = augment({"image": image, "label": (image > 0.5).to(torch.uint8)})
        drawn = drawn[0] if isinstance(drawn, list) else drawn
        assert drawn["image"].shape == (1, *crop)


def test_blur_changes_the_image_alone(volumes):
    plain, blurred = (CropBatches(plan_for(recipe={"blur_prob": p}), volumes)[0] for p in (0, 1))
    assert plain[0].shape == blurred[0].shape
    wide = CropBatches(plan_for(recipe={"blur_prob": 1, "blur_sigma": (2.0, 2.0)}), volumes)[0]
    assert not torch.equal(blurred[0], wide[0])


def test_every_round_uses_every_volume():
    seen = []
    volumes = [{"index": i} for i in range(5)]

    class Augment:
        def set_random_state(self, seed):
            pass

        def __call__(self, volume):
            seen.append(volume["index"])
            return [{"image": torch.zeros(1), "label": torch.zeros(1)}]

    batches = CropBatches(plan_for(), volumes)
    batches.augment = Augment()
    for step in range(5):
        batches[step]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert seen[:5] != seen[5:]


@pytest.mark.parametrize("flips", [(0,), ()])
def test_axes_are_flipped_as_planned(flips):
    # A ramp from left to right of one class: it runs backwards where the crop was flipped.
    image = torch.arange(16.0).view(1, 16, 1, 1).expand(1, *CROP).contiguous()
    label = torch.zeros(1, *CROP, dtype=torch.uint8)
    places = [torch.arange(16**3), torch.empty(0, dtype=torch.long)]
    volume = {"image": image, "label": label, "label_cls_indices": places}
    plan = plan_for(modalities=("A",), labels={0: "background", 1: "a"}, flips=flips, batch_size=1)
    batches = CropBatches(plan, [volume])
    images = [batches[step][0] for step in range(40)]
    flipped = sum((x[:, :, -1] - x[:, :, 0]).mean().item() < 0 for x in images)
    # Of 40 fair coins fewer than 8 or more than 32 fall the same way once in 10 000 tries.
    assert 8 <= flipped <= 32 if flips else flipped == 0


def test_processes_share_every_batch(volumes, monkeypatch):
    def batches(index=0, processes=1):
        monkeypatch.setattr("factorizer.segmentation.transforms.group_position", lambda: (index, processes))
        return CropBatches(plan_for(batch_size=4), volumes)

    whole = batches()[3]
    parts = [batches(index, 2)[3] for index in range(2)]
    for together, *shares in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.stack(shares, dim=1).flatten(0, 1))
    with pytest.raises(DataError, match="multiple of the 3 processes"):
        batches(0, 3)


def test_labels_are_taken_to_the_networks_grid_as_preprocessing_takes_them(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    image = rng.gamma(2.0, 100, (7, 8, 9)).astype(np.float32)
    image[:2], image[:, -1] = 0, 0  # air, which is cut off
    label = np.kron(rng.choice([0, 2, 5], (4, 4, 5)), np.ones((2, 2, 2)))[:7, :8, :9].astype(np.uint8)
    for name, volume in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / f"{name}.nii")
    case = Case("case", (tmp_path / "image.nii",), tmp_path / "label.nii")
    for spacing in ((3, 4, 2), (1.4, 1.9, 1.3)):  # no voxel lies half-way between two
        plan = plan_for(modalities=("A",), labels={0: "background", 2: "a", 5: "b"}, spacing=spacing)
        item = preprocessing(plan, ("image", "label"))(files_of(case))
        prepared = PreparedCase(plan, case)
        assert torch.equal(prepared.image, item["image"].as_tensor())
        np.testing.assert_array_equal(prepared.class_indices(label), item["label"].numpy()[0])


def test_a_window_clips_and_scales(tmp_path):
    image = np.linspace(-1000, 1000, 60, dtype=np.float32).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii")
    plan = plan_for(modalities=("CT",), window=(-100.0, 300.0))
    item = preprocessing(plan, ("image",))(files_of(Case("case", (tmp_path / "image.nii",))))
    expected = np.clip((image + 100) / 200 - 1, -1, 1)
    np.testing.assert_allclose(item["image"].numpy()[0], expected, atol=1e-6)


TURNED = np.array([[0.955, -0.29, 0.06], [0.295, 0.937, -0.19], [0, 0.199, 0.98]]) @ np.diag([-1.2, 0.8, 2.5])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.7, 0.8, 2.3)])
@pytest.mark.parametrize("axes", [np.diag([-1.0, -1, 1]), np.eye(3)[[2, 0, 1]] * (1, -1, 1.3), TURNED])
def test_the_own_grid_is_reached_as_monai_inverts_the_preprocessing(tmp_path, spacing, axes):
    rng, affine = np.random.default_rng(0), np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, (5, -3, 8)
    image = rng.gamma(2, 100, (13, 8, 11)).astype(np.float32)
    image[:6], image[:, :, -2:] = 0, 0  # whole slabs are cut off
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii")
    prepared = PreparedCase(
        plan_for(modalities=("A",), spacing=spacing), Case("case", (tmp_path / "image.nii",))
    )
    values = torch.randn(3, *prepared.image.shape[1:])
    inverse = Invertd("values", transform=prepared._preprocess, orig_keys="image", nearest_interp=False)
    expected = inverse({**prepared._item, "values": MetaTensor(values)})["values"].as_tensor()
    torch.testing.assert_close(prepared.to_own_grid(values), expected, rtol=0, atol=1e-5)
    grid = prepared.own_grid
    for axis in range(3):  # slab by slab, from the planes that each needs
        own, slabs = grid.along(axis), []
        for begin in range(0, grid.shape[own], 3):
            first, last = grid.planes(own, begin, begin + 3, axis, values.shape[axis + 1])
            planes = values.narrow(axis + 1, first, last - first)
            slabs.append(grid.bring(planes, own, begin, begin + 3, axis, first))
        assert torch.equal(torch.cat(slabs, own + 1), prepared.to_own_grid(values))
