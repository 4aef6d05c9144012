"""Segment volumes of any size with trained networks, on the grids that they came in."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from scipy import ndimage
from torch import Tensor, nn

from factorizer.layers import MatrixFactorization, set_num_iters
from factorizer.segmentation.cases import Case
from factorizer.segmentation.errors import DataError, check_counts
from factorizer.segmentation.files import atomic, read_json
from factorizer.segmentation.formats import save
from factorizer.segmentation.grids import OwnGrid
from factorizer.segmentation.plan import Plan, same_value
from factorizer.segmentation.processes import group_position, pick_device
from factorizer.segmentation.provenance import differences, made, remove_result, write_result
from factorizer.segmentation.screen import Outcome, each_case, tell_warning
from factorizer.segmentation.sliding import Planes, mirrored, slide
from factorizer.segmentation.trained import TrainedModel, load_model, united
from factorizer.segmentation.transforms import PreparedCase
from factorizer.segmentation.volumes import on_grid_of, read_grid
from factorizer_kernels import give_back_freed_memory

SLAB_ELEMENTS = 2**22  # logits that are decided at a time, about
PROBABILITIES = "probabilities"  # a folder in that of the results
SETTINGS = "settings.json"  # in a folder of results: what they were made with


class FinestHead(nn.Module):
    """A network with its finest logits alone, where deep supervision gives it several."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, *size) to logits (B, outputs, *size)."""
        y = self.network(x)
        return y if isinstance(y, Tensor) else y[0]


