"""Which classes are bound to a side: by their names, or by where they lie."""

import numpy as np
import pytest

from factorizer.segmentation.sides import mirrored_axes
from factorizer.segmentation.survey import Geometry


def geometries(*sides):
    return [Geometry((20, 20, 20), (1.0, 1.0, 1.0), sides=dict(enumerate(case, 1))) for case in sides]


def flips(names, *sides):
    return mirrored_axes({0: "background", **dict(enumerate(names, 1))}, geometries(*sides))[0]


@pytest.mark.parametrize(
    "names",
    [
        ("left hippocampus", "right hippocampus"),
        ("L_hippocampus", "R_hippocampus"),
        ("hippocampus.L", "hippocampus.R"),
        ("lh amygdala", "rh amygdala"),
        ("LeftKidney", "RightKidney"),
        ("lThalamus", "rThalamus"),
        ("lthalamus", "rthalamus"),
        ("ThalamusL", "ThalamusR"),
        ("kidney_lt", "kidney_rt"),
        ("Niere links", "Niere rechts"),
        ("rein gauche", "rein droit"),
        ("riñón izquierdo", "riñón derecho"),
        ("putamen sin", "putamen dex"),
        ("left atrium",),
        ("tumour", "left kidney"),
    ],
)
def test_names_of_sides(names):
    assert flips(names) == ()


@pytest.mark.parametrize(
    "names",
    [
        ("bright lesion", "dark lesion"),
        ("upright", "leftover"),
        ("lesion",),
        ("L1", "L2"),
        ("liver", "spleen"),
        ("anterior", "posterior"),
        ("lesion", "organ"),
        ("ring", "line"),
        ("T1 bright", "R2 star"),
    ],
)
def test_names_of_no_side(names):
    assert flips(names) == (0,)


LEFT, RIGHT, MIDDLE = (-0.8, -0.3), (0.25, 0.7), (-0.2, 0.3)


def test_the_masks_decide_where_names_do_not():
    names = ("nucleus A", "nucleus B")
    assert flips(names, *[(LEFT, RIGHT)] * 10) == ()
    assert flips(names, *[(RIGHT, LEFT)] * 9, (LEFT, RIGHT)) == ()
    assert flips(names, *[(LEFT, RIGHT)] * 5, *[(RIGHT, LEFT)] * 5) == (0,)
    assert flips(names, *[(MIDDLE, (-0.1, 0.2))] * 10) == (0,)
    assert flips(names, *[((0.1, 0.3), (0.6, 0.9))] * 6) == ()  # the volume's middle is not the body's
    assert flips(("nucleus",), *[(LEFT,)] * 8) == ()
    assert flips(("nucleus",), *[(LEFT,)] * 5, *[(RIGHT,)] * 3) == (0,)
    assert flips(("nucleus",), *[(LEFT,)] * 3) == (0,)  # three of a kind are no rule
    reason = mirrored_axes({0: "background", 1: "a", 2: "b"}, geometries(*[(LEFT, RIGHT)] * 10))[1]
    assert reason == "'a' and 'b' lie on different sides in 10 of 10 cases"


def test_lesions_anywhere_keep_their_mirror_images():
    """Two kinds of lesion at random places, in few cases: hardly ever taken for sides."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        middles = rng.uniform(-0.8, 0.8, (6, 2))
        cases = [tuple((m - 0.15, m + 0.15) for m in case) for case in middles]
        wrong += flips(("bright lesion", "dark lesion"), *cases) == ()
    assert wrong < 40
