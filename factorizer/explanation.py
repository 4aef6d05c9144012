"""What a Factorizer looks at: the nonnegative components of its layers, as volumes.

A mixer factorises each head of each window as X ≈ u vᵀ, X head_dim × voxels. The vector v says how
much of the component each voxel holds: put back in its place it is a map over the volume, and maps
of that kind are what the Factorizer paper (Medical Image Analysis 84, 2023) shows of a network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from factorizer import FactMixer


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
    cut, size = mixer.reshape, x.shape[2:]
    u, v = mixer.decompose(x)
    lengths = v * torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    heads = u.shape[0] // (x.shape[0] * len(cut.options(size)["shifts"]))
    back = type(cut)(  # the same windows, one row each
        (None, heads, *size),
        head_dim=1,
        grid_size=cut.grid_size,
        patch_size=cut.patch_size,
        shifts=cut.shifts,
    )
    maps = [back.inverse_forward(row[..., None, :], size) for row in lengths.unbind(-1)]
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
            mixer.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0])
            )
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
