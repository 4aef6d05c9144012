"""The U-net with stages of any kind."""

import pytest
import torch
from torch import nn

from factorizer import (
    Factorizer,
    SWMatricize,
    UNet,
)

SWIN = (SWMatricize, {"head_dim": 4, "patch_size": 4})


SMALL = {
    "in_channels": 2,
    "out_channels": 3,
    "encoder_depth": (1, 1, 1),
    "encoder_width": (8, 16, 32),
    "strides": (1, 2, 2),
    "decoder_depth": (1, 1),
}


def small(spatial_size=(16, 16), reshape=SWIN, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Factorizer(spatial_size=spatial_size, reshape=reshape, **{**SMALL, **kwargs})


@pytest.mark.parametrize("size", [(13,), (13, 18), (13, 18, 7), (1, 2, 3)])
def test_plain_unet(size):
    network = UNet(**SMALL, spatial_dims=len(size), num_deep_supr=2)
    fine, coarse = network(torch.randn(2, 2, *size))
    assert fine.shape == (2, 3, *size)
    assert coarse.shape == (2, 3, *((s + 1) // 2 for s in size))
    fine.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.encoder.parameters())


def test_unet_hands_its_stages_what_they_need():
    calls = []

    class Stage(nn.Module):
        def __init__(self, in_channels, out_channels, spatial_size, depth, tag):
            super().__init__()
            calls.append((in_channels, out_channels, spatial_size, depth, tag))
            self.conv = nn.Conv2d(in_channels, out_channels, 1)

        def forward(self, x):
            return self.conv(x)

    arguments = {**SMALL, "encoder_depth": (1, 2, 3), "decoder_depth": (4, 5)}
    UNet(**arguments, spatial_dims=2, spatial_size=(16, 9), block=(Stage, {"tag": "x"}))
    assert calls == [
        (8, 8, (16, 12), 1, "x"),
        (16, 16, (8, 6), 2, "x"),
        (32, 32, (4, 3), 3, "x"),
        (32, 16, (8, 6), 4, "x"),
        (16, 8, (16, 12), 5, "x"),
    ]


def test_skip_comes_before_the_upsampled():
    network = small()
    seen = []
    network.decoder.blocks[1].block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    skips = []
    network.encoder.blocks[0].register_forward_hook(lambda _, args, y: skips.append(y))
    network(torch.randn(1, 2, 16, 16))
    assert torch.equal(seen[0][:, :8], skips[0])


def test_one_level():
    network = Factorizer(2, 3, (8, 8), (1,), (8,), strides=(1,), decoder_depth=(), reshape=SWIN)
    assert network(torch.randn(1, 2, 8, 8)).shape == (1, 3, 8, 8)
    assert "encoder.blocks.0.block.pos_embed.pos" in network.state_dict()


@pytest.mark.parametrize(
    "options", [{}, {"local": 3}, {"strides": (1, 1, 2)}, {"stem": nn.Identity}], ids=str
)
def test_inference_writes_over_maps_of_its_own_alone(options):
    """The results are those of a pass that keeps all; the input and what a hook has seen stay as they are."""
    network = small((8, 12), num_deep_supr=2, **options, **({"in_channels": 8} if "stem" in options else {}))
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(2, network.in_channels, 9, 12)
    before, seen = x.clone(), []
    with network.encoder.blocks[0].register_forward_hook(lambda *args: seen.append(args[2])):
        expected = network(x)
        with torch.no_grad():
            results = [network(x)]
    with torch.no_grad():
        results.append(network(x))
    assert torch.equal(x, before)
    assert torch.equal(*seen)
    for result in results:
        assert all(map(torch.equal, result, expected))