class Predictor:
    """One or several trained networks, whose logits are averaged.

    Args:
        models: networks with their plans. All must be of the same modalities, labels and regions, in one
            order.
        device: where the networks run.
        whole: run over whole volumes at once, instead of windows of the plan's crop, overlapping by
            half, under Gaussian weights.
        mirror: average also over the mirror images along the axes that the plan flips.
        largest_component: targets of which only the largest connected component is kept.

    Raises DataError where two networks do not segment the same.
    """

    def __init__(
        self,
        models: Sequence[tuple[nn.Module, Plan]],
        *,
        device: torch.device | str = "cpu",
        whole: bool = False,
        mirror: bool = False,
        largest_component: Sequence[str] = (),
    ) -> None:
        self.plan = models[0][1]
        for number, (_, plan) in enumerate(models[1:], 2):
            for field in ("modalities", "labels", "regions"):
                was, now = getattr(self.plan, field), getattr(plan, field)
                if not same_value(field, was, now):
                    order = ", in another order: that of the network's outputs" if was == now else ""
                    raise DataError(
                        f"checkpoint {number}: {field} = {now!r}; the first one has {was!r}{order}"
                    )
        self.models = [(network.to(device).eval(), plan) for network, plan in models]
        self.device, self.whole, self.mirror = torch.device(device), whole, mirror
        # A CPU gains nothing by a second window but its memory.
        self.windows = 2 if self.device.type == "cuda" else 1
        self.tell: Callable[[str], object] = lambda doubt: None  # is told what is odd about an image
        self.largest_component = tuple(largest_component)
        if unknown := set(largest_component).difference(self.plan.targets):
            raise DataError(f"largest_component: no target is called {', '.join(sorted(unknown))}")

    def settings(self) -> dict[str, Any]:
        """What the results depend on beside the images, as plain data: a digest of each network with its
        plan, their iterations, and how they are run."""
        return {
            "networks": [_digest(network, plan) for network, plan in self.models],
            "num_iters": [
                [part.num_iters for part in network.modules() if isinstance(part, MatrixFactorization)]
                for network, _ in self.models
            ],
            "whole": self.whole,
            "mirror": self.mirror,
            "largest_component": list(self.largest_component),
        }

    def segment(self, case: Case) -> np.ndarray:
        """Label values (X, Y, Z) uint8 on the image's own grid.

        The logits, not the decisions, are taken back to that grid where it is another than the
        network's. They are decided slab by slab, so that those of many classes need not exist at once.
        """
        return self.results(case)[0]

    def results(self, case: Case, *, probabilities: bool = False) -> tuple[np.ndarray, Tensor | None]:
        """The label values as `segment` has them, and where they are wanted the probabilities.

        Those are (outputs, X, Y, Z) float32: of the regions, each for itself, or of the labels, together 1.
        Where no network looked, outside of the box that holds all voxels but 0, all is background.
        """
        labels, chances = np.zeros(0), None
        for shape, place, logits, seen in self._slabs(case):
            if not labels.size:
                labels = np.zeros(shape, np.uint8)
                if probabilities:
                    chances = torch.zeros(len(logits), *shape)
            labels[place[1:]] = self.plan.decide(logits).numpy()
            if chances is not None:
                chances[place] = self.plan.probabilities(logits, seen())
        return keep_largest(labels, self.plan, self.largest_component), chances

    def logits(self, case: Case) -> Tensor:
        """Mean logits (outputs, X, Y, Z) on the image's own grid."""
        total = torch.zeros(0)
        for shape, place, logits, _ in self._slabs(case):
            if not total.numel():
                total = torch.zeros(len(logits), *shape)
            total[place] = logits
        return total

    def _slabs(
        self, case: Case
    ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], Tensor, Callable[[], Tensor]]]:
        """The shape of the image's own grid, a slab of it, the mean logits (outputs, ...) there, and what
        tells the voxels (...) that a network has seen; slab by slab."""
        groups: dict[Any, list[tuple[nn.Module, Plan]]] = {}  # one for each way to preprocess the image
        for network, plan in self.models:
            groups.setdefault((plan.spacing, plan.window), []).append((network, plan))
        parts: list[tuple[OwnGrid, tuple[int, ...], list[Planes]]] = []
        axis = 0
        for members in groups.values():
            prepared = PreparedCase(members[0][1], case)
            for doubt in prepared.doubts:
                self.tell(f"{case.name}: {doubt}")
            if self.device.type == "cpu":  # or the network's maps would lie beside what reading has freed
                give_back_freed_memory()
            size = prepared.image.shape[1:]
            if not parts:  # the axis of which a window holds the smallest part
                axis = min(range(3), key=lambda k: members[0][1].crop[k] / size[k])
            planes = [
                Planes(self._chunks(network, plan, prepared.image, axis), axis) for network, plan in members
            ]
            parts.append((prepared.own_grid, tuple(size), planes))
        shape, own = parts[0][0].shape, parts[0][0].along(axis)
        thickness = max(1, SLAB_ELEMENTS * shape[own] // (math.prod(shape) * len(self.plan.outputs)))
        slabs = [slice(k, min(k + thickness, shape[own])) for k in range(0, shape[own], thickness)]
        if parts[0][0].reversed(own):
            slabs.reverse()
        for slab in slabs:
            total: Any = 0
            for grid, its_size, members_planes in parts:
                # Along one axis for all: where the own grid is sheared each would call another the nearest.
                begin, end = grid.planes(own, slab.start, slab.stop, axis, its_size[axis])
                values: Any = sum(planes.take(begin, end) for planes in members_planes)
                total = total + grid.bring(values, own, slab.start, slab.stop, axis, begin)
            check_finite(total, case)
            place = (slice(None), *(slab if k == own else slice(None) for k in range(3)))
            seen = partial(_seen, parts, own, slab)
            yield shape, place, total.div_(len(self.models)) if len(self.models) > 1 else total, seen

    def run(self, network: nn.Module, plan: Plan, image: Tensor) -> Tensor:
        """The network moved over a preprocessed image (C, X, Y, Z): (outputs, X, Y, Z), on the CPU."""
        return torch.cat(list(self._chunks(network, plan, image, 0)), 1)

    def _chunks(self, network: nn.Module, plan: Plan, image: Tensor, axis: int) -> Iterator[Tensor]:
        """What `run` returns, cut along the axis.

        Where the memory of a GPU is too small for two windows at a time, they go one by one from then on;
        where it is too small for one, the rest of this volume goes through the CPU. Both are told.
        """
        device, tidy = self.device, False
        run = mirrored(lambda x: self._forward(network, x, device), plan.flips if self.mirror else ())

        def fitting(x: Tensor) -> Tensor:
            nonlocal device
            while len(x) <= self.windows:
                try:
                    return run(x).cpu()
                except torch.OutOfMemoryError:
                    if device.type == "cpu":
                        raise
                torch.cuda.empty_cache()  # out of the handler, which holds on to the tensors
                if len(x) > 1:
                    self.windows = 1
                    self.tell(f"the memory of {device} is too small for two windows at a time: one by one "
                              "from here on")  # fmt: skip
                else:
                    self.tell(f"the memory of {device} is too small for a volume: it goes through the CPU, "
                              "which takes longer")  # fmt: skip
                    device = torch.device("cpu")
                    network.to(device)
            return torch.cat([fitting(window) for window in x.split(1)])

        def tidied(x: Tensor) -> Tensor:
            # The first windows leave small blocks between their maps, so that the next maps would lie beside
            # what these had: that goes back to the system, once for many windows.
            nonlocal tidy
            y = fitting(x)
            if not tidy and device.type == "cpu":
                give_back_freed_memory()
            tidy = True
            return y

        try:
            if self.whole:
                yield fitting(image[None])[0]
            else:
                for chunk in slide(tidied, image, plan.crop, axis=axis, batch_size=self.windows):
                    yield chunk
                    del chunk
                    tidy = False
        finally:
            if device != self.device:
                network.to(self.device)

    def _forward(self, network: nn.Module, x: Tensor, device: torch.device) -> Tensor:
        """The finest logits (B, outputs, X, Y, Z) of windows (B, C, X, Y, Z), on the device."""
        cuda = device.type == "cuda"
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            return FinestHead(network)(x.to(device)).float()


def _seen(parts: Sequence[tuple[OwnGrid, tuple[int, ...], Any]], own: int, slab: slice) -> Tensor:
    masks = [grid.inside(size, own, slab.start, slab.stop) for grid, size, _ in parts]
    return torch.stack(masks).any(0)


def keep_largest(labels: np.ndarray, plan: Plan, targets: Sequence[str]) -> np.ndarray:
    """Label values (X, Y, Z) with those of each target only where its largest connected component is.

    Voxels that share a corner are connected. What a region loses is what lies around it: of the region that
    holds it, or background.
    """
    labels = labels.copy()
    around = plan.values_around()
    for name in (name for name in around if name in targets):
        mask = np.isin(labels, list(plan.targets[name]))
        components, number = ndimage.label(mask, np.ones((3, 3, 3)))
        if number > 1:
            largest = 1 + int(np.bincount(components[mask])[1:].argmax())
            labels[mask & (components != largest)] = around[name]
    return labels


def check_finite(logits: Tensor, case: Case) -> None:
    """Raises DataError where a network's output for a case is not finite: it decides nothing."""
    if not logits.isfinite().all():
        raise DataError(f"{case.image}: the network's output for it is not finite")


def load_predictor(
    checkpoints: Sequence[str | Path],
    *,
    device: str | None = None,
    num_iters: int | None = None,
    whole: bool = False,
    mirror: bool | None = None,
) -> Predictor:
    """The networks of the checkpoints and model files, ready to run.

    Where `mirror` is None, and for the components that are kept, a model file decides, or where there are
    several all of them together. Raises DataError where one cannot be used.
    """
    check_counts(num_iters=(num_iters, 0))
    models = []
    for path in checkpoints:
        try:
            models.append(load_model(path))
        except FileNotFoundError as error:
            raise DataError(f"checkpoint: there is no {path}") from error
    if num_iters is not None:
        for model in models:
            for network, _ in model.members:
                set_num_iters(network, num_iters)
    return predictor_of(united(models), device=pick_device(device), whole=whole, mirror=mirror)


def predictor_of(
    model: TrainedModel,
    *,
    device: torch.device | str = "cpu",
    whole: bool = False,
    mirror: bool | None = None,
    largest_component: Sequence[str] | None = None,
) -> Predictor:
    """The networks of a model, run as it says where an argument is None."""
    return Predictor(
        model.members,
        device=device,
        whole=whole,
        mirror=model.mirror if mirror is None else mirror,
        largest_component=model.largest_component if largest_component is None else largest_component,
    )


def run_cases(
    console: Console,
    predictor: Predictor,
    cases: Sequence[Case],
    folder: Path,
    *,
    overwrite: bool = False,
    probabilities: bool = False,
    then: Callable[[Case, Path], object] = lambda case, path: None,
) -> list[Outcome[str]]:
    """Segments cases into folder/NAME.nii.gz; the results are "done" and "skipped".

    A case is skipped where its file is there and was made from these very inputs by these networks
    (`provenance`). Where another file is there the case fails, unless `overwrite`. A case that cannot be
    read, or fails otherwise, leaves no file, is told, and the others go on. `then` is called with each case
    and its file, also where that was there.
    With `probabilities` folder/probabilities/NAME.npz has those of every output (`write_probabilities`).
    folder/settings.json says what the results were made with. Raises DataError where those that are there
    were made with another network or other settings, unless `overwrite`.
    """
    settings = predictor.settings()
    _keep_settings(folder / SETTINGS, settings, overwrite)
    predictor.tell = partial(tell_warning, console)

    def segment(case: Case) -> str:
        path = folder / f"{case.name}.nii.gz"
        maps = folder / PROBABILITIES / f"{case.name}.npz"
        there = not overwrite and made(path, case, settings)
        skipped = there and (not probabilities or made(maps, case, settings))
        if not skipped:
            values, chances = predictor.results(case, probabilities=probabilities)
            labels = on_grid_of(values, case.image)
            if not probabilities:
                remove_result(maps)  # of another result
            write_result(path, case, settings, lambda temporary: save(labels, temporary))
            if chances is not None:
                maps.parent.mkdir(exist_ok=True)
                write = partial(write_probabilities, predictor.plan, chances, read_grid(case.image)[0])
                write_result(maps, case, settings, write)
        then(case, path)
        return "skipped" if skipped else "done"

    return each_case(console, cases, "Segmenting", segment)


def write_probabilities(plan: Plan, values: Tensor, affine: np.ndarray, path: Path) -> None:
    """Writes the probabilities (outputs, X, Y, Z) of `Predictor.results` as a NumPy archive.

    It holds "probabilities", float16, of that shape; "names" of the outputs (`Plan.outputs`); and "affine",
    voxels to mm.
    """
    half = values.numpy().astype(np.float16)
    np.savez_compressed(path, probabilities=half, names=np.array(plan.outputs), affine=affine)


def _keep_settings(path: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Writes what the folder's results are made with, or checks that it is the same as before."""
    if path.exists() and not overwrite:
        if changed := differences(read_json(path), settings):
            raise DataError(
                f"output: {path.parent} holds results made with other settings ({', '.join(changed)}); "
                "give another folder, delete this one, or give --overwrite"
            )
    elif group_position()[0] == 0:
        with atomic(path, shared=True) as temporary:  # the parts of a job array may begin at once
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _digest(network: nn.Module, plan: Plan) -> str:
    """A digest of the weights and of what the plan says about segmenting; training is no part of it."""
    fields = ("modalities", "labels", "regions", "spacing", "crop", "window", "flips", "network")
    digest = hashlib.sha256(repr([getattr(plan, field) for field in fields]).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()
