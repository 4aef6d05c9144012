"""The training loop, and the checkpoint that a run continues from and a network is loaded from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.optimizers import WarmupCosineSchedule
from torch import Tensor, nn

from factorizer.data import Crops, DataError, atomic
from factorizer.planning import Plan

SAVE_EVERY = 20  # steps that a killed run loses at most
WARM_UP = 0.05  # share of the steps
CLIP_NORM = 1.0


class Trainer:
    """A network in training: AdamW, linear warm-up then cosine, Dice and cross-entropy.

    Step k depends on the state after step k - 1 and on batch k, which is a function of the seed
    and k; so a run that was stopped and continued ends where an unbroken one does.
    """

    def __init__(self, plan: Plan, network: nn.Module) -> None:
        self.plan, self.network = plan, network
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay
        )
        self.schedule = WarmupCosineSchedule(
            self.optimizer,
            warmup_steps=math.ceil(WARM_UP * plan.steps),
            t_total=plan.steps,
            warmup_multiplier=0.1,
        )
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)
        self.losses: list[float] = []
        self.seconds = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def update(self, image: Tensor, label: Tensor) -> float:
        """One training step on image (B, C, *crop) and class indices (B, 1, *crop): its loss."""
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.network(image), label)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        self.optimizer.step()
        return loss.item()

    def run(self, crops: Crops, path: Path, advance: Callable[[int], None]) -> None:
        """Train to the plan's last step, saving to `path`; `advance` is told of each step done.

        Raises FloatingPointError where the loss is no longer finite.
        """
        while self.step < self.plan.steps:
            start = time.perf_counter()
            loss = self.update(*crops[self.step])
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {self.step + 1}")
            self.schedule.step()
            self.losses.append(loss)
            self.seconds += time.perf_counter() - start
            if self.step % SAVE_EVERY == 0 or self.step == self.plan.steps:
                self.save(path)
            advance(self.step)

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all: plain data and tensors only."""
        state = {
            "plan": asdict(self.plan),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        with atomic(path) as temporary:
            torch.save(state, temporary)

    def load(self, state: dict[str, Any]) -> None:
        """Continue from what `read_checkpoint` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses = list(state["losses"])
        self.seconds = state["seconds"]


def read_checkpoint(path: str | Path) -> tuple[Plan, dict[str, Any]]:
    """The plan and the state in a checkpoint. Nothing in the file is executed.

    Raises FileNotFoundError where there is none, DataError where the file is not one of ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return Plan(**state["plan"]), state
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no error of its own for a file of another kind
        raise DataError(f"{path}: not a checkpoint of this program ({error})") from error
