"""The training loop, and the checkpoint that a run continues from and a network is loaded from."""

from __future__ import annotations

import math
import os
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from factorizer.models.build import build_network
from factorizer.segmentation.cases import Case
from factorizer.segmentation.checkpoint import load_weights_into, read_checkpoint, read_first
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import save_tensors
from factorizer.segmentation.plan import Plan, same_value
from factorizer.segmentation.processes import gather, group_position
from factorizer.segmentation.recipe import BUDGETS, MAX_BUDGET_STEPS, MIN_STEPS, Recipe
from factorizer.segmentation.screen import count, log_lines, progress
from factorizer.segmentation.survey import Geometry
from factorizer.segmentation.transforms import CropBatches, training_volumes

BEST = "best.pt"  # beside the last checkpoint: the one with the best validation
SAVE_EVERY, SAVE_SECONDS = 20, 30.0  # steps, or seconds and one step, that a killed run loses at most
REHEARSED = 5  # steps that are measured


class SegmentationLoss(nn.Module):
    """Dice and cross-entropy of logits (B, outputs, ...) and class indices (B, 1, ...).

    Of the labels under a softmax or, where the plan has regions, of each region under its sigmoid.
    The losses of a list of logits, finest first, are weighted by the powers of the recipe's
    `head_weight`, normalised.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        recipe = plan.recipe
        options: dict[str, Any] = {
            "squared_pred": recipe.squared_dice,
            "smooth_nr": recipe.dice_smoothing,
            "smooth_dr": recipe.dice_smoothing,
        }
        if plan.regions:
            self.dice: nn.Module = DiceLoss(sigmoid=True, **options)
        else:
            self.dice = DiceCELoss(to_onehot_y=True, softmax=True, **options)

    def forward(self, logits: Tensor | list[Tensor], classes: Tensor) -> Tensor:
        """Logits (B, outputs, ...), or a list of them, and class indices (B, 1, ...) to a scalar."""
        if isinstance(logits, Tensor):
            return self._loss(logits, classes)
        weights = [self.plan.recipe.head_weight**level for level in range(len(logits))]
        weights = [weight / sum(weights) for weight in weights]
        return DeepSupervisionLoss(self._loss, weights=weights)(logits, classes)  # type: ignore[arg-type]

    def _loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        if not self.plan.regions:
            return self.dice(logits, classes)
        # Not MONAI's DiceCELoss: for several channels its cross-entropy is that of a softmax.
        masks = self.plan.masks(classes)
        return self.dice(logits, masks) + binary_cross_entropy_with_logits(logits, masks)


def rate_factor(step: int, steps: int, recipe: Recipe) -> float:
    """The learning rate of step 0, 1, ... of so many, as a share of the plan's."""
    warm_up = math.ceil(recipe.warm_up * steps)
    if step < warm_up:
        return recipe.first_rate + (1 - recipe.first_rate) * step / warm_up
    start = max(warm_up, steps - round(recipe.decay * steps))
    progress = (step - start) / max(1, steps - start)
    return (1 + math.cos(math.pi * min(max(progress, 0), 1))) / 2


