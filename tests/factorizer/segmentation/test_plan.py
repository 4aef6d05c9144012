"""From a task's volumes to a plan, and what a plan refuses."""

import json
from dataclasses import asdict

import pytest
from factorizer_support import plan_for, planned

from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.plan import Plan, plan_run
from factorizer.segmentation.recipe import RECIPE
from factorizer.segmentation.volumes import Geometry


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
