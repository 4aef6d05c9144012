"""factorizer train --fold all: five networks, each case segmented by the one that has not seen it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import nibabel as nib
import numpy as np
import torch
from rich.console import Console
from torch import nn

from factorizer.commands.train import train
from factorizer.segmentation.cases import Case, on_one_grid, read_decathlon, split_cases
from factorizer.segmentation.checkpoint import load_network
from factorizer.segmentation.errors import DataError, FlatImageError
from factorizer.segmentation.evaluation import (
    Score,
    score_labels,
    summarise,
    summary_table,
    write_scores,
)
from factorizer.segmentation.files import atomic, prepare_folder
from factorizer.segmentation.inference import Predictor, keep_largest
from factorizer.segmentation.plan import AS_PLANNED, Plan, Wishes
from factorizer.segmentation.processes import pick_device, world_size
from factorizer.segmentation.screen import count, progress
from factorizer.segmentation.trained import TrainedModel, save_model
from factorizer.segmentation.volumes import check_label, read_grid

FOLDS = 5
ENSEMBLE, SCORES = "ensemble.pt", "cross_validation.csv"
Variant = tuple[bool, bool]  # mirror images, largest components alone
VARIANTS: tuple[Variant, ...] = ((False, False), (False, True), (True, False), (True, True))


def cross_validate(
    console: Console,
    data: Path,
    out: Path,
    wishes: Wishes = AS_PLANNED,
    *,
    resample: str = "",
    seed: int = 0,
    **options: Any,
) -> Path:
    """Trains the five folds into out/fold-0 to out/fold-4, or continues them, and puts them together.

    Each case is segmented by the network that has not seen it, with and without mirror images, with and
    without the parts of the targets that their largest components do not hold. Either is chosen where the
    mean Dice is higher with it. Writes the scores of every case, by that choice, to
    out/cross_validation.csv, and to out/ensemble.pt the five networks as one model with it.

    Args:
        options: see `train`.

    Returns the ensemble's file. Raises DataError as `train` does.
    """
    if world_size() > 1:
        raise DataError(
            f"fold: got all, in {world_size()} processes of torchrun; give --fold 0 to --fold 4 one after "
            "another, or all in one process"
        )
    if options.get("init") is not None and not Path(options["init"]).exists():
        raise DataError(f"init: there is no {options['init']}")
    task = on_one_grid(read_decathlon(data), resample)
    splits = [split_cases(task.cases, seed, fold)[1] for fold in range(FOLDS)]
    prepare_folder("out", out)
    device = pick_device(options.get("device"))
    members: list[tuple[nn.Module, Plan]] = []
    scores: dict[Variant, list[Score]] = {variant: [] for variant in VARIANTS}
    for fold, held_out in enumerate(splits):
        folder = out / f"fold-{fold}"
        checkpoint = train(console, data, folder, wishes, resample=resample, seed=seed, fold=fold, **options)
        members.append(load_network(checkpoint))
        found = _scores(console, members[-1:], device, held_out, folder / "scores.json")
        for variant in VARIANTS:
            scores[variant] += found[variant]
    mirror, largest = choose(scores)
    kept = tuple(members[0][1].targets) if largest else ()
    write_scores(out / SCORES, scores[mirror, largest])
    card = f"{task.name}: the {FOLDS} networks of a cross-validation by `factorizer train --fold all`.\n"
    save_model(TrainedModel(tuple(members), mirror=mirror, largest_component=kept, card=card), out / ENSEMBLE)
    title = f"{count(len(task.cases), 'case')}, each by the network that has not seen it: {out / SCORES}"
    console.print(summary_table(title, summarise(scores[mirror, largest])))
    console.print(
        f"mirror images: {'yes' if mirror else 'no'}; largest component alone: {', '.join(kept) or 'never'}; "
        f"the {FOLDS} networks as one: {out / ENSEMBLE}",
        soft_wrap=True,
    )
    return out / ENSEMBLE


def choose(scores: Mapping[Variant, list[Score]]) -> Variant:
    """What helps: whether to average over mirror images, and whether to keep largest components alone."""
    mirror = max((False, True), key=lambda mirror: _mean_dice(scores[mirror, False]))
    return mirror, max((False, True), key=lambda largest: _mean_dice(scores[mirror, largest]))


def _scores(
    console: Console,
    models: Sequence[tuple[nn.Module, Plan]],
    device: torch.device,
    cases: Sequence[Case],
    path: Path,
) -> dict[Variant, list[Score]]:
    """The scores of the cases in all variants, from `path` where they are there of the same network."""
    predictors = [Predictor(models, device=device, mirror=mirror) for mirror in (False, True)]
    settings = predictors[0].settings()
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["settings"] == settings:
        return {variant: [Score(**s) for s in kept["scores"][str(variant)]] for variant in VARIANTS}
    plan = predictors[0].plan
    scores: dict[Variant, list[Score]] = {variant: [] for variant in VARIANTS}
    with progress(console) as bar:
        for case in bar.track(cases, description="Segmenting"):
            truth = check_label(case, list(plan.labels))
            labels = np.zeros_like(truth)  # of a flat image, which was told before the training
            spacing = nib.affines.voxel_sizes(read_grid(case.image)[0]).tolist()
            for mirror, largest in VARIANTS:
                if largest:
                    labels = keep_largest(labels, plan, list(plan.targets))
                else:
                    with suppress(FlatImageError):
                        labels = predictors[mirror].segment(case)
                scores[mirror, largest] += score_labels(labels, truth, plan.targets, spacing, case.name)
    plain = {str(variant): [asdict(score) for score in found] for variant, found in scores.items()}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"settings": settings, "scores": plain}), encoding="utf-8")
    return scores


def _mean_dice(scores: Sequence[Score]) -> float:
    return mean(score.dice for score in scores)
