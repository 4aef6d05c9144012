"""Whole networks, 4 -> 3 channels: the Factorizer's presets beside MONAI's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from monai.networks.nets import UNETR, DynUNet, SegResNet, SwinUNETR, UNet
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import factorizer
import factorizer_kernels as fk

from .harness import (
    DEVICE,
    FUSED,
    Contender,
    Effort,
    Function,
    Under,
    assert_close,
    cases,
    extent,
    forward_backward,
    matmul_precision,
    parameters,
)
from .runtimes import in_runtime

IN, OUT = 4, 3
_SIDES = {"tiny": 32, "default": 64, "paper": 128}
_CHECKED_SIDE = 32  # the network is checked on a corner: in float64 the whole would not fit beside it


@dataclass(frozen=True)
class Volume:
    """Images (batch, IN, side, side, side)."""

    side: int
    batch: int = 1

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.batch, IN, *[self.side] * 3, generator=generator).to(DEVICE)

    def _corner(self) -> Tensor:
        return self.input()[(..., *[slice(_CHECKED_SIDE)] * 3)]

    def check(self, network: Under, mode: str) -> None:
        """Ten stages one behind the other add up their roundings, and norms amplify them."""
        x = self._corner()
        truth = Under("reference", copy.deepcopy(network.function).double())
        expected = forward_backward(truth, x.double())()[:2]
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # of ten bits, torch's default
        with exact, matmul_precision("highest"):
            results = forward_backward(network, x)()[:2]
        for result, reference, tolerance, what in zip(
            results, expected, (1e-4, 1e-3), ("logits", "gradient of x"), strict=True
        ):
            assert_close(result, reference, tolerance, what)

    def describe(self, network: nn.Module) -> dict:
        """FLOPs are those that PyTorch counts: of matrix products, convolutions and attention. An operator
        with kernels counts as the reference's products."""
        if not isinstance(network, nn.Module):  # a runtime's: PyTorch sees nothing of it
            return {"voxels": self.batch * self.side**3}
        plain = Under("reference", network.function if isinstance(network, Under) else network).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            plain(self.input())
        return {
            "voxels": self.batch * self.side**3,
            "parameters": sum(p.numel() for p in parameters(network)),
            "flops": counter.get_total_flops(),
        }


Build = Callable[[Volume, Effort], nn.Module]


def _factorizer(name: str, backend: str = FUSED) -> Build:
    def build(problem: Volume, effort: Effort) -> nn.Module:
        torch.manual_seed(0)
        network = factorizer.preset(name, in_channels=IN, out_channels=OUT, spatial_size=[problem.side] * 3)
        return Under(backend, network).to(DEVICE)

    return build


def _monai(build: Callable[[int], nn.Module], smallest: int = 16) -> Build:
    def sized(problem: Volume, effort: Effort) -> nn.Module:
        if problem.side < smallest:
            pytest.skip(f"needs {extent(smallest)} voxels")
        return build(problem.side).to(DEVICE)

    return sized


_DYNUNET = {
    "kernel_size": [3] * 5,
    "strides": [1, 2, 2, 2, 2],
    "upsample_kernel_size": [2] * 4,
    "res_block": True,
}

_unet = _monai(lambda side: UNet(3, IN, OUT, (32, 64, 128, 256, 512), (2, 2, 2, 2)), 32)


def _exported(name: str, build: Build) -> Callable[[Volume, Effort], Function]:
    def exported(problem: Volume, effort: Effort) -> Function:
        if DEVICE.type != "cpu":
            pytest.skip("on a CPU alone")
        return in_runtime(name, build(problem, effort), problem.input())

    return exported


# The sizes that MONAI's networks have in the literature on brain tumours.
CONTENDERS = (
    Contender("ours", _factorizer("swin-brats"), FUSED),
    Contender("reference", _factorizer("swin-brats", "reference"), "reference", ("forward",)),
    *(
        Contender(f"ours, {name}", _factorizer(name), FUSED, ("forward",))
        for name in ("local-brats", "global-brats", "swin-isles22")
    ),
    Contender("UNet", _unet),
    Contender("SegResNet-16", _monai(lambda side: SegResNet(3, 16, IN, OUT))),
    Contender("SegResNet", _monai(lambda side: SegResNet(3, 32, IN, OUT))),
    Contender("DynUNet", _monai(lambda side: DynUNet(3, IN, OUT, **_DYNUNET))),
    Contender("UNETR", _monai(lambda side: UNETR(IN, OUT, side))),
    Contender("SwinUNETR", _monai(lambda side: SwinUNETR(IN, OUT, feature_size=48), 64)),
    *(
        Contender(f"{network} in {label}", _exported(name, build), modes=("forward",))
        for label, name in (("ONNX Runtime", "onnxruntime"), ("OpenVINO", "openvino"))
        for network, build in (("UNet", _unet), ("reference", _factorizer("swin-brats", "reference")))
    ),
)


def cases_of(size):
    side = _SIDES[size]
    single = [(extent(side), Volume(side))]
    pair = [(f"batch 2, {extent(side)}", Volume(side, 2))]
    both = cases("network", single, CONTENDERS, ("forward", "training step"))
    return both + cases("network", pair, CONTENDERS, ("forward",))


def test_networks(replay):
    fk.keep_freed_memory()  # as the command line does, for all contenders
    replay()
