"""From a task's volumes to a plan, and what a plan refuses."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from factorizer_support import plan_for, planned

from factorizer.models.build import build_network
from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.plan import Plan, Wishes, plan_run
from factorizer.segmentation.recipe import RECIPE
from factorizer.segmentation.survey import Geometry


@pytest.mark.parametrize(
    ("shape", "crop"),
    [
        ((35, 50, 36), (36, 52, 36)),  # the next multiples of 4
        ((40, 48, 40), (40, 48, 40)),
        ((5, 8, 24), (8, 8, 24)),
        ((240, 240, 155), (64, 64, 64)),  # never more than 64^3 voxels
        ((320, 320, 20), (112, 116, 20)),
    ],
)
def test_crop(shape, crop):
    assert planned(shape).crop == crop


def test_crop_is_planned_at_the_median_spacing():
    assert planned((48, 48, 24), (1.0, 1.0, 3.0)).spacing == (1.0, 1.0, 3.0)
    members = tuple(Case(str(i), ()) for i in range(3))
    task = Task("task", ("A",), {0: "background", 1: "a"}, members)
    spacings = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)]
    geometries = {str(i): Geometry((32, 32, 32), spacing) for i, spacing in enumerate(spacings)}
    plan = plan_run(task, geometries, members[:2], members[2:])
    assert plan.spacing == (2.0, 1.0, 1.0)
    assert plan.crop == (32, 32, 32)


@pytest.mark.parametrize(
    ("names", "sided"),
    [(("hippocampus",), False), (("Left kidney", "right kidney"), True)],
)
def test_sided(names, sided):
    labels = {0: "background", **dict(enumerate(names, 1))}
    assert planned(labels=labels).flips == (() if sided else (0,))


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch-size: got 0"),
        ({"rank": 0}, "rank: got 0"),
        ({"learning_rate": 0.0}, "learning-rate: got 0"),
        ({"learning_rate": math.nan}, "learning-rate: got nan"),
        ({"crop": (32, 32)}, "crop: got 32,32"),
        ({"crop": (32, 32, 4)}, "voxels from 8"),
        ({"spacing": (1.0, 1.0, 0.0)}, "spacing: got 1,1,0"),
        ({"spacing": (1.0, 1.0, math.nan)}, "spacing: got 1,1,nan"),
        ({"network": "unet"}, "one of swin, local, global"),
        ({"width": (24, 50)}, "multiples of 8"),
        ({"width": (24,)}, "2 to 8 numbers"),
        ({"flips": (0, 3)}, "flips: got 0,3"),
        ({"flips": (0, 0)}, "flips: got 0,0"),
    ],
)
def test_wishes_that_no_run_can_have(wishes, words):
    with pytest.raises(DataError, match=words):
        Wishes(**wishes)


def test_wishes_stand_in_place_of_the_data():
    wishes = {
        "steps": 7,
        "batch_size": 3,
        "learning_rate": 1e-3,
        "crop": (24, 16, 8),
        "spacing": (2.0, 2.0, 2.0),
        "rank": 2,
        "width": (8, 16),
        "flips": (0, 2),
    }
    plan = planned(**wishes, labels={0: "background", 1: "left lung", 2: "right lung"})
    for name in ("steps", "batch_size", "learning_rate", "crop", "spacing", "flips"):
        assert getattr(plan, name) == wishes[name]
    assert plan.network["rank"] == 2
    assert plan.network["encoder_width"] == (8, 16)
    assert plan.network["spatial_size"] == (24, 16, 8)
    assert plan.notes == ("flips: left and right are exchanged: as was asked for",)
    shifted, local, whole = (planned(network=name, width=(8, 16)) for name in ("swin", "local", "global"))
    assert shifted.network["reshape"][1]["shifts"] == (None, 2)
    assert local.network["reshape"] == ("Matricize", {"head_dim": 8, "patch_size": 4})
    assert whole.network["reshape"] == ("Matricize", {"head_dim": 8, "grid_size": 1})
    for plan in (shifted, local, whole):
        build_network(plan.network, 0)


def test_half_the_grid():
    """The stem halves what the first level below would halve, and windows are cut on the coarser grid."""
    plain, half = planned(spacing=(1.0, 1.0, 4.0)), planned(spacing=(1.0, 1.0, 4.0), half_grid=True)
    assert "stem_stride" not in plain.network
    assert half.network["stem_stride"] == (2, 2, 1)
    assert half.network["strides"] == (1, (2, 2, 1), 2)
    assert half.network["reshape"][1]["patch_size"] == (4, 4, 2)
    build_network(half.network, 0)
    isotropic = planned((35, 50, 36), half_grid=True)
    assert isotropic.network["stem_stride"] == 2
    assert isotropic.crop == (36, 52, 36)  # as without: multiples of 8 are not asked for


@pytest.mark.parametrize(
    ("options", "budget", "device", "half"),
    [
        ({}, "quick", "cpu", True),
        ({"width": (32, 64, 128)}, "quick", "cpu", True),
        ({}, "standard", "cpu", False),
        ({"steps": 400}, "quick", "cpu", None),
        ({"half_grid": False}, "quick", "cpu", False),
        ({"half_grid": True, "steps": 400}, "standard", "cpu", True),
        ({}, "quick", "cuda", None),
    ],
)
def test_a_short_training_takes_half_the_grid(options, budget, device, half):
    assert Wishes(**options).within(budget, torch.device(device)).half_grid is half


def test_every_channel_has_its_own_window():
    members = tuple(Case(str(i), ()) for i in range(4))
    task = Task("task", ("CT", "PET", "CTA"), {0: "background", 1: "a"}, members)
    windows = [((-100.0 - i, 200.0), (0.0, 9.0), (50.0, 400.0 + i)) for i in range(4)]
    geometries = {str(i): Geometry((32,) * 3, (1.0,) * 3, window) for i, window in enumerate(windows)}
    plan = plan_run(task, geometries, members[:3], members[3:])
    assert plan.window == ((-101.0, 200.0), None, (50.0, 401.0))
    geometries = {str(i): Geometry((32,) * 3, (1.0,) * 3, (None,) * 3) for i in range(4)}
    with pytest.raises(DataError, match=r"no training case has labelled voxels.*CT has no window"):
        plan_run(task, geometries, members[:3], members[3:])


def test_steps_follow_the_data_within_bounds():
    few, some, many = (planned((32, 32, 32), cases=n).steps for n in (4, 120, 5000))
    assert few < some < many
    assert planned((32, 32, 32), cases=10_000).steps == many
    assert planned(steps=7).steps == 7


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ({"a": (1,), "b": (1,)}, "'a' unites"),
        ({"a": (1, 2)}, "'a' unites"),
        ({"a": (7,)}, "'a' unites"),
        ({"a": (0,)}, "'a' unites"),
    ],
)
def test_region_errors(regions, words):
    with pytest.raises(DataError, match=words):
        plan_for(regions=regions)


def test_a_plan_survives_json():
    plan = plan_for(
        regions={"core": (2,), "whole": (1, 2)},
        window=(-100.0, 300.0),
        recipe={"noise_std": 0.2},
        flips=(0, 2),
    )
    assert Plan(**json.loads(json.dumps(asdict(plan)))) == plan


def test_a_plan_of_version_0_1_0_is_read():
    plan = plan_for(window=(-100.0, 300.0), seed=3)
    content = asdict(plan)
    for field in ("recipe", "notes", "data", "resample"):
        del content[field]
    content["window"] = (-100.0, 300.0)  # one for all channels
    assert Plan(**content) == plan
    assert plan.window == ((-100.0, 300.0),) * 2
    del content["window"]
    assert Plan(**content).window == (None, None)
    with pytest.raises(DataError, match=r"window must be None or \(low, high\) for each of the 2 modalities"):
        plan_for(window=(None, (3.0, 2.0)))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"noise_prob": 1.5}, r"noise_prob must lie in \[0, 1\], got 1.5"),
        ({"padding": "no"}, "padding must be"),
    ],
)
def test_recipe_errors(recipe, words):
    with pytest.raises(DataError, match=words):
        plan_for(recipe=recipe)


def test_new_plans_have_the_recipe_of_today():
    assert planned().recipe == RECIPE


def test_channels_of_a_plan_must_fit():
    with pytest.raises(DataError, match=r"network\['in_channels'\] must be 2, got 3"):
        plan_for(network={"in_channels": 3})
