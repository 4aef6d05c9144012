"""Helpers for the tests of `factorizer`: small plans, and the networks that they ask for."""

from factorizer.models.build import build_network
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.training import Trainer

SIZE = (16, 16, 16)


def plan_for(modalities=("A", "B"), labels=None, regions=None, network=None, **options):
    """A plan for a tiny network."""
    labels = labels or {0: "background", 1: "halo", 2: "core"}
    arguments = {
        "in_channels": len(modalities),
        "out_channels": len(regions or labels),
        "spatial_size": SIZE,
        "encoder_depth": (1, 1),
        "encoder_width": (8, 16),
        "strides": (1, 2),
        "decoder_depth": (1,),
        "norm": "LayerNorm",
        "reshape": ("SWMatricize", {"head_dim": 8, "patch_size": 4}),
        **(network or {}),
    }
    options = {"task": "task", "spacing": (1.0, 1.0, 1.0), "crop": SIZE, **options}
    return Plan(
        modalities=tuple(modalities), labels=labels, regions=regions or {}, network=arguments, **options
    )


def trainer_for(plan, **options):
    return Trainer(plan, build_network(plan.network, plan.seed), **options)


def checkpoint_for(plan, path):
    """Writes the checkpoint of an untrained network."""
    trainer_for(plan).save(path)
    return path
