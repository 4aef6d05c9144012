"""Times of things side by side."""

import sys
import time

import torch

from factorizer.segmentation.measure import peak_memory, side_by_side


def test_side_by_side_interleaves_and_takes_medians():
    calls = []
    times = side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, 3
    )
    assert calls == ["a", "b"] * 4
    assert 10 <= times["b"] < 100
    assert times["a"] < times["b"]


def test_peak_memory_where_the_system_says_it(monkeypatch):
    peak = peak_memory(torch.device("cpu"))
    assert peak is not None
    assert 50e6 < peak < 1e12
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert peak_memory(torch.device("cpu")) is None
