"""What a Factorizer looks at: the nonnegative components of its layers, as volumes.

A mixer factorises each head of each window as X ≈ u vᵀ, X head_dim × voxels. The vector v says how
much of the component each voxel holds: put back in its place it is a map over the volume, and maps
of that kind are what the Factorizer paper (Medical Image Analysis 84, 2023) shows of a network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from factorizer.layers import FactMixer
from factorizer.layers.resize import crop_to
from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.inference import Predictor
from factorizer.segmentation.intensities import body
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.transforms import PreparedCase
from factorizer.segmentation.volumes import check_image, check_label

SAMPLE = 2**16  # voxels of a mask, and of what it stands out from, that a channel is chosen by


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
        """x (B, C, *size) to the maps of all layers (B, maps, *size)."""
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
            # A level's features may reach beyond x, where it was padded.
            extent = [n * s for n, s in zip(found.shape[2:], _stride(self.network, name), strict=True)]
            maps.append(crop_to(interpolate(found, size=extent, mode=mode), x.shape[2:]))
        return torch.cat(maps, dim=1)


def _stride(network: Any, name: str) -> tuple[int, ...]:
    """Voxels of the image along each axis for one of the features that this mixer works on."""
    side, _, block = name.split(".")[:3]
    return network.strides[int(block) if side == "encoder" else -2 - int(block)]


def shallow_and_deep(network: nn.Module, plan: Plan) -> dict[str, str]:
    """The names of the first mixer and of the bottleneck's last."""
    names = list(mixers(network))
    return {"shallow": names[0], "deep": names[sum(plan.network["encoder_depth"]) - 1]}


def find_layers(network: nn.Module, plan: Plan, names: Sequence[str]) -> dict[str, str]:
    """Layers by what they are called here: "shallow", "deep", or a name from `mixers`; "all" for every one.

    Raises DataError where the network has no such layer.
    """
    known = shallow_and_deep(network, plan) | {name: name for name in mixers(network)}
    if list(names) == ["all"]:
        names = list(mixers(network))
    for name in names:
        if name not in known:
            raise DataError(f"layers: the network has no {name!r}; it has {', '.join(known)}")
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Components:
    """The component maps of some layers over one case.

    `maps`: (n, X, Y, Z) of each layer on the network's grid, axes right, anterior, superior.
    """

    maps: dict[str, Tensor]
    prepared: PreparedCase

    def on_grid(self, layer: str) -> Tensor:
        """The maps (n, X, Y, Z) of a layer on the image's own grid."""
        return self.prepared.to_own_grid(self.maps[layer])


def case_components(
    predictor: Predictor, layers: Sequence[str], case: Case, prepared: PreparedCase | None = None
) -> Components:
    """The maps of layers, names from `mixers`, of the predictor's first network over a whole volume.

    `prepared`: the case as that network's plan preprocesses it, where it is at hand.
    """
    network, plan = predictor.models[0]
    prepared = PreparedCase(plan, case) if prepared is None else prepared
    components = ComponentMaps(network, layers)
    maps = predictor.run(components, plan, prepared.image)
    parts = maps.split([components.counts[name] for name in layers])
    return Components(dict(zip(layers, parts, strict=True)), prepared)


class Agreement(NamedTuple):
    """How well a map agrees with a mask, or with what lies outside of it.

    Attributes:
        auc: area under the ROC curve, the probability that a voxel inside scores higher than one outside,
            ties counting one half: 0.5 is chance, 1 a perfect separation, and so is 0, by a map that is high
            outside.
        dice: the best that a threshold on the map reaches.
        threshold: that one. The mask is where map >= threshold, or, for a map of the outside, where
            map <= threshold.
    """

    auc: float
    dice: float
    threshold: float

    @property
    def clarity(self) -> float:
        """How far from chance, whichever side is marked: 0 to 0.5, NaN where the mask is empty or full."""
        return abs(self.auc - 0.5)

    @property
    def marks(self) -> str:
        """Which side the map is high on: "label" or "outside"; empty where the mask is empty or full."""
        return side_of(self.auc)


def side_of(auc: float) -> str:
    """The side that a map with this AUC marks: "label", "outside", or "" for NaN."""
    return "" if math.isnan(auc) else "label" if auc >= 0.5 else "outside"


def agreement(scores: Tensor, mask: Tensor) -> Agreement:
    """How well `scores` tell the voxels of `mask` from the others; NaN where it is empty or full.

    The area is computed from ranks, as the Mann-Whitney statistic (Hanley and McNeil, Radiology 143, 1982).

    Args:
        scores: of any shape.
        mask: of that shape, zero outside.
    """
    mask = mask.flatten().bool()
    inside, outside = int(mask.sum()), int((~mask).sum())
    if not inside or not outside:
        return Agreement(float("nan"), float("nan"), float("nan"))
    levels, place, counts = scores.flatten().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = last - (counts - 1) / 2  # equal scores share the mean of their ranks
    auc = float((ranks[place[mask]].sum() - inside * (inside + 1) / 2) / (inside * outside))
    # At the k-th level: how many voxels lie at it or beyond, and how many of these are inside.
    hits, beyond = torch.bincount(place[mask], minlength=len(levels)), counts
    if side_of(auc) == "outside":
        hits, beyond = hits.cumsum(0), beyond.cumsum(0)
    else:
        hits, beyond = (values.flip(0).cumsum(0).flip(0) for values in (hits, beyond))
    dice = 2 * hits / (beyond + inside)
    best = int(dice.argmax())
    return Agreement(auc, float(dice[best]), float(levels[best]))


