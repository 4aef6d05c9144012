"""What the tests of the commands share."""

import pytest
from factorizer_support import MODALITIES, REGIONS, TUMOUR, checkpoint_for, plan_for


@pytest.fixture(scope="session")
def tumour(tmp_path_factory):
    """Checkpoint of an untrained network for four modalities and three nested regions."""
    plan = plan_for(MODALITIES, TUMOUR, REGIONS, {"num_deep_supr": 1}, flips=(0, 1))
    return checkpoint_for(plan, tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt")
