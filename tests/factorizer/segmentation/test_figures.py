"""Which slice a figure shows."""

import numpy as np
import pytest

from factorizer.segmentation.figures import slice_scores


def test_slices_that_show_every_class_score_highest():
    labels = np.zeros((5, 6, 7), dtype=int)
    labels[:4, :4, 1] = 1  # 16 voxels of one class alone, and nothing of the other
    labels[2, 1:4, 2:5] = 1  # 9 beside 6
    labels[2, 4:, 2:5] = 2
    scores = slice_scores(labels, 2)
    assert [len(axis) for axis in scores] == [5, 6, 7]
    assert scores[0].argmax() == 2
    assert scores[0][2] == pytest.approx(np.sqrt(9 + 4) + np.sqrt(6))
    assert scores[2][1] == pytest.approx(4)
