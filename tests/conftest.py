"""What the tests share: the golden cases, the usable backends, and outputs poisoned with NaN."""

import json
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import factorizer_kernels as fk

# Where a test does not say how many: --hypothesis-profile=nightly is what `make nightly` runs.
hypothesis.settings.register_profile("default", max_examples=200, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=10_000, deadline=None)
hypothesis.settings.load_profile("default")

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


def pytest_generate_tests(metafunc):
    """``golden`` runs a test for every case of the kind named by the marker ``golden_kind``."""
    marker = metafunc.definition.get_closest_marker("golden_kind")
    if marker is None:
        return
    files = sorted(GOLDEN.glob(f"{marker.args[0]}_*.npz"))
    if not files:
        skip = pytest.mark.skip(reason=f"the golden cases are not at {GOLDEN}")
        metafunc.parametrize("golden", [pytest.param(None, marks=skip)])
        return
    metafunc.parametrize("golden", files, ids=lambda path: path.stem, indirect=True)


@pytest.fixture
def golden(request):
    """One golden case: its ``meta`` and its arrays as float64 tensors."""
    with np.load(request.param) as arrays:
        case = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "meta"}
        return case | {"meta": json.loads(str(arrays["meta"]))}


CPU_BACKENDS = [b.name for b in fk.backends() if b.available and b.name in ("reference", "cpu")]


@pytest.fixture(params=CPU_BACKENDS)
def backend(request):
    """Runs the test under every backend that serves CPU tensors."""
    with fk.use_backend(request.param):
        yield request.param


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs are NaN until a kernel writes them, so that what it leaves out is seen."""
    for owner, name in (
        (torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"), (torch, "empty_like"),
    ):  # fmt: skip
        original = getattr(owner, name)

        def filled(*args, original=original, **kwargs):
            return original(*args, **kwargs).fill_(float("nan"))

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def rel():
    """Relative L2 distance of a result from what is expected, in float64."""

    def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
        result, expected = result.detach().double(), expected.detach().double()
        assert result.shape == expected.shape
        norm = expected.norm()
        return ((result - expected).norm() / norm if norm > 0 else (result - expected).norm()).item()

    return distance
