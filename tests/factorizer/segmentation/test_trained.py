"""Model files, and the models that have names."""

import os

import pytest
import torch
from factorizer_support import checkpoint_for, plan_for, trainer_for
from rich.console import Console

from factorizer.commands.models import export
from factorizer.segmentation.checkpoint import load_network, read_first
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.inference import load_predictor
from factorizer.segmentation.trained import (
    SHIPPED,
    TrainedModel,
    find_model,
    import_model,
    known_models,
    load_model,
    own_folder,
    save_model,
)


@pytest.fixture(autouse=True)
def own_models(tmp_path, monkeypatch):
    monkeypatch.setenv("FACTORIZER_MODELS", str(tmp_path / "models"))


def member(seed):
    plan = plan_for(seed=seed)
    return trainer_for(plan).network.eval(), plan


def test_a_model_file_holds_an_ensemble_in_half_precision(tmp_path):
    members = (member(0), member(1))
    model = TrainedModel(members, mirror=True, largest_component=("halo",), card="# Two\n")
    save_model(model, tmp_path / "two.pt")
    found = load_model(tmp_path / "two.pt")
    assert (found.mirror, found.largest_component, found.card) == (True, ("halo",), "# Two\n")
    for (network, plan), (was, was_plan) in zip(found.members, members, strict=True):
        assert plan == was_plan
        assert not network.training
        for name, value in network.state_dict().items():
            assert value.dtype == was.state_dict()[name].dtype  # computed in float32 as before
            torch.testing.assert_close(value, was.state_dict()[name], rtol=2**-11, atol=2**-24)
    predictor = load_predictor([tmp_path / "two.pt"])
    assert len(predictor.models) == 2
    assert predictor.mirror
    assert predictor.largest_component == ("halo",)
    assert not load_predictor([tmp_path / "two.pt"], mirror=False).mirror
    with pytest.raises(DataError, match="holds 2 networks"):
        load_network(tmp_path / "two.pt")
    plan, state = read_first(tmp_path / "two.pt")
    assert plan == members[0][1]
    assert state["network"].keys() == members[0][0].state_dict().keys()


def test_a_checkpoint_is_a_model_of_one_member(tmp_path):
    checkpoint_for(plan_for(), tmp_path / "checkpoint.pt")
    model = load_model(tmp_path / "checkpoint.pt")
    assert len(model.members) == 1
    assert (model.mirror, model.largest_component, model.card) == (False, (), "")


def test_export_import_find(tmp_path):
    checkpoints = [checkpoint_for(plan_for(seed=seed), tmp_path / f"{seed}.pt") for seed in (0, 1)]
    (tmp_path / "card.md").write_text("# Mine\n")
    export(Console(quiet=True), checkpoints, tmp_path / "mine.pt", card=tmp_path / "card.md")
    target = import_model(tmp_path / "mine.pt")
    assert target == own_folder() / "mine.pt" == find_model("mine")
    assert load_model(target).card == "# Mine\n"
    assert [network.state_dict().keys() for network, _ in load_model(target).members]
    with pytest.raises(DataError, match="is there already"):
        import_model(tmp_path / "mine.pt")
    assert import_model(tmp_path / "mine.pt", "other").stem == "other"
    assert {"mine", "other"} <= known_models().keys()
    with pytest.raises(DataError, match=r"model: got 'another'; there are .*mine"):
        find_model("another")


def test_a_user_without_a_home_has_the_shipped_models_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("FACTORIZER_MODELS")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does for a user without a name
    monkeypatch.chdir(tmp_path)
    assert known_models() == {path.stem: path for path in sorted(SHIPPED.glob("*.pt"))}
    with pytest.raises(DataError, match=r"model: .* this user has no home; set FACTORIZER_MODELS"):
        import_model(checkpoint_for(plan_for(), tmp_path / "mine.pt"))
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["", "../up", "a b", ".hidden"])
def test_names_that_are_no_file_names_are_refused(name, tmp_path):
    path = checkpoint_for(plan_for(), tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match="name: got"):
        import_model(path, name)
    assert not own_folder().exists()


def test_export_refuses_networks_that_do_not_segment_the_same(tmp_path):
    first = checkpoint_for(plan_for(), tmp_path / "a.pt")
    second = checkpoint_for(plan_for(modalities=("A", "C")), tmp_path / "b.pt")
    with pytest.raises(DataError, match="modalities"):
        export(Console(quiet=True), [first, second], tmp_path / "both.pt")
    assert not (tmp_path / "both.pt").exists()


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save({"members": []}, tmp_path / "empty.pt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="not a model file"):
        load_model(tmp_path / "empty.pt")
    with pytest.raises(DataError, match="not a checkpoint"):
        load_model(tmp_path / "other.pt")
    with pytest.raises(DataError, match=r"there is no .*absent.pt"):
        import_model(tmp_path / "absent.pt")


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.pt")), ids=lambda path: path.stem)
def test_shipped_models_load_and_have_a_card(path):
    model = load_model(path)
    assert path.stat().st_size < 5e6
    for heading in ("## Data", "## Licence", "## Recipe", "## Scores", "## Not for"):
        assert heading in model.card