class Trainer:
    """A network in training: AdamW, linear warm-up, constant rate, cosine; Dice and cross-entropy.

    Step k depends on the state after step k - 1 and on batch k, which is a function of the seed
    and k; so a run that was stopped and continued ends where an unbroken one does. Where a process
    group is there (`process_group`), the processes share every batch, and the gradients are those of
    one process with the whole of it.

    Args:
        plan, network: what to train.
        device: where.
        log: folder for TensorBoard: loss, learning rate, seconds of a step, validation.
        validate: called with the network every `validate_every` steps, and after the last; returns
            a score, the same in every process, more is better. The checkpoint with the best one is
            kept beside the last, as best.pt.
        patience: stop after so many validations in a row that were no better than the best before.
        workers: processes that prepare batches ahead; those of all processes together are as many as there
            are cores at most; 0: none.
    """

    def __init__(
        self,
        plan: Plan,
        network: nn.Module,
        *,
        device: torch.device | str = "cpu",
        log: Path | None = None,
        validate: Callable[[nn.Module], float] | None = None,
        validate_every: int = 100,
        patience: int | None = None,
        workers: int = 0,
    ) -> None:
        self.plan, self.device, self.log = plan, torch.device(device), log
        self.validate, self.validate_every, self.patience = validate, validate_every, patience
        self.workers = min(workers, _cores())
        self.network = network.to(self.device)
        self.parallel: nn.Module = self.network
        self.process_index, self.process_count = group_position()
        if dist.is_initialized():
            self.parallel = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=plan.learning_rate,
            weight_decay=plan.weight_decay,
            betas=plan.recipe.betas,
            eps=plan.recipe.adam_eps,
            fused=True,  # on a CPU a fifth of the time of one parameter after the other
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: rate_factor(step, plan.steps, plan.recipe))
        self._mean = None
        if plan.recipe.averaging:
            self._mean = AveragedModel(self.network, multi_avg_fn=partial(_average, plan.recipe.averaging))
        self.loss = SegmentationLoss(plan)
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []  # step and score of each validation
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def result(self) -> nn.Module:
        """The network to use: its weights' mean, where the recipe has one."""
        return self.network if self._mean is None else self._mean.module

    @property
    def finished(self) -> bool:
        """Whether the plan's last step is done, or `patience` validations brought nothing better."""
        values = [score for _, score in self.scores]
        waited = len(values) - 1 - values.index(max(values)) if values else 0
        return self.step >= self.plan.steps or (self.patience is not None and waited >= self.patience)

    def update(self, image: Tensor, label: Tensor) -> float:
        """One training step on image (B, C, *crop) and class indices (B, 1, *crop): its loss.

        With several processes B is this process's part, and the loss that of all of them.
        """
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        image, label = image.to(self.device), label.to(self.device)
        # bfloat16 needs no scaling of the gradients, which float16 does.
        cuda = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            logits = self.parallel(image)
        loss = self.loss(_float(logits), label)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.recipe.clip_norm)
        self.optimizer.step()
        if self._mean is not None:
            self._mean.update_parameters(self.network)
        loss = loss.detach()
        if self.process_count > 1:
            dist.all_reduce(loss)
        return loss.item() / self.process_count

    def run(self, batches: CropBatches, path: Path, advance: Callable[[int], None]) -> None:
        """Train to the plan's last step, saving to `path`; `advance` is told of each step done.

        Raises FloatingPointError where the loss is no longer finite.
        """
        loader: DataLoader = DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(self.step, self.plan.steps),
            num_workers=self.workers,
        )
        log = _Log(self.log if self.process_index == 0 else None, self.step)
        start = saved = time.perf_counter()
        for image, label in loader:
            if self.finished:
                break
            loss = self.update(image, label)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {self.step + 1}; its crops are of the cases "
                    f"{', '.join(batches.case_names(self.step))}. Look at the intensities of these, or give "
                    "a lower --learning-rate"
                )
            rate = float(self.schedule.get_last_lr()[0])
            self.schedule.step()
            self.losses.append(loss)
            seconds = time.perf_counter() - start
            self.seconds += seconds
            log.add(self.step, {"loss": loss, "learning rate": rate, "seconds of a step": seconds})
            last = self.step == self.plan.steps
            validated = self.validate is not None and (self.step % self.validate_every == 0 or last)
            if validated:
                log.add(self.step, {"validation": self._validate()})
            due = self.step % SAVE_EVERY == 0 or time.perf_counter() - saved >= SAVE_SECONDS
            # First: a run that is killed between the two validates again, and keeps the same network.
            if validated and self.scores[-1][1] == max(score for _, score in self.scores):
                self.save(path.with_name(BEST))
            if validated or due or last:
                self.save(path)
                saved = time.perf_counter()
            advance(self.step)
            start = time.perf_counter()
        log.close()

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all: plain data and tensors only.

        Raises OSError where it cannot be written; the checkpoint that was there stays.
        """
        if self.process_index:
            return
        state = {
            "plan": asdict(self.plan),
            "network": self.result.state_dict(),  # what readers of a checkpoint want
            "iterate": self.network.state_dict() if self._mean is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "scores": self.scores,
            "seconds": self.seconds,
        }
        save_tensors(state, path)

    def resume(self, path: Path) -> None:
        """Continue from the checkpoint at `path`. Raises DataError where it is of another plan."""
        plan, state = read_checkpoint(path)
        before, now = (_flat(asdict(p)) for p in (plan, self.plan))
        way_out = "give another output folder, or delete the files of the run there to start anew"
        for name, value in now.items():
            if name == "notes" or (name == "data" and not (before[name] and value)):
                continue
            if name == "data" and before[name] != value:
                raise DataError(
                    f"{path}: belongs to a run on other files: the contents of some have changed since; "
                    f"{way_out}"
                )
            if not same_value(name, before[name], value):
                raise DataError(
                    f"{path}: belongs to a run with {_difference(name, before[name], value)}; {way_out}"
                )
        wanted = {"optimizer", "schedule", "losses", "scores", "seconds"}
        if missing := (wanted if self._mean is None else wanted | {"iterate"}).difference(state):
            raise DataError(
                f"{path}: is no run to be continued: it has no {' and no '.join(sorted(missing))}; {way_out}"
            )
        load_weights_into(self.result, state["network"], path)
        if self._mean is not None:
            self.network.load_state_dict(state["iterate"])
            self._mean.n_averaged.fill_(len(state["losses"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
        self.seconds = state["seconds"]

    def _validate(self) -> float:
        assert self.validate is not None
        self.scores.append((self.step, self.validate(self.result.eval())))
        return self.scores[-1][1]


def rehearse(
    console: Console,
    plan: Plan,
    training: Sequence[Case],
    geometries: Mapping[str, Geometry],
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> tuple[CropBatches, float]:
    """The crops that the plan draws of the `training` cases, and the seconds of a step with them.

    The step is that of a throw-away network, on this machine; where a process group is there, the slowest
    process's, for which the others wait. A step waits for its crops, or where `workers` prepare them for the
    slower of both.
    """
    with console.status(f"Loading {len(training)} volumes"):
        batches = CropBatches(plan, training_volumes(plan, training, geometries))
    trial = Trainer(plan, build_network(plan.network, plan.seed), device=device, workers=workers)
    crops, steps = [], []
    with console.status("Measuring a training step"):
        for index in range(REHEARSED + 1):  # the first warms caches and allocators up
            start = time.perf_counter()
            image, label = batches[index]
            ready = time.perf_counter()
            trial.update(image, label)
            crops.append(ready - start)
            steps.append(time.perf_counter() - ready)
    # A crop takes long now and then, by its changes or by a volume that is read again; a step does not.
    crop, step = mean(crops[1:]), median(steps[1:])
    seconds = max(step, crop / trial.workers) if trial.workers else step + crop
    return batches, max(gather([seconds]))


def steps_within(budget: str, seconds: float) -> int:
    """How many steps of so many seconds a budget is enough for."""
    return min(max(int(BUDGETS[budget] / seconds), MIN_STEPS), MAX_BUDGET_STEPS)


class Prepared(NamedTuple):
    """A run that can go on: its trainer, and unless it is finished the crops and the seconds of a step."""

    trainer: Trainer
    crops: CropBatches | None
    seconds: float | None


def prepare(
    plan: Plan,
    checkpoint: Path,
    make_trainer: Callable[[Plan], Trainer],
    rehearsal: Callable[[], tuple[CropBatches, float]],
    budget: str | None,
) -> Prepared:
    """The run of a plan, from its start or from its checkpoint.

    Its steps are the plan's or, where there is a budget, as many as that is enough for by the rehearsal
    (`rehearse`), and those of the checkpoint if there is one. Raises DataError as `Trainer.resume` does.
    """
    begun = gather([checkpoint.exists()])[0]  # by the first process's view of a disk that several share
    crops, seconds = (None, None) if begun else rehearsal()
    if budget is not None:
        steps = read_checkpoint(checkpoint)[0].steps if seconds is None else steps_within(budget, seconds)
        plan = replace(plan, steps=steps)
    trainer = make_trainer(plan)
    if begun:
        trainer.resume(checkpoint)
        if not trainer.finished:
            crops, seconds = rehearsal()
    return Prepared(trainer, crops, seconds)


def check_best(path: Path, plan: Plan) -> None:
    """Raises DataError where the best network there, beside which there is no checkpoint, is not of this run.

    That of this run is there where it was killed before its first checkpoint, after one validation.
    """
    if not path.exists():
        return
    with suppress(DataError):
        other, state = read_checkpoint(path)
        same = replace(other, steps=plan.steps, notes=plan.notes) == plan
        if same and len(state.get("scores", ())) == 1:
            return
    raise DataError(
        f"out: {path} is there without a checkpoint.pt, and is of another run; move it away, or give another "
        "folder"
    )


def start_from(network: nn.Module, path: str | Path) -> tuple[int, int]:
    """Copies those weights of a checkpoint, or of a model file's first network, whose name and shape the
    network has.

    Returns how many tensors were copied, and how many of the network's were not. Raises FileNotFoundError
    where there is no such file, DataError where it is not one of ours, or nothing in it fits.
    """
    own, given = network.state_dict(), read_first(path)[1]["network"]
    fitting = {name: given[name] for name in own if name in given and given[name].shape == own[name].shape}
    if not fitting:
        raise DataError(f"{path}: none of its weights fits the network")
    network.load_state_dict({**own, **fitting})
    return len(fitting), len(own) - len(fitting)


@runtime_checkable
class Watched(Protocol):
    """A validation that tells how far it is: how many of how many cases are done."""

    watch: Callable[[int, int], None]


class _Log:
    """Writes numbers for TensorBoard, or does nothing where there is no folder.

    A run that continues hides what the killed run wrote after its last checkpoint.
    """

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second, so only where it is used

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _average(decay: float, means: list[Tensor], values: list[Tensor], steps: Tensor | int) -> None:
    torch._foreach_lerp_(means, values, max(1 - decay, 9 / (10 + int(steps))))


def _cores() -> int:
    """The processor cores that this process may use, its part where torchrun started several here."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _float(logits: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return logits.float() if isinstance(logits, Tensor) else [y.float() for y in logits]


