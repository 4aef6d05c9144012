"""Times of things side by side."""

import time

from factorizer.segmentation.measure import side_by_side


def test_side_by_side_interleaves_and_takes_medians():
    calls = []
    times = side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, 3
    )
    assert calls == ["a", "b"] * 4
    assert 10 <= times["b"] < 100
    assert times["a"] < times["b"]
