"""nnU-Net's trainer: what it does to nnU-Net's own, with a stand-in for that; and nnU-Net's own commands."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from factorizer.nnunet.network import Switched, head_scales, network_arguments
from factorizer.segmentation.recipe import LEARNING_RATE

NAME = "nnUNetTrainerFactorizer"


class StandIn:
    """What our trainer takes from nnU-Net's."""

    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        self.configuration_manager = plans
        self.initial_lr, self.weight_decay = 1e-2, 3e-5
        self.num_epochs, self.is_ddp, self.enable_deep_supervision = 20, False, True


def folder():
    """The folder that the command prints, as nnU-Net's users take it."""
    done = subprocess.run(
        [sys.executable, "-m", "factorizer.nnunet"], text=True, capture_output=True, check=True
    )
    return Path(done.stdout.strip())


@pytest.fixture
def trainer_class(monkeypatch):
    """Our class, from a file of its name, as nnU-Net finds it, on top of the stand-in."""
    home = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    for name in (home.rsplit(".", n)[0] for n in (3, 2, 1)):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, home, module := ModuleType(home))
    module.nnUNetTrainer = StandIn
    spec = importlib.util.spec_from_file_location(NAME, folder() / f"{NAME}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, NAME)


CONFIGURATIONS = pytest.mark.parametrize(
    ("patch", "spacing"),
    [
        ((16, 24, 16), (1, 1, 1)),
        ((5, 24, 20), (6.0, 1.0, 1.1)),
        ((56, 40), (1.0, 1.0)),
        ((13, 9), (1, 1)),
    ],
    ids=["3d", "thick slices", "2d", "odd"],
)


@CONFIGURATIONS
def test_trains_on_the_plans_patch(trainer_class, patch, spacing):
    """Every head has the size that nnU-Net scales the labels to, and steps make the loss less."""
    torch.manual_seed(0)
    trainer = trainer_class(SimpleNamespace(patch_size=patch, spacing=spacing), "any", 0, {})
    trainer.network = trainer.build_network_architecture(None, trainer.configuration_manager, 2, 3)
    scales = trainer._get_deep_supervision_scales()
    optimizer, schedule = trainer.configure_optimizers()
    schedule.step(2)
    assert optimizer.param_groups[0]["lr"] == LEARNING_RATE
    x = torch.randn(1, 2, *patch)
    classes = (x[:, 0] > 0).long()
    losses = []
    for _ in range(6):
        logits = trainer.network(x)
        # as nnU-Net's DownsampleSegForDSTransform sizes them
        assert [list(y.shape) for y in logits] == [
            [1, 3, *(round(n * s) for n, s in zip(patch, scale, strict=True))] for scale in scales
        ]
        losses.append(torch.nn.functional.cross_entropy(logits[0], classes))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_predicts_with_the_weights_of_training(trainer_class):
    manager = SimpleNamespace(patch_size=(16, 16, 8), spacing=(1, 1, 1))
    trained, predicting = (
        trainer_class.build_network_architecture(None, manager, 1, 2, supervised)
        for supervised in (True, False)
    )
    predicting.load_state_dict(trained.state_dict())
    x = torch.randn(1, 1, 16, 16, 8)
    assert torch.equal(predicting(x), trained(x)[0])
    trainer = trainer_class(manager, "any", 0, {})
    trainer.network = trained
    trainer.set_deep_supervision_enabled(False)
    assert torch.equal(trained(x), predicting(x))
    trainer.network = SimpleNamespace(_orig_mod=trained)  # what torch.compile makes of it
    trainer.set_deep_supervision_enabled(True)
    assert len(trained(x)) == 3
    trainer.enable_deep_supervision = False
    assert trainer._get_deep_supervision_scales() is None


def test_learning_rate_by_epochs(trainer_class):
    trainer = trainer_class(SimpleNamespace(), "any", 0, {})
    trainer.network = torch.nn.Linear(1, 1)
    optimizer, schedule = trainer.configure_optimizers()
    rates = []
    for epoch in range(20):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"] / LEARNING_RATE)
    assert rates[0] == pytest.approx(0.1)
    assert rates[1:13] == [1.0] * 12
    assert all(a > b > 0 for a, b in pairwise(rates[12:]))


def test_networks_follow_the_voxels():
    thick = network_arguments((12, 64, 64), (5.0, 1.0, 1.0), 1, 2)
    assert thick["strides"] == (1, (1, 2, 2), (1, 2, 2))
    assert head_scales(thick) == [[1, 1, 1], [1, 0.5, 0.5], [1, 0.25, 0.25]]
    assert len(Switched(thick, True)(torch.randn(1, 1, 12, 64, 64))) == 3


RAW = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "numTraining": 5}
SHORT = f"""
import torch
from factorizer.nnunet.trainers.{NAME} import {NAME}


class {NAME}Short({NAME}):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 20, 1
"""


@pytest.mark.skipif(importlib.util.find_spec("nnunetv2") is None, reason="nnunetv2 is not installed")
@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_in_nnunets_own_commands(tmp_path, configuration):
    """Planned, trained for 40 steps and predicted with by nnU-Net: a bright ball is found."""
    raw = tmp_path / "raw/Dataset001_Ball"
    rng = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr"):
        (raw / sub).mkdir(parents=True)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"))
    for case in range(5):
        ball = ((grid - rng.integers(8, 16, (3, 1, 1, 1))) ** 2).sum(0) < 36
        image = rng.normal(size=ball.shape) * 0.2 + ball
        for place, data in (
            (f"imagesTr/case{case}_0000", image.astype("f4")),
            (f"labelsTr/case{case}", ball.astype("u1")),
        ):
            nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), raw / f"{place}.nii.gz")
    (raw / "dataset.json").write_text(json.dumps({**RAW, "file_ending": ".nii.gz"}))
    (tmp_path / "short").mkdir()
    (tmp_path / "short/short.py").write_text(SHORT)
    variables = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    variables["nnUNet_extTrainer"] = os.pathsep.join([str(folder()), str(tmp_path / "short")])
    variables |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}

    def nnunet(command, *arguments):
        program = shutil.which(f"nnUNetv2_{command}", path=str(Path(sys.executable).parent))
        done = subprocess.run(
            [program, *arguments],
            env={**os.environ, **variables},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout

    nnunet("plan_and_preprocess", "-d", "1", "-c", configuration, "-np", "1", "-npfp", "1")
    nnunet("train", "1", configuration, "0", "-tr", f"{NAME}Short", "-device", "cpu")
    settings = ("-d", "1", "-c", configuration, "-f", "0", "-tr", f"{NAME}Short", "-device", "cpu")
    nnunet("predict", "-i", raw / "imagesTr", "-o", tmp_path / "out", *settings, "-npp", "1", "-nps", "1")
    for case in range(5):
        found, truth = (
            nibabel.load(path / f"case{case}.nii.gz").get_fdata() > 0
            for path in (tmp_path / "out", raw / "labelsTr")
        )
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.8
