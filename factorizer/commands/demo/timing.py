"""The Factorizer's speed beside the reference backend's and a convolutional network's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from monai.networks.nets import SegResNet
from torch import nn

import factorizer_kernels as fk
from factorizer.layers.resize import Padded
from factorizer.models.build import build_network, parameter_count
from factorizer.segmentation.measure import side_by_side
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.training import Trainer

FORWARD_ROUNDS, STEP_ROUNDS = 7, 5


@dataclass(frozen=True)
class Speed:
    """Medians of the forward of one crop and of one training step."""

    name: str
    parameters: int
    forward_ms: float
    training_step_ms: float


def kernel_backend() -> str:
    """The backend that the operators choose for tensors on the CPU."""
    return next((b.name for b in fk.backends() if b.name == "cpu" and b.available), "reference")


def time_networks(plan: Plan) -> list[Speed]:
    """Times of the plan's network: with its fused kernels where there are some, on the reference
    backend, and of a SegResNet of like size, all side by side with fresh weights."""
    factorizer = Trainer(plan, build_network(plan.network, plan.seed))
    convolutions = Trainer(plan, like_segresnet(factorizer.network, plan))
    contenders = {"Factorizer, reference": ("reference", factorizer)}
    if (backend := kernel_backend()) != "reference":
        contenders = {f"Factorizer, fused ({backend})": (backend, factorizer), **contenders}
    contenders["SegResNet (MONAI)"] = ("reference", convolutions)  # it calls no operator of ours

    generator = torch.Generator().manual_seed(plan.seed)
    shape = (plan.batch_size, len(plan.modalities), *plan.crop)
    image = torch.randn(shape, generator=generator)
    label = torch.randint(len(plan.labels), (plan.batch_size, 1, *plan.crop), generator=generator).float()

    def forward(backend: str, trainer: Trainer) -> None:
        trainer.network.eval()
        with torch.no_grad(), fk.use_backend(backend):
            trainer.network(image[:1])

    def step(backend: str, trainer: Trainer) -> None:
        with fk.use_backend(backend):
            trainer.update(image, label)

    forwards = side_by_side(
        {name: partial(forward, *pair) for name, pair in contenders.items()}, FORWARD_ROUNDS
    )
    steps = side_by_side({name: partial(step, *pair) for name, pair in contenders.items()}, STEP_ROUNDS)
    return [
        Speed(name, parameter_count(trainer.network), forwards[name], steps[name])
        for name, (_, trainer) in contenders.items()
    ]


def like_segresnet(network: nn.Module, plan: Plan) -> nn.Module:
    """MONAI's SegResNet with the stages of the plan's network, one block in each, and the number of
    filters that brings its parameters closest to the network's.

    It halves every axis at each stage, which the plan's network does not where voxels are long: there the
    crop is padded."""
    levels = len(plan.network["encoder_width"])
    wanted = parameter_count(network)
    candidates = [
        Padded(
            SegResNet(
                spatial_dims=3,
                init_filters=filters,
                in_channels=plan.network["in_channels"],
                out_channels=plan.network["out_channels"],
                blocks_down=(1,) * levels,
                blocks_up=(1,) * (levels - 1),
            ),
            2 ** (levels - 1),
        )
        for filters in (8, 16, 24, 32)  # its group normalisation wants multiples of 8
    ]
    return min(candidates, key=lambda c: abs(math.log(parameter_count(c) / wanted)))
