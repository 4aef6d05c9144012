"""The training loop, and the checkpoint it continues from."""

import itertools
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from factorizer_support import Batches, checkpoint_for, plan_for, planned, trainer_for
from monai.optimizers import WarmupCosineSchedule
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from factorizer.models.build import build_network
from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.recipe import Recipe
from factorizer.segmentation.training import (
    SegmentationLoss,
    Trainer,
    rate_factor,
    rehearse,
    start_from,
    steps_within,
)


def test_training_learns(tmp_path):
    plan = planned(steps=30)
    trainer = trainer_for(plan)
    trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    assert trainer.step == 30
    assert sum(trainer.losses[-3:]) < 0.5 * sum(trainer.losses[:3])


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.SAVE_EVERY", 2)
    plan = planned(steps=6)
    unbroken = trainer_for(plan)
    unbroken.run(Batches(plan), tmp_path / "unbroken.pt", lambda step: None)

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    path = tmp_path / "stopped.pt"
    with pytest.raises(KeyboardInterrupt):
        trainer_for(plan).run(Batches(plan), path, stop)
    resumed, batches = trainer_for(plan), Batches(plan)
    assert read_checkpoint(path)[0] == plan
    resumed.resume(path)
    assert resumed.step == 4
    resumed.run(batches, path, lambda step: None)
    assert batches.asked == [4, 5]
    # The same operations in the same order; the tolerance is for sums that threads split
    # differently from run to run, a few roundings of float32 over two steps.
    torch.testing.assert_close(resumed.losses, unbroken.losses, rtol=1e-5, atol=1e-6)
    for name, value in unbroken.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_the_measured_step_counts_its_crops(monkeypatch):
    plan, now = planned(steps=1), [0.0]

    def wait(seconds):
        now[0] += seconds

    class Slow(Batches):
        def __getitem__(self, step):
            wait(0.5 if step == 3 else 0.0)  # one of five that are measured
            return super().__getitem__(step)

    module = "factorizer.segmentation.training."
    monkeypatch.setattr(module + "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(module + "training_volumes", lambda *_: [])
    monkeypatch.setattr(module + "CropBatches", lambda plan, _: Slow(plan))
    monkeypatch.setattr(module + "_cores", lambda: 4)
    monkeypatch.setattr(Trainer, "update", lambda *_: wait(0.05))
    for workers, seconds in ((0, 0.15), (1, 0.1), (4, 0.05)):
        found = rehearse(Console(quiet=True), plan, [], {}, workers=workers)[1]
        assert found == pytest.approx(seconds)
    assert [steps_within("quick", seconds) for seconds in (0.15, 1e9, 1e-9)] == [2000, 300, 250_000]


def test_the_result_is_the_mean_of_the_weights(tmp_path):
    plan = planned(steps=30)
    plan = replace(plan, recipe=replace(plan.recipe, averaging=0.6))
    trainer, batches = trainer_for(plan), Batches(plan)
    mean = None
    for step in range(30):
        trainer.update(*batches[step])
        trainer.schedule.step()
        trainer.losses.append(0.0)
        now = {name: value.clone() for name, value in trainer.network.state_dict().items()}
        if mean is None:  # the mean of one is the one
            mean = now
        else:
            weight = max(0.4, 9 / (10 + step))
            mean = {name: value + weight * (now[name] - value) for name, value in mean.items()}
    result = trainer.result.state_dict()
    assert not all(torch.equal(result[name], now[name]) for name in now)
    for name, value in mean.items():
        torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)
    trainer.save(tmp_path / "checkpoint.pt")
    state = read_checkpoint(tmp_path / "checkpoint.pt")[1]
    for name, value in now.items():
        assert torch.equal(state["network"][name], result[name])  # what readers of a checkpoint get
        assert torch.equal(state["iterate"][name], value)


