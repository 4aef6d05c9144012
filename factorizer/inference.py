"""Segment volumes of any size with a trained network, on the grid that they came in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.metrics import DiceMetric
from monai.networks.utils import one_hot
from monai.transforms import Invertd
from torch import Tensor, nn

from factorizer.data import atomic, preprocessing
from factorizer.planning import Plan, build_network
from factorizer.training import read_checkpoint


def load_network(path: str | Path) -> tuple[nn.Module, Plan]:
    """The network of a checkpoint, in evaluation mode, and the plan that it was trained by.

    Raises FileNotFoundError where there is none, DataError where the file is not one of ours.
    """
    plan, state = read_checkpoint(path)
    network = build_network(**plan.network, seed=plan.seed)
    network.load_state_dict(state["network"])
    return network.eval(), plan


def sliding_window(plan: Plan) -> SlidingWindowInferer:
    """Windows of the plan's crop, overlapping by half, under Gaussian weights."""
    return SlidingWindowInferer(roi_size=plan.crop, sw_batch_size=2, overlap=0.5, mode="gaussian")


@torch.no_grad()
def segment(network: nn.Module, plan: Plan, image: Path) -> np.ndarray:
    """Label values (X, Y, Z) uint8 for a NIfTI image, on the image's own grid.

    The logits, not the decisions, are taken back to that grid where it is another than the
    network's.
    """
    values = list(plan.labels)
    before = preprocessing(("image",), plan.spacing, values)
    item = before({"image": str(image)})
    window = sliding_window(plan)
    item["logits"] = window(item["image"][None], network)[0]
    after = Invertd("logits", transform=before, orig_keys="image", nearest_interp=False)
    classes = after(item)["logits"].argmax(dim=0)
    return np.asarray(values, dtype=np.uint8)[classes.numpy()]


def write_segmentation(labels: np.ndarray, image: Path, path: Path) -> None:
    """Write label values as NIfTI with the affine, and the meaning of its codes, of `image`."""
    source: Any = nib.load(image)
    volume = nib.Nifti1Image(labels, source.affine)
    volume.header.set_xyzt_units(*source.header.get_xyzt_units())
    volume.set_qform(source.affine, int(source.header["qform_code"]))
    volume.set_sform(source.affine, int(source.header["sform_code"]))
    with atomic(path) as temporary:
        nib.save(volume, temporary)


def dice(prediction: np.ndarray, truth: np.ndarray, values: Sequence[int]) -> Tensor:
    """Dice of each foreground class of two label volumes; NaN for a class that the truth lacks."""
    metric = DiceMetric(include_background=False, reduction="none")
    classes = (torch.from_numpy(np.searchsorted(values, v)) for v in (prediction, truth))
    metric(*(one_hot(volume[None, None], len(values)) for volume in classes))
    return torch.as_tensor(metric.get_buffer()[0])
