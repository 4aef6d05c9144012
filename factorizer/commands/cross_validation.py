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

from factorizer.commands.train import check_plan, train
from factorizer.segmentation.cases import Case, on_one_grid, read_decathlon, split_cases
from factorizer.segmentation.checkpoint import load_network
from factorizer.segmentation.errors import DataError, FlatImageError
from factorizer.segmentation.evaluation import (
    Score,
    is_scores,
    score_labels,
    summarise,
    summary_table,
    write_scores,
)
from factorizer.segmentation.files import atomic, check_own, prepare_folder, read_json
from factorizer.segmentation.inference import Predictor, keep_largest
from factorizer.segmentation.plan import AS_PLANNED, Plan, Wishes
from factorizer.segmentation.processes import pick_device, world_size
from factorizer.segmentation.screen import count, progress
from factorizer.segmentation.trained import TrainedModel, load_model, save_model
from factorizer.segmentation.volumes import check_label, read_grid

FOLDS = 5
ENSEMBLE, SCORES = "ensemble.pt", "cross_validation.csv"
FOLD_SCORES = "scores.json"  # in the folder of each fold
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
    _check_results(out)
    device = pick_device(options.get("device"))
    members: list[tuple[nn.Module, Plan]] = []
    scores: dict[Variant, list[Score]] = {variant: [] for variant in VARIANTS}
    for fold, held_out in enumerate(splits):
        folder = out / f"fold-{fold}"
        checkpoint = train(console, data, folder, wishes, resample=resample, seed=seed, fold=fold, **options)
        members.append(load_network(checkpoint))
        found = _scores(console, members[-1:], device, held_out, folder / FOLD_SCORES)
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


def _check_results(out: Path) -> None:
    """Raises DataError where a file of another kind is where a result goes, in a fold's folder too: the
    last fold would be refused after hours."""
    check_own("out", out / SCORES, is_scores, "file of scores")
    check_own("out", out / ENSEMBLE, _is_model, "model")
    for fold in range(FOLDS):
        folder = out / f"fold-{fold}"
        check_plan(folder)
        check_own("out", folder / FOLD_SCORES, lambda path: bool(_kept(path)), "file of a fold's scores")


def _is_model(path: Path) -> bool:
    try:
        load_model(path)
    except DataError:
        return False
    return True


def _kept(path: Path) -> dict[str, Any]:
    """What `_scores` wrote to a file; empty where there is none, or one of another kind."""
    try:
        content = read_json(path)
    except DataError:
        return {}
    return content if isinstance(content, dict) and {"settings", "scores"} <= content.keys() else {}


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
    if (kept := _kept(path)) and kept["settings"] == settings:
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