def test_learning_rate():
    recipe = Recipe(warm_up=0.1, first_rate=0.2, decay=0.5)
    rates = [rate_factor(step, 100, recipe) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[5] == pytest.approx(0.6)
    assert set(rates[10:51]) == {1.0}
    assert rates[75] == pytest.approx(0.5)
    assert rates[100] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[50:]))


def test_learning_rate_of_the_former_recipe_is_that_of_monai():
    recipe, optimizer = Recipe(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupCosineSchedule(optimizer, warmup_steps=5, t_total=100, warmup_multiplier=0.1)
    for step in range(100):
        assert rate_factor(step, 100, recipe) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_start_from_copies_what_fits(tmp_path):
    source = trainer_for(planned(steps=1))
    source.save(tmp_path / "source.pt")
    plan = planned(steps=1, labels={0: "background", 1: "a", 2: "b"})
    network = build_network(plan.network, seed=1)
    heads = {name: value.clone() for name, value in network.state_dict().items() if "heads" in name}
    copied, others = start_from(network, tmp_path / "source.pt")
    assert others == len(heads) > 0
    assert copied + others == len(network.state_dict())
    for name, value in network.state_dict().items():
        assert torch.equal(value, heads.get(name, source.network.state_dict().get(name)))


def test_start_from_refuses_a_network_of_which_nothing_fits(tmp_path):
    trainer_for(planned(steps=1)).save(tmp_path / "source.pt")
    with pytest.raises(DataError, match="none of its weights fits"):
        start_from(nn.Linear(3, 3), tmp_path / "source.pt")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    plan = planned(steps=3)
    trainer = trainer_for(plan)
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1; its crops are of the cases case of step 0"):
        trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_slow_steps_are_saved_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.SAVE_SECONDS", 0.0)
    plan, path = plan_for(steps=4), tmp_path / "checkpoint.pt"

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_for(plan).run(Batches(plan), path, stop)
    assert len(read_checkpoint(path)[1]["losses"]) == 3


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    trainer, path = trainer_for(plan_for(steps=2)), tmp_path / "checkpoint.pt"
    trainer.save(path)
    before = path.read_bytes()

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr("factorizer.segmentation.files.torch.save", full)
    with pytest.raises(OSError, match=r"checkpoint.pt: cannot be written"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_regions_are_learnt_under_their_own_sigmoids():
    labels, regions = {0: "b", 1: "edema", 2: "core"}, {"TC": (2,), "WT": (1, 2)}
    plan = plan_for(labels=labels, regions=regions)
    classes = torch.tensor([0.0, 1, 2]).view(1, 1, 3)
    masks = plan.masks(classes)
    assert masks.tolist() == [[[0, 0, 1], [0, 1, 1]]]
    loss, right = SegmentationLoss(plan), 40 * (masks - 0.5)
    assert loss(right, classes) < 1e-3
    # Two regions at once are no contradiction, as they would be under a softmax.
    assert loss(-right, classes) > 10
    assert plan.decide(right[0]).tolist() == [0, 1, 2]
    # An inner region wins over an outer one that has not been found.
    assert plan.decide(torch.tensor([[5.0], [-5.0]])).tolist() == [2]


NUMBERS = {"squared_dice": False, "dice_smoothing": 1.0, "head_weight": 0.1, "betas": (0.5, 0.6)}
NUMBERS |= {"adam_eps": 1.0, "warm_up": 0.9, "first_rate": 0.9, "clip_norm": 1e-3}


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_of_loss_and_optimiser_is_the_recipes(number):
    def trained(**recipe):
        depths = {"encoder_depth": (1,) * 3, "encoder_width": (8,) * 3, "decoder_depth": (1, 1)}
        network = {**depths, "strides": (1, 2, 2), "num_deep_supr": 2}
        plan = plan_for(network=network, steps=3, recipe=recipe)
        trainer, batches = trainer_for(plan), Batches(plan)
        for step in range(2):
            trainer.update(*batches[step])
            trainer.schedule.step()
        return torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])

    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(**{number: NUMBERS[number]}), trained())


CHANGES = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 + 0.01, str: lambda x: "zeros"}


