"""Networks from plain data."""

import pytest
import torch
from factorizer_support import plan_for, planned

from factorizer.models.build import build_network


def test_network_is_a_function_of_the_seed():
    plan = planned()
    state = torch.get_rng_state()
    first, second = (build_network(plan.network, 0).state_dict() for _ in range(2))
    other = build_network(plan.network, 1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match=r"norm must name a class .* got 'GroupNrom'"):
        build_network(plan_for(network={"norm": "GroupNrom"}).network, 0)
