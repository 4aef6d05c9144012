"""Grids whose voxels are longer than wide: spacing, strides, windows and crop."""

import math

import numpy as np
import pytest
import torch
from factorizer_support import planned

from factorizer.models.build import build_network
from factorizer.segmentation.anisotropy import strides_for, target_spacing, window_for


@pytest.mark.parametrize(
    ("spacing", "strides", "window"),
    [
        ((1.0, 1.0, 1.0), (1, 2, 2), 4),
        ((1.0, 1.0, 1.9), (1, 2, 2), 4),
        ((1.7, 1.7, 5.0), (1, (2, 2, 1), 2), (4, 4, 2)),
        ((0.45, 0.45, 5.0), (1, (2, 2, 1), (2, 2, 1)), (4, 4, 1)),
        ((3.0, 1.0, 1.0), (1, (1, 2, 2), 2), (2, 4, 4)),
        ((0.05, 0.05, 0.05), (1, 2, 2), 4),
    ],
)
def test_strides_and_windows_follow_the_spacing(spacing, strides, window):
    assert strides_for(spacing, (1, 2, 2)) == strides
    assert window_for(spacing, 4) == window


def test_the_plan_says_it_and_its_network_runs():
    plan = planned((120, 120, 30), (1.7, 1.7, 5.0))
    assert plan.network["strides"] == (1, (2, 2, 1), 2)
    assert plan.network["reshape"][1] == {"head_dim": 8, "patch_size": (4, 4, 2), "shifts": (None, (2, 2, 1))}
    extent = np.array(plan.crop) * plan.spacing
    assert extent.max() < 1.6 * extent.min()
    assert math.prod(plan.crop) <= 64**3
    assert any("2.9 times as long along bottom-top" in note and "4 x 4 x 2" in note for note in plan.notes)
    network = build_network(plan.network, 0)
    y = network(torch.randn(1, 2, 16, 16, 8))
    assert (y if isinstance(y, torch.Tensor) else y[0]).shape == (1, 2, 16, 16, 8)
    assert len(planned((40, 40, 40)).notes) == 1  # about mirror images


def test_a_global_network_is_told_no_window():
    """It has one, the whole map, whatever the voxels."""
    notes = planned((120, 120, 30), (1.7, 1.7, 5.0), network="global").notes
    assert any("2.9 times as long" in note and "4 x 4 x 2 times" in note for note in notes), notes
    assert not any("windows" in note for note in notes)


def test_spacing_of_strongly_anisotropic_tasks():
    """Thick slices, few of them: a tenth of the volumes are as fine, or finer, along that axis."""
    spacings = np.array([(0.7, 0.7, z) for z in np.linspace(3, 7, 11)])
    thick = np.full((11, 3), (512, 512, 25))
    np.testing.assert_allclose(target_spacing(spacings, thick), (0.7, 0.7, 3.4))
    np.testing.assert_allclose(target_spacing(spacings, np.full((11, 3), 200)), (0.7, 0.7, 5))
    np.testing.assert_allclose(target_spacing(spacings * [1, 1, 0.3], thick), (0.7, 0.7, 1.5))
