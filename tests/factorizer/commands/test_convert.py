"""Weights from elsewhere become checkpoints that segment as the network did that they are from."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from factorizer_support import plan_for, trainer_for
from typer.testing import CliRunner

from factorizer.commands.cli import app
from factorizer.layers import MatrixFactorization
from factorizer.models.paper_weights import PAPER_EPS
from factorizer.segmentation.checkpoint import load_network, read_checkpoint

BUNDLES = Path(__file__).parents[3] / "bundles"


def convert(*arguments, code=0):
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result.output + result.stderr


@pytest.fixture
def network():
    return trainer_for(plan_for()).network


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(asdict(plan_for())))
    return path


def in_the_names_of_the_paper(state):
    """Today's names undone: see the table of `factorizer.models.paper_weights`."""
    names = {}
    for name in state:
        level = re.match(r"(?:en|de)coder\.blocks\.\d+\.", name)
        if level is None:
            names[name] = name.replace("head.", "heads.0.")
            continue
        start, rest = level.group(), name[level.end() :]
        strided = f"{start}downsample.weight" in state
        if rest.startswith("block.blocks."):
            _, _, index, part, *rest = rest.split(".")
            place = {"norm1": "nmf.fn.0", "fact": "nmf.fn.1", "norm2": "mlp.fn.0", "mlp": "mlp.fn.1"}[part]
            names[name] = f"{start}blocks.{int(index) + strided}.blocks.{place}.{'.'.join(rest)}"
        elif rest.startswith("downsample."):
            names[name] = f"{start}blocks.0.{rest.removeprefix('downsample.')}"
        elif rest.startswith("block."):
            rest = rest.removeprefix("block.").replace("adapter.", "adapter.0.")
            names[name] = f"{start}blocks.{int(strided)}.{rest}"
        else:
            names[name] = name
    return {old: state[name] for name, old in names.items()}


@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
def test_names_of_today(network, plan, tmp_path, holder):
    state = {f"system.net.{name}": value for name, value in network.state_dict().items()}
    torch.save({holder: state, "epoch": 3} if holder else state, tmp_path / "weights.pt")
    out = tmp_path / "made.pt"
    assert "names as today" in convert(tmp_path / "weights.pt", "--output", out, "--plan", plan)
    loaded, its_plan = load_network(out)
    assert its_plan == plan_for(network={"num_deep_supr": 0})
    x = torch.randn(1, 2, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x), network.eval()(x))
    before = out.read_bytes()
    told = convert(tmp_path / "weights.pt", "--output", out, "--plan", plan, code=2)
    assert "is there already" in told
    assert out.read_bytes() == before


def test_names_of_the_paper(network, plan, tmp_path):
    torch.save(in_the_names_of_the_paper(network.state_dict()), tmp_path / "weights.pt")
    out = tmp_path / "made.pt"
    assert "time of the paper" in convert(tmp_path / "weights.pt", "--output", out, "--plan", plan)
    loaded, _ = load_network(out)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    parts = [part for part in loaded.modules() if isinstance(part, MatrixFactorization)]
    assert {solver.eps for part in parts for solver in part.solvers} == {PAPER_EPS}


def test_a_bundle_gives_the_plan(tmp_path):
    from factorizer.commands.bundle import bundle_plan
    from factorizer.models.build import build_network

    bundle = BUNDLES / "hippocampus_factorizer"
    wanted = bundle_plan(bundle)
    assert (wanted.training, wanted.modalities) == ((), ("MRI",))
    torch.save(build_network(wanted.network, 1).state_dict(), tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", "--output", tmp_path / "made.pt", "--bundle", bundle)
    assert read_checkpoint(tmp_path / "made.pt")[0] == wanted


def test_what_cannot_be_converted(network, plan, tmp_path):
    options = ["--output", tmp_path / "made.pt", "--plan"]
    (tmp_path / "text.pt").write_text("no tensors")
    assert "no file of tensors" in convert(tmp_path / "text.pt", *options, plan, code=2)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    assert "no network of this family" in convert(tmp_path / "other.pt", *options, plan, code=2)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    assert "not a plan" in convert(tmp_path / "weights.pt", *options, tmp_path / "text.pt", code=2)
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps(asdict(plan_for(network={"encoder_width": (8, 24)}))))
    unknown = tmp_path / "unknown.json"
    unknown.write_text(json.dumps(asdict(plan_for(network={"norm": "GroupNrom"}))))
    printed = convert(tmp_path / "weights.pt", *options, unknown, code=2)
    assert "unknown.json: its plan describes no network" in " ".join(printed.split())
    assert "weights do not fit" in convert(tmp_path / "weights.pt", *options, wide, code=2)
    assert "give one of them" in convert(tmp_path / "weights.pt", *options[:2], code=2)
    assert not (tmp_path / "made.pt").exists()


@pytest.mark.parametrize("solver", ["hals", ("hals", {"eps": 1e-8}), ("mu", {})])
def test_weights_of_the_paper_for_any_solver_of_a_plan(tmp_path, solver):
    wanted = plan_for(network={"solver": solver})
    (tmp_path / "plan.json").write_text(json.dumps(asdict(wanted)))
    state = trainer_for(wanted).network.state_dict()
    torch.save(in_the_names_of_the_paper(state), tmp_path / "weights.pt")
    convert(tmp_path / "weights.pt", "--output", tmp_path / "made.pt", "--plan", tmp_path / "plan.json")
    name = solver if isinstance(solver, str) else solver[0]
    assert load_network(tmp_path / "made.pt")[1].network["solver"] == (name, {"eps": PAPER_EPS})
