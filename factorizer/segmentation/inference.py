"""Segment volumes of any size with trained networks, on the grids that they came in."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import Inferer, SimpleInferer, SlidingWindowInferer
from rich.console import Console
from torch import Tensor, nn

from factorizer import MatrixFactorization, set_num_iters
from factorizer.segmentation.cases import Case
from factorizer.segmentation.checkpoint import load_network
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import atomic
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.processes import pick_device, place
from factorizer.segmentation.screen import progress, tell_failure
from factorizer.segmentation.transforms import files_of, preprocessing, to_own_grid
from factorizer.segmentation.volumes import check_image, write_nifti

SETTINGS = "settings.json"  # in a folder of results: what they were made with


class FinestHead(nn.Module):
    """A network with its finest logits alone, where deep supervision gives it several."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y = self.network(x)
        return y if isinstance(y, Tensor) else y[0]


class Predictor:
    """One or several trained networks, whose logits are averaged.

    Args:
        models: networks with their plans. All must be of the same modalities, labels and regions.
        device: where the networks run.
        whole: run over whole volumes at once, instead of windows of the plan's crop, overlapping by
            half, under Gaussian weights.
        mirror: average also over the mirror images along the axes that the plan flips.

    Raises DataError where two networks do not segment the same.
    """

    def __init__(
        self,
        models: Sequence[tuple[nn.Module, Plan]],
        *,
        device: torch.device | str = "cpu",
        whole: bool = False,
        mirror: bool = False,
    ) -> None:
        self.plan = models[0][1]
        for number, (_, plan) in enumerate(models[1:], 2):
            for field in ("modalities", "labels", "regions"):
                was, now = getattr(self.plan, field), getattr(plan, field)
                if was != now:
                    raise DataError(f"checkpoint {number}: {field} = {now!r}; the first one has {was!r}")
        self.models = [(network.to(device).eval(), plan) for network, plan in models]
        self.device, self.whole, self.mirror = torch.device(device), whole, mirror

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
        }

    def segment(self, case: Case) -> np.ndarray:
        """Label values (X, Y, Z) uint8 on the image's own grid.

        The logits, not the decisions, are taken back to that grid where it is another than the
        network's.
        """
        return self.plan.decide(self.logits(case)).numpy()

    def logits(self, case: Case) -> Tensor:
        """Mean logits (outputs, X, Y, Z) on the image's own grid."""
        total: Tensor | None = None
        for network, plan in self.models:
            before = preprocessing(plan, ("image",))
            item = before(files_of(case))
            logits = to_own_grid(self.run(network, plan, item["image"].as_tensor()), item, before)
            total = logits if total is None else total + logits
        assert total is not None
        return total / len(self.models)

    @torch.no_grad()
    def run(self, network: nn.Module, plan: Plan, image: Tensor) -> Tensor:
        """The network moved over a preprocessed image (C, X, Y, Z): (outputs, X, Y, Z), on the CPU."""
        cuda, finest = self.device.type == "cuda", FinestHead(network)

        def logits(x: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
                return finest(x).float()

        x = image[None]
        if self.whole:
            infer: Inferer = SimpleInferer()
            x = x.to(self.device)
        else:
            infer = SlidingWindowInferer(
                roi_size=plan.crop,
                sw_batch_size=2,
                overlap=0.5,
                mode="gaussian",
                sw_device=self.device,
                device="cpu",
            )
        axes = [axis + 2 for axis in plan.flips] if self.mirror else []
        flips = [f for n in range(len(axes) + 1) for f in itertools.combinations(axes, n)]
        total = sum(infer(x.flip(f) if f else x, logits).flip(f) for f in flips)
        return (total / len(flips))[0].cpu()


@dataclass(frozen=True)
class Outcome:
    """What became of a case: "done", "skipped" (it was there) or "failed", and why."""

    name: str
    state: str
    reason: str = ""
    seconds: float = 0.0


def segment_cases(predictor: Predictor, cases: Sequence[Case], folder: Path) -> Iterator[Outcome]:
    """Segments cases into folder/NAME.nii.gz, one by one, and tells what became of each.

    A case whose file is there is left alone. One that cannot be read, or fails otherwise, leaves no
    file, and the others go on.
    """
    for case in cases:
        path, start = folder / f"{case.name}.nii.gz", time.perf_counter()
        if path.exists():
            yield Outcome(case.name, "skipped")
            continue
        reason = failure(lambda case=case, path=path: _segment_case(predictor, case, path))  # type: ignore[misc]
        state = "failed" if reason else "done"
        yield Outcome(case.name, state, reason, time.perf_counter() - start)


def failure(call: Callable[[], None]) -> str:
    """Runs a piece of work on one case: why it failed, or nothing.

    Whatever a case does (an unreadable file, a full disk, too little memory) must not end the
    others, so every error is caught here.
    """
    try:
        call()
    except DataError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _segment_case(predictor: Predictor, case: Case, path: Path) -> None:
    check_image(case, predictor.plan.modalities)
    write_nifti(predictor.segment(case), case.image, path)


def _digest(network: nn.Module, plan: Plan) -> str:
    digest = hashlib.sha256(repr(plan).encode())
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()


def load_predictor(
    checkpoints: Sequence[Path],
    *,
    device: str | None = None,
    iterations: int | None = None,
    whole: bool = False,
    mirror: bool = False,
) -> Predictor:
    """The networks of the checkpoints, ready to run. Raises DataError where one cannot be used."""
    models = []
    for path in checkpoints:
        try:
            models.append(load_network(path))
        except FileNotFoundError as error:
            raise DataError(f"checkpoint: there is no {path}") from error
    if iterations is not None:
        for network, _ in models:
            set_num_iters(network, iterations)
    return Predictor(models, device=pick_device(device), whole=whole, mirror=mirror)


def run_cases(console: Console, predictor: Predictor, cases: Sequence[Case], out: Path) -> list[Outcome]:
    """`segment_cases` with a bar; failures are told as they come.

    out/settings.json says what the results were made with. Raises DataError where those that are there
    were made with another network or other settings.
    """
    _keep_settings(out / SETTINGS, predictor.settings())
    outcomes = []
    with progress(console) as bar:
        work = segment_cases(predictor, cases, out)
        for outcome in bar.track(work, total=len(cases), description="Segmenting"):
            if outcome.state == "failed":
                tell_failure(console, outcome.name, outcome.reason)
            outcomes.append(outcome)
    return outcomes


def _keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes what the folder's results are made with, or checks that it is the same as before."""
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not readable as JSON ({error})") from error
        if before != settings:
            changed = [name for name in settings if before.get(name) != settings[name]]
            raise DataError(
                f"output: {path.parent} holds results made with other settings ({', '.join(changed)}); "
                "give another folder, or delete this one"
            )
    elif place()[0] == 0:
        with atomic(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=1), encoding="utf-8")
