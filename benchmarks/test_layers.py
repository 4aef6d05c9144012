"""A Factorizer block, beside the blocks of MONAI's networks on the same features."""

import copy
from dataclasses import dataclass

import torch
from monai.networks.blocks import TransformerBlock, UnetResBlock
from monai.networks.blocks.segresnet_block import ResBlock
from monai.networks.nets.swin_unetr import BasicLayer
from torch import Tensor, nn

import factorizer

from .harness import (
    DEVICE,
    FUSED,
    Contender,
    Effort,
    Function,
    Under,
    affordable,
    assert_close,
    cases,
    extent,
    forward_backward,
    parameters,
)

CHANNELS = 32
_SIDES = {"tiny": (8,), "default": (32, 64), "paper": (64, 128)}


@dataclass(frozen=True)
class Features:
    """A feature map (1, CHANNELS, side, side, side)."""

    side: int

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, CHANNELS, *[self.side] * 3, generator=generator).to(DEVICE)

    def check(self, block: Under, mode: str) -> None:
        """A block adds its input to what it computes, and has norms and products beside the operator."""
        x = self.input()
        truth = Under("reference", copy.deepcopy(block.function).double())
        backward = mode == "forward+backward"
        expected = forward_backward(truth, x.double())()[:2] if backward else (truth(x.double()),)
        results = forward_backward(block, x)()[:2] if backward else (block(x),)
        for result, reference, what in zip(results, expected, ("result", "gradient of x"), strict=False):
            assert_close(result, reference, 1e-5, what)

    def describe(self, block: Function) -> dict:
        size = sum(p.numel() for p in parameters(block))
        return {"voxels": self.side**3, "x_bytes": self.input().nbytes, "parameters": size}


def _factorizer(backend: str):
    def build(problem: Features, effort: Effort) -> nn.Module:
        torch.manual_seed(0)
        reshape = (factorizer.SWMatricize, {"head_dim": 8, "patch_size": 8})
        block = factorizer.FactorizerBlock(CHANNELS, [problem.side] * 3, reshape=reshape)
        return Under(backend, block).to(DEVICE)

    return build


class _Tokens(nn.Module):
    """A block of (B, voxels, C), on a feature map."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.flatten(2).mT).mT.reshape(x.shape)


def _transformer(problem: Features, effort: Effort) -> nn.Module:
    affordable(effort, 4 * problem.side**6 * CHANNELS)
    block = TransformerBlock(CHANNELS, mlp_dim=2 * CHANNELS, num_heads=4, use_flash_attention=True)
    return _Tokens(block).to(DEVICE)


def _swin_layer(problem: Features, effort: Effort) -> nn.Module:
    return BasicLayer(CHANNELS, depth=2, num_heads=4, window_size=(8, 8, 8), drop_path=[0.0, 0.0]).to(DEVICE)


def _residual_block(problem: Features, effort: Effort) -> nn.Module:
    return ResBlock(3, CHANNELS, ("GROUP", {"num_groups": 8})).to(DEVICE)


def _dynunet_block(problem: Features, effort: Effort) -> nn.Module:
    return UnetResBlock(3, CHANNELS, CHANNELS, 3, 1, "instance").to(DEVICE)


CONTENDERS = (
    Contender("ours", _factorizer(FUSED), FUSED),
    Contender("reference", _factorizer("reference"), "reference"),
    Contender("relu", lambda problem, effort: torch.relu),
    Contender("TransformerBlock (UNETR)", _transformer),
    Contender("BasicLayer, 2 blocks (SwinUNETR)", _swin_layer),
    Contender("ResBlock (SegResNet)", _residual_block),
    Contender("UnetResBlock (DynUNet)", _dynunet_block),
)


def cases_of(size):
    for side in _SIDES[size]:
        # The default run leaves out the gradients of the larger features, to stay within ten minutes.
        modes = ("forward",) if (size, side) == ("default", 64) else ("forward", "forward+backward")
        yield from cases("block", [(extent(side), Features(side))], CONTENDERS, modes)


def test_layers(replay):
    replay()
