"""What a Factorizer looks at: the nonnegative components of its layers, as volumes.

A mixer factorises each head of each window as X ≈ u vᵀ, X head_dim × voxels. The vector v says how
much of the component each voxel holds: put back in its place it is a map over the volume, and maps
of that kind are what the Factorizer paper (Medical Image Analysis 84, 2023) shows of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from factorizer import FactMixer
from factorizer.data import Case, preprocessing
from factorizer.inference import sliding_window
from factorizer.planning import Plan


def mixers(network: nn.Module) -> dict[str, FactMixer]:
    """Every mixer of a network by its name in the state dict, in the order of the forward pass."""
    return {name: part for name, part in network.named_modules() if isinstance(part, FactMixer)}


@torch.no_grad()
def component_maps(mixer: FactMixer, x: Tensor) -> Tensor:
    """The components of a mixer for its input x (B, C, *size): maps (B, heads · R, *size), ≥ 0.

    Component r of a head at a voxel is v[r] ‖u[r]‖, the length of what it adds to the voxel's
    features, averaged over the shifts. (v alone has no scale: only the product u vᵀ has one, and
    windows would not be comparable.)
    """
    u, v = mixer.decompose(x)
    lengths = v * torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    head_dim = u.shape[-2]
    maps = []
    for row in lengths.unbind(-1):
        # Every channel of a head gets the component, as that is what can be put back; one is kept.
        rows = row[..., None, :].expand(*row.shape[:-1], head_dim, row.shape[-1])
        maps.append(mixer.reshape.inverse_forward(rows, x.shape[2:])[:, ::head_dim])
    return torch.stack(maps, dim=2).flatten(1, 2)


class ComponentMaps(nn.Module):
    """Image to the components of some layers, so that a sliding window can be moved over it.

    Calling it with x (B, C, *size) runs the network once and returns (B, maps, *size): the maps of
    each of `layers`, names from `mixers`, one after the other; those of coarse layers are
    interpolated linearly. `counts` tells how many maps each layer has.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        known = mixers(network)
        if missing := [name for name in layers if name not in known]:
            raise ValueError(f"layers: the network has no {missing[0]!r}; it has {list(known)}")
        self.network = network
        self.chosen = {name: known[name] for name in layers}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        inputs: dict[str, Tensor] = {}
        hooks = [
            mixer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
            for name, mixer in self.chosen.items()
        ]
        try:
            self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[x.ndim - 2]
        maps = []
        for name, mixer in self.chosen.items():
            found = component_maps(mixer, inputs[name])
            self.counts[name] = found.shape[1]
            maps.append(interpolate(found, size=x.shape[2:], mode=mode))
        return torch.cat(maps, dim=1)


def shallow_and_deep(network: nn.Module, plan: Plan) -> dict[str, str]:
    """The names of the first mixer and of the bottleneck's."""
    names = list(mixers(network))
    return {"shallow": names[0], "deep": names[sum(plan.network["encoder_depth"]) - 1]}


def case_components(
    network: nn.Module, plan: Plan, layers: Sequence[str], case: Case
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The maps (n, X, Y, Z) of each layer over a whole volume, and the preprocessed case."""
    before = preprocessing(("image", "label"), plan.spacing, list(plan.labels))
    item = before({"image": str(case.image), "label": str(case.label)})
    components = ComponentMaps(network, layers)
    maps = sliding_window(plan)(item["image"].as_tensor()[None], components)[0]
    parts = maps.split([components.counts[name] for name in layers])
    return dict(zip(layers, parts, strict=True)), item


def component_agreement(
    network: nn.Module, plan: Plan, layers: Sequence[str], cases: Sequence[Case]
) -> dict[str, Tensor]:
    """`agreement` of every map with every foreground class: for each layer (classes, maps).

    Taken over the voxels that have a signal, and averaged over the cases that have the class.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for case in cases:
        maps, item = case_components(network, plan, layers, case)
        label = item["label"].as_tensor()[0]
        inside = item["image"].as_tensor().abs().sum(0) > 0
        masks = [label[inside] == k for k in range(1, len(plan.labels))]
        for name in layers:
            areas = [[agreement(volume[inside], mask) for volume in maps[name]] for mask in masks]
            found[name].append(torch.tensor(areas))
    return {name: torch.stack(areas).nanmean(0) for name, areas in found.items()}


def agreement(scores: Tensor, mask: Tensor) -> float:
    """How well `scores` tell the voxels of `mask` from the others: area under the ROC curve.

    The probability that a voxel inside scores higher than one outside, ties counting one half:
    0.5 is chance, 1 a perfect separation. NaN where `mask` is empty or full.
    """
    mask = mask.flatten().bool()
    inside, outside = int(mask.sum()), int((~mask).sum())
    if not inside or not outside:
        return float("nan")
    _, place, counts = scores.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = last - (counts - 1) / 2  # equal scores share the mean of their ranks
    return float((ranks[place[mask]].sum() - inside * (inside + 1) / 2) / (inside * outside))