def test_a_run_of_another_recipe_is_not_continued(tmp_path):
    path = checkpoint_for(plan_for(), tmp_path / "checkpoint.pt")
    for number, value in asdict(Recipe()).items():
        change = CHANGES.get(type(value), lambda pair: (pair[0] / 2, pair[1]))
        trainer = trainer_for(plan_for(recipe={number: change(value)}))
        with pytest.raises(DataError, match=rf"belongs to a run with recipe.{number} = "):
            trainer.resume(path)
    trainer_for(plan_for()).resume(path)


def test_a_run_whose_outputs_are_in_another_order_is_not_continued(tmp_path):
    regions = {"WT": (1, 2), "ET": (2,)}
    path = checkpoint_for(plan_for(regions=regions), tmp_path / "checkpoint.pt")
    turned = plan_for(regions=dict(reversed(regions.items())))
    with pytest.raises(DataError, match=r"belongs to a run with regions = .*, in another order"):
        trainer_for(turned).resume(path)
    trainer_for(plan_for(regions=regions)).resume(path)


def test_a_run_of_version_0_1_0_is_continued_by_the_recipe_of_then(tmp_path):
    plan, path = plan_for(steps=2), tmp_path / "checkpoint.pt"
    trainer_for(plan).save(path)
    state = torch.load(path, weights_only=True)
    del state["plan"]["recipe"]
    state["plan"]["window"] = None
    torch.save(state, path)
    trainer = trainer_for(plan)
    trainer.resume(path)
    with pytest.raises(DataError, match=r"recipe.noise_std = 0.1, this one has 0.2"):
        trainer_for(plan_for(steps=2, recipe={"noise_std": 0.2})).resume(path)


def test_deep_supervision_weights():
    plan = plan_for()
    classes = torch.randint(3, (2, 1, 8, 8, 8)).float()
    fine, coarse = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 4, 4, 4)
    loss = SegmentationLoss(plan)
    small = torch.nn.functional.interpolate(classes, size=(4, 4, 4), mode="nearest-exact")
    expected = (2 * loss(fine, classes) + loss(coarse, small)) / 3
    assert torch.isclose(loss([fine, coarse], classes), expected)


def test_training_stops_on_a_plateau_and_keeps_the_best(tmp_path):
    plan = plan_for(steps=20)
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    options = {"validate": lambda network: next(scores), "validate_every": 2, "patience": 2}
    trainer = trainer_for(plan, **options)
    trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    assert trainer.step == 8
    assert trainer.finished
    assert len(read_checkpoint(tmp_path / "checkpoint.pt")[1]["losses"]) == 8
    resumed = trainer_for(plan, **options)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.finished
    # The fourth validation is as good as the second: the newer of the two is kept.
    assert len(read_checkpoint(tmp_path / "best.pt")[1]["losses"]) == 8


def test_a_run_killed_while_it_writes_the_best_network_still_keeps_it(tmp_path, monkeypatch):
    plan, options = plan_for(steps=4), {"validate": lambda network: 0.5, "validate_every": 2}
    path, save, written = tmp_path / "checkpoint.pt", Trainer.save, []

    def killed(trainer, path):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        save(trainer, path)

    monkeypatch.setattr(Trainer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer_for(plan, **options).run(Batches(plan), path, lambda step: None)
    resumed = trainer_for(plan, **options)
    if path.exists():
        resumed.resume(path)
    resumed.run(Batches(plan), path, lambda step: None)
    assert [step for step, _ in resumed.scores] == [2, 4]
    assert written.count(tmp_path / "best.pt") == 3  # after steps 2, again 2, and 4


def test_tensorboard_has_each_step_once_after_a_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.SAVE_EVERY", 2)
    plan = plan_for(steps=4)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        trainer_for(plan, log=tmp_path / "log").run(Batches(plan), path, stop)
    resumed = trainer_for(plan, log=tmp_path / "log")
    resumed.resume(path)
    resumed.run(Batches(plan), path, lambda step: None)
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(resumed.losses)
