"""The training loop, and the checkpoint that a run continues from and a network is loaded from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.distributed as dist
from monai.losses import DeepSupervisionLoss, DiceCELoss, DiceLoss
from monai.optimizers import WarmupCosineSchedule
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import save_tensors
from factorizer.segmentation.plan import Plan
from factorizer.segmentation.screen import progress
from factorizer.segmentation.transforms import Crops

SAVE_EVERY, SAVE_SECONDS = 20, 30.0  # steps, or seconds and one step, that a killed run loses at most
WARM_UP = 0.05  # share of the steps
CLIP_NORM = 1.0
LINE_SECONDS = 60.0  # between two lines of a log file, where a bar would be seen at its end alone


class SegmentationLoss(nn.Module):
    """Dice and cross-entropy of logits (B, outputs, ...) and class indices (B, 1, ...).

    Of the labels under a softmax or, where the plan has regions, of each region under its sigmoid.
    A list of logits, finest first, is weighted 1, 1/2, 1/4, ..., normalised.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        if plan.regions:
            self.dice: nn.Module = DiceLoss(sigmoid=True, squared_pred=True)
        else:
            self.dice = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)

    def forward(self, logits: Tensor | list[Tensor], classes: Tensor) -> Tensor:
        if isinstance(logits, Tensor):
            return self._loss(logits, classes)
        weights = [0.5**level for level in range(len(logits))]
        weights = [weight / sum(weights) for weight in weights]
        return DeepSupervisionLoss(self._loss, weights=weights)(logits, classes)  # type: ignore[arg-type]

    def _loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        if not self.plan.regions:
            return self.dice(logits, classes)
        # Not MONAI's DiceCELoss: for several channels its cross-entropy is that of a softmax.
        masks = self.plan.masks(classes)
        return self.dice(logits, masks) + binary_cross_entropy_with_logits(logits, masks)


class Trainer:
    """A network in training: AdamW, linear warm-up then cosine, Dice and cross-entropy.

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
        workers: processes that prepare batches ahead; 0: none.
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
        self.workers = workers
        self.network = network.to(self.device)
        self.parallel: nn.Module = self.network
        self.part, self.parts = 0, 1
        if dist.is_initialized():
            self.part, self.parts = dist.get_rank(), dist.get_world_size()
            self.parallel = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
        )
        self.schedule = WarmupCosineSchedule(
            self.optimizer,
            warmup_steps=math.ceil(WARM_UP * plan.steps),
            t_total=plan.steps,
            warmup_multiplier=0.1,
        )
        self.loss = SegmentationLoss(plan)
        self.losses: list[float] = []
        self.scores: list[tuple[int, float]] = []  # step and score of each validation
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

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
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        self.optimizer.step()
        loss = loss.detach()
        if self.parts > 1:
            dist.all_reduce(loss)
        return loss.item() / self.parts

    def run(self, crops: Crops, path: Path, advance: Callable[[int], None]) -> None:
        """Train to the plan's last step, saving to `path`; `advance` is told of each step done.

        Raises FloatingPointError where the loss is no longer finite.
        """
        batches: DataLoader = DataLoader(
            crops,  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(self.step, self.plan.steps),
            num_workers=self.workers,
        )
        log = _Log(self.log if self.part == 0 else None, self.step)
        start = saved = time.perf_counter()
        for image, label in batches:
            if self.finished:
                break
            loss = self.update(image, label)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {self.step + 1}")
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
                self.save(path.with_name("best.pt"))
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
        if self.part:
            return
        state = {
            "plan": asdict(self.plan),
            "network": self.network.state_dict(),
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
        for field in fields(Plan):
            was, now = getattr(plan, field.name), getattr(self.plan, field.name)
            if was != now:
                raise DataError(
                    f"{path}: belongs to a run with {field.name} = {was!r}, this one has {now!r}; "
                    "give another output folder, or delete that file to start anew"
                )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.scores = list(state["losses"]), list(state["scores"])
        self.seconds = state["seconds"]

    def _validate(self) -> float:
        assert self.validate is not None
        self.scores.append((self.step, self.validate(self.network.eval())))
        return self.scores[-1][1]


class _Log:
    """Numbers for TensorBoard, or nowhere. Those that a killed run wrote after its last checkpoint
    are hidden by the ones of the run that continues."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self.writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # a second, for those who log alone

            self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _float(logits: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return logits.float() if isinstance(logits, Tensor) else [y.float() for y in logits]


def fit(console: Console, trainer: Trainer, crops: Crops, path: Path) -> None:
    """Trains to the end with a bar, or lines in a log, from the checkpoint at `path` if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if trainer.step == 0 and path.exists():
        trainer.resume(path)
    with progress(console) as bar:
        task = bar.add_task("Training", total=trainer.plan.steps, completed=trainer.step)

        told = time.perf_counter()

        def advance(step: int) -> None:
            nonlocal told
            recent = trainer.losses[-20:]
            loss = sum(recent) / len(recent)
            score = f", Dice {trainer.scores[-1][1]:.3f}" if trainer.scores else ""
            bar.update(task, completed=step, description=f"Training, loss {loss:.3f}{score}")
            if not console.is_terminal and time.perf_counter() - told >= LINE_SECONDS:
                console.print(f"step {step} of {trainer.plan.steps}, loss {loss:.3f}{score}")
                told = time.perf_counter()

        trainer.run(crops, path, advance)
