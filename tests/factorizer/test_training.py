"""Plans, the training loop, and the checkpoint it continues from."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from factorizer_support import plan_for as tiny_plan
from factorizer_support import trainer_for as tiny_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from factorizer.models.build import build_network
from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.plan import Plan, plan_run
from factorizer.segmentation.training import SegmentationLoss, Trainer
from factorizer.segmentation.volumes import Geometry


def plan_for(shape=(16, 16, 16), spacing=(1.0, 1.0, 1.0), cases=10, labels=None, **options):
    members = tuple(Case(f"case_{i}", ()) for i in range(cases))
    task = Task("task", ("A", "B"), labels or {0: "background", 3: "lesion"}, members)
    geometries = {case.name: Geometry(shape, spacing) for case in members}
    return plan_run(task, geometries, members[:-2], members[-2:], **options)


class Batches:
    """Batches that are a function of the step, and a trace of the steps asked for."""

    def __init__(self, plan):
        self.plan, self.asked = plan, []

    def __getitem__(self, step):
        self.asked.append(step)
        generator = torch.Generator().manual_seed(step)
        image = torch.randn(2, len(self.plan.modalities), *self.plan.crop, generator=generator)
        return image, (image[:, :1] > 0.5).float()


def trainer_for(plan):
    return Trainer(plan, build_network(plan.network, plan.seed))


@pytest.mark.parametrize(
    ("shape", "crop"),
    [
        ((35, 50, 36), (32, 48, 32)),  # the nearest multiples of 16
        ((40, 48, 40), (32, 48, 32)),
        ((5, 8, 24), (16, 16, 32)),  # never less than one
        ((240, 240, 155), (64, 64, 64)),  # never more than 64^3 voxels
        ((320, 320, 20), (128, 128, 16)),
    ],
)
def test_crop(shape, crop):
    assert plan_for(shape).crop == crop


def test_crop_is_planned_at_the_median_spacing():
    assert plan_for((48, 48, 24), (1.0, 1.0, 3.0)).spacing == (1.0, 1.0, 3.0)
    members = tuple(Case(str(i), ()) for i in range(3))
    task = Task("task", ("A",), {0: "background", 1: "a"}, members)
    spacings = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)]
    geometries = {str(i): Geometry((32, 32, 32), spacing) for i, spacing in enumerate(spacings)}
    plan = plan_run(task, geometries, members[:2], members[2:])
    assert plan.spacing == (2.0, 1.0, 1.0)
    assert plan.crop == (32, 32, 32)


@pytest.mark.parametrize(
    ("names", "sided"),
    [(("hippocampus",), False), (("Left kidney", "right kidney"), True)],
)
def test_sided(names, sided):
    labels = {0: "background", **dict(enumerate(names, 1))}
    assert plan_for(labels=labels).flips == (() if sided else (0,))


def test_steps_follow_the_data_within_bounds():
    few, some, many = (plan_for((32, 32, 32), cases=n).steps for n in (4, 120, 5000))
    assert few < some < many
    assert plan_for((32, 32, 32), cases=10_000).steps == many
    assert plan_for(steps=7).steps == 7


def test_network_is_a_function_of_the_seed():
    plan = plan_for()
    state = torch.get_rng_state()
    first, second = (build_network(plan.network, 0).state_dict() for _ in range(2))
    other = build_network(plan.network, 1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_training_learns(tmp_path):
    plan = plan_for(steps=30)
    trainer = trainer_for(plan)
    trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    assert trainer.step == 30
    assert sum(trainer.losses[-3:]) < 0.5 * sum(trainer.losses[:3])


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.SAVE_EVERY", 2)
    plan = plan_for(steps=6)
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


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    plan = plan_for(steps=3)
    trainer = trainer_for(plan)
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_checkpoint_holds_plain_data_only(tmp_path):
    plan = plan_for(steps=1)
    trainer = trainer_for(plan)
    trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["plan"] == asdict(plan)
    assert len(state["losses"]) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.pt"]


def test_slow_steps_are_saved_by_the_clock(tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.SAVE_SECONDS", 0.0)
    plan, path = tiny_plan(steps=4), tmp_path / "checkpoint.pt"

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(plan).run(Batches(plan), path, stop)
    assert len(read_checkpoint(path)[1]["losses"]) == 3


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    trainer, path = tiny_trainer(tiny_plan(steps=2)), tmp_path / "checkpoint.pt"
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


def test_read_checkpoint_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    plan = asdict(replace(plan_for(), steps=1))
    torch.save({"plan": {**plan, "colour": "red"}}, tmp_path / "newer.pt")
    for name in ("text.pt", "other.pt", "newer.pt"):
        with pytest.raises(DataError, match=rf"{name}: not a checkpoint"):
            read_checkpoint(tmp_path / name)


def test_regions_are_learnt_under_their_own_sigmoids():
    labels, regions = {0: "b", 1: "edema", 2: "core"}, {"TC": (2,), "WT": (1, 2)}
    plan = tiny_plan(labels=labels, regions=regions)
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


def test_deep_supervision_weights():
    plan = tiny_plan()
    classes = torch.randint(3, (2, 1, 8, 8, 8)).float()
    fine, coarse = torch.randn(2, 3, 8, 8, 8), torch.randn(2, 3, 4, 4, 4)
    loss = SegmentationLoss(plan)
    small = torch.nn.functional.interpolate(classes, size=(4, 4, 4), mode="nearest-exact")
    expected = (2 * loss(fine, classes) + loss(coarse, small)) / 3
    assert torch.isclose(loss([fine, coarse], classes), expected)


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ({"a": (1,), "b": (1,)}, "'a' unites"),
        ({"a": (1, 2)}, "'a' unites"),
        ({"a": (7,)}, "'a' unites"),
        ({"a": (0,)}, "'a' unites"),
    ],
)
def test_region_errors(regions, words):
    with pytest.raises(DataError, match=words):
        tiny_plan(regions=regions)


def test_a_plan_survives_json():
    plan = tiny_plan(regions={"core": (2,), "whole": (1, 2)}, window=(-100.0, 300.0), flips=(0, 2))
    assert Plan(**json.loads(json.dumps(asdict(plan)))) == plan


def test_channels_of_a_plan_must_fit():
    with pytest.raises(DataError, match=r"network\['in_channels'\] must be 2, got 3"):
        tiny_plan(network={"in_channels": 3})


def test_an_unknown_part_is_named():
    with pytest.raises(DataError, match="norm is 'GroupNrom', no class"):
        build_network(tiny_plan(network={"norm": "GroupNrom"}).network, 0)


def test_training_stops_on_a_plateau_and_keeps_the_best(tmp_path):
    plan = tiny_plan(steps=20)
    scores = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    options = {"validate": lambda network: next(scores), "validate_every": 2, "patience": 2}
    trainer = tiny_trainer(plan, **options)
    trainer.run(Batches(plan), tmp_path / "checkpoint.pt", lambda step: None)
    assert trainer.step == 8
    assert trainer.finished
    assert len(read_checkpoint(tmp_path / "checkpoint.pt")[1]["losses"]) == 8
    resumed = tiny_trainer(plan, **options)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.finished
    # The fourth validation is as good as the second: the newer of the two is kept.
    assert len(read_checkpoint(tmp_path / "best.pt")[1]["losses"]) == 8


def test_a_run_killed_while_it_writes_the_best_network_still_keeps_it(tmp_path, monkeypatch):
    plan, options = tiny_plan(steps=4), {"validate": lambda network: 0.5, "validate_every": 2}
    path, save, written = tmp_path / "checkpoint.pt", Trainer.save, []

    def killed(trainer, path):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        save(trainer, path)

    monkeypatch.setattr(Trainer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(plan, **options).run(Batches(plan), path, lambda step: None)
    resumed = tiny_trainer(plan, **options)
    if path.exists():
        resumed.resume(path)
    resumed.run(Batches(plan), path, lambda step: None)
    assert [step for step, _ in resumed.scores] == [2, 4]
    assert written.count(tmp_path / "best.pt") == 3  # after steps 2, again 2, and 4


def test_tensorboard_has_each_step_once_after_a_resumption(tmp_path, monkeypatch):
    monkeypatch.setattr("factorizer.segmentation.training.SAVE_EVERY", 2)
    plan = tiny_plan(steps=4)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        tiny_trainer(plan, log=tmp_path / "log").run(Batches(plan), path, stop)
    resumed = tiny_trainer(plan, log=tmp_path / "log")
    resumed.resume(path)
    resumed.run(Batches(plan), path, lambda step: None)
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(resumed.losses)