def clearest_channel(image: np.ndarray, masks: Sequence[np.ndarray], inside: np.ndarray) -> int:
    """The channel in which masks stand out best, by the mean of |AUC - 1/2|; the first where all are empty.

    Args:
        image: (X, Y, Z, channel).
        masks: each (X, Y, Z).
        inside: (X, Y, Z), the voxels that they stand out from.
    """
    clarity = np.zeros(image.shape[3])
    for mask in masks:
        groups = [np.flatnonzero(part) for part in (mask & inside, ~mask & inside)]
        if not all(map(len, groups)):
            continue
        chosen = [group[:: max(1, len(group) // SAMPLE)] for group in groups]
        truth = torch.arange(sum(map(len, chosen))) < len(chosen[0])
        for channel in range(len(clarity)):
            values = torch.from_numpy(image[..., channel].reshape(-1)[np.concatenate(chosen)])
            clarity[channel] += abs(agreement(values, truth).auc - 0.5)
    return int(clarity.argmax())


def agreements(
    maps: Tensor, labels: np.ndarray, signal: np.ndarray, plan: Plan
) -> dict[str, list[Agreement]]:
    """For each target of the plan the agreement of every map (n, X, Y, Z) with it.

    Taken over the voxels of `signal` (X, Y, Z), see `body`: where air counts, every map looks good. `labels`
    (X, Y, Z) are label values.
    """
    inside = torch.from_numpy(signal)
    kept = maps[:, inside]
    return {
        name: [agreement(row, torch.from_numpy(np.isin(labels[signal], values))) for row in kept]
        for name, values in plan.targets.items()
    }


def component_agreement(
    predictor: Predictor, layers: Sequence[str], cases: Sequence[Case]
) -> dict[str, Tensor]:
    """AUC of every map with every target, on the cases' own grids: for each layer (targets, maps).

    Averaged over the cases that have the target.
    """
    plan = predictor.models[0][1]
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for case in cases:
        components = case_components(predictor, layers, case)
        labels = check_label(case, list(plan.labels))
        signal = body(check_image(case, plan.modalities)[1], plan.modalities) | (labels != 0)
        for name in layers:
            by_target = agreements(components.on_grid(name), labels, signal, plan)
            found[name].append(torch.tensor([[a.auc for a in row] for row in by_target.values()]))
    return {name: torch.stack(areas).nanmean(0) for name, areas in found.items()}


class BestComponent(NamedTuple):
    """The map that tells a target best from the rest.

    Attributes:
        map: its number in the layer.
        marks: the side it is high on where it was chosen, "label" or "outside"; empty where no case has
            the target.
        auc: see `Agreement`, where it was measured; NaN where no case has the target.
    """

    map: int
    marks: str
    auc: float


class BestComponents(NamedTuple):
    """How well single maps of a layer tell the targets apart.

    Attributes:
        layer: its name in the state dict.
        maps: how many it has.
        targets: for each target the map that stands for it.
    """

    layer: str
    maps: int
    targets: dict[str, BestComponent]


def best_components(
    predictor: Predictor, chosen_on: Sequence[Case], measured_on: Sequence[Case]
) -> dict[str, BestComponents]:
    """How well single components tell the targets apart, in the shallow and the deep layer.

    The map that stands for a target is the one whose AUC on `chosen_on` is farthest from 1/2, above or
    below: a map of all that is outside tells a target as well. Its AUC is that on `measured_on`, so that the
    choice is no part of the measurement.
    """
    (network, plan), *_ = predictor.models
    layers = shallow_and_deep(network, plan)
    chosen = component_agreement(predictor, list(layers.values()), chosen_on)
    measured = component_agreement(predictor, list(layers.values()), measured_on)
    found = {}
    for depth, layer in layers.items():
        best = clearest(chosen[layer])
        targets = {
            name: BestComponent(m, side_of(float(chosen[layer][k, m])), float(measured[layer][k, m]))
            for k, (name, m) in enumerate(zip(plan.targets, best, strict=True))
        }
        found[depth] = BestComponents(layer, chosen[layer].shape[1], targets)
    return found


def clearest(areas: Tensor) -> list[int]:
    """For each row of areas under ROC curves the place of the one farthest from 1/2; NaN is none."""
    return (areas - 0.5).abs().nan_to_num(nan=-1).argmax(1).tolist()