def _difference(name: str, before: Any, now: Any) -> str:
    """Two values of a field of the plan, in a few words: of long lists, what they do not share."""
    long = isinstance(before, tuple) and isinstance(now, tuple) and max(len(before), len(now)) > 4
    if long and all(isinstance(value, str) for value in (*before, *now)):
        parts = []
        for what, some in (("without", set(before) - set(now)), ("with", set(now) - set(before))):
            if some:
                parts.append(f"{what} {', '.join(sorted(some)[:3])}{' and others' if len(some) > 3 else ''}")
        changed = " and ".join(parts) or "in another order"
        return f"other names in {name}: {len(before)} then, {len(now)} now, {changed}"
    texts = [textwrap.shorten(repr(value), 200, placeholder=" ...") for value in (before, now)]
    order = ", in another order: that of the network's outputs" if before == now else ""
    return f"{name} = {texts[0]}, this one has {texts[1]}{order}"


def _flat(plan: dict[str, Any]) -> dict[str, Any]:
    """The fields of a plan, with those of its recipe beside them."""
    recipe = {f"recipe.{name}": value for name, value in plan["recipe"].items()}
    return {name: value for name, value in plan.items() if name != "recipe"} | recipe


def fit(console: Console, trainer: Trainer, batches: CropBatches, path: Path) -> None:
    """Trains to the end with a bar, or lines in a log, from the checkpoint at `path` if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if trainer.step == 0 and path.exists():
        trainer.resume(path)
    with progress(console) as bar:
        task = bar.add_task("Training", total=trainer.plan.steps, completed=trainer.step)
        tell = log_lines(console)

        def advance(step: int) -> None:
            recent = trainer.losses[-20:]
            loss = sum(recent) / len(recent)
            score = f", Dice {trainer.scores[-1][1]:.3f}" if trainer.scores else ""
            bar.update(task, completed=step, description=f"Training, loss {loss:.3f}{score}")
            tell(f"step {step} of {trainer.plan.steps}, loss {loss:.3f}{score}")

        if isinstance(trainer.validate, Watched):
            validation = bar.add_task("Validating", total=None, visible=False)

            def watch(done: int, total: int) -> None:
                bar.update(validation, completed=done, total=total, visible=done < total)
                if done == 0 and not console.is_terminal:
                    console.print(f"step {trainer.step}: validating on {count(total, 'case')}")

            trainer.validate.watch = watch
        trainer.run(batches, path, advance)
