"""nnU-Net's trainer with our network, optimiser and learning rate; all else is nnU-Net's."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from factorizer.nnunet.network import Switched, head_scales, network_arguments
from factorizer.segmentation.recipe import LEARNING_RATE, RECIPE, WEIGHT_DECAY
from factorizer.segmentation.training import rate_factor


class nnUNetTrainerFactorizer(nnUNetTrainer):
    """Trains a Swin Factorizer of the recipe's width on nnU-Net's patches, with its loss and augmentation.

    AdamW at the recipe's learning rate and decay; the rate goes by epochs: up, constant, down as a cosine.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net asks for this very signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.initial_lr = LEARNING_RATE
        self.weight_decay = WEIGHT_DECAY

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """For training, and, without deep supervision, for prediction."""
        arguments = network_arguments(
            configuration_manager.patch_size,
            configuration_manager.spacing,
            num_input_channels,
            num_output_channels,
        )
        return Switched(arguments, enable_deep_supervision)

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        if not self.enable_deep_supervision:
            return None
        manager = self.configuration_manager
        return head_scales(network_arguments(manager.patch_size, manager.spacing, 1, 1))

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        network = self.network.module if self.is_ddp else self.network
        getattr(network, "_orig_mod", network).deep_supervision = enabled  # of a compiled network

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=self.initial_lr,
            weight_decay=self.weight_decay,
            betas=RECIPE.betas,
            eps=RECIPE.adam_eps,
        )
        return optimizer, _Rate(optimizer, self.initial_lr, self.num_epochs)


class _Rate:
    """The recipe's learning rate by epochs: nnU-Net calls `step` with the number of the one that begins."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: float, epochs: int) -> None:
        self.optimizer, self.rate, self.epochs = optimizer, rate, epochs

    def step(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * rate_factor(epoch, self.epochs, RECIPE)
