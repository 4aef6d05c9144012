"""Special values under the Triton kernels, interpreted: see ../../test_special_values.py."""

import pytest
from tests_support import SPECIAL, check_special, check_spoiled_voxel

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, of NaN and inf


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 1), ("hals", 2)])
def test_special_windows(name, solver, rank):
    check_special("triton", name, solver, rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 2)])
def test_spoiled_voxel(value, solver, rank):
    check_spoiled_voxel("triton", value, solver, rank)
