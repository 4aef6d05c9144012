"""The U-net with stages of any kind."""

import weakref

import pytest
import torch
from tests_support import Scaled
from torch import nn

from factorizer import (
    Factorizer,
    SubvoxelHead,
    SWMatricize,
    UNet,
)
from factorizer.layers.block import FactorizerStage
from factorizer.models.unet import DecoderBlock

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


@pytest.mark.parametrize(
    ("size", "stem_stride"), [((13,), 2), ((13, 18), (2, 1)), ((13, 18, 7), (1, 2, 2)), ((5, 9), 3)]
)
def test_stages_on_a_coarser_grid(size, stem_stride):
    """Logits come back on the input's grid, those of the next head on half of it."""
    seen = []
    network = small(
        size, (SWMatricize, {"head_dim": 4, "patch_size": 2}), num_deep_supr=2, stem_stride=stem_stride
    )
    network.encoder.blocks[0].register_forward_hook(lambda module, args, y: seen.append(y.shape[2:]))
    axes = [stem_stride] * len(size) if isinstance(stem_stride, int) else stem_stride
    for extent in (size, tuple(s + 3 for s in size)):
        fine, coarse = network(torch.randn(2, 2, *extent))
        assert fine.shape == (2, 3, *extent)
        assert coarse.shape == (2, 3, *((s + 1) // 2 for s in extent))
        # Padded for the stem's stride and the first of the coarser grid's, which is 2.
        assert seen.pop() == torch.Size(-(-s // (2 * n)) * 2 for s, n in zip(extent, axes, strict=True))
    fine.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.heads[0].parameters())


@pytest.mark.parametrize("scale", [1, (2, 1, 3)])
def test_subvoxel_head_is_a_strided_transposed_convolution(scale):
    """Without its filters; x and its blocks lie where torch's transposed convolution puts them."""
    head = SubvoxelHead(4, 3, scale=scale)
    with torch.no_grad():
        for filters in (head.coarse, head.fine):
            filters.conv.weight.zero_()
            filters.conv.bias.zero_()
    same = nn.ConvTranspose3d(4, 3, head.scale, head.scale)
    weight = head.linear.weights[0].unflatten(0, (3, -1)).permute(2, 0, 1)
    same.weight.data.copy_(weight.reshape(same.weight.shape))
    bias = head.linear.linear.bias.data.view(3, -1)
    bias[:] = bias[:, :1]
    same.bias.data.copy_(bias[:, 0])
    x = torch.randn(2, 4, 3, 4, 5)
    torch.testing.assert_close(head(x), same(x))


def test_wrong_strides_of_the_stem():
    with pytest.raises(ValueError, match="stem_stride"):
        small((8, 8), stem_stride=0)
    with pytest.raises(ValueError, match="stem_stride"):
        small((8, 8), stem_stride=(2, 2, 2))


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
        (8, 8, (16, 10), 1, "x"),
        (16, 16, (8, 5), 2, "x"),
        (32, 32, (4, 3), 3, "x"),
        (32, 16, (8, 5), 4, "x"),
        (16, 8, (16, 10), 5, "x"),
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


def test_inference_frees_maps_that_no_head_reads(monkeypatch):
    """While a stage of the decoder runs the coarser outputs are gone, but for those of heads."""
    outputs, alive = [], []
    take, stage = DecoderBlock.take, FactorizerStage.after_adapter

    def taken(self, maps, overwrite=False):
        assert overwrite
        y = take(self, maps, overwrite)
        outputs.append(weakref.ref(y))
        return y

    def staged(self, x, overwrite=False):
        alive.append(sum(output() is not None for output in outputs))
        return stage(self, x, overwrite)

    monkeypatch.setattr(DecoderBlock, "take", taken)
    monkeypatch.setattr(FactorizerStage, "after_adapter", staged)
    for heads, kept in ((0, 0), (1, 0), (2, 1)):
        outputs.clear()
        with torch.no_grad():
            small((8, 12), num_deep_supr=heads)(torch.randn(1, 2, 8, 12))
        assert len(outputs) == 2
        assert alive[-1] == kept


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


class Keeping(nn.Module):
    """Keeps what it returns, and what that was."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.kept = []

    def forward(self, x):
        y = self.made(x)
        self.kept.append((y, y.clone()))
        return y


class KeepingStem(Keeping):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.register_buffer("returned", torch.randn(2, out_channels, 8, 12))

    def made(self, x):
        return self.returned


class KeepingEmbedding(Keeping):
    def made(self, x):
        return x + 1


class KeepingDown(Keeping):
    def __init__(self, in_channels, out_channels, kernel_size, stride):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride)

    def made(self, x):
        return self.conv(x)


@pytest.mark.parametrize("local", [None, 3])
@pytest.mark.parametrize(
    "part",
    [{"stem": KeepingStem}, {"pos_embed": KeepingEmbedding}, {"downsample": KeepingDown}],
    ids=str,
)
def test_inference_leaves_what_parts_keep(part, local):
    network = small((8, 12), **part, local=local).eval()
    x = torch.randn(2, 2, 8, 12)
    with torch.no_grad():
        first = network(x)
        torch.testing.assert_close(network(x), first)
    kept = [pair for module in network.modules() if isinstance(module, Keeping) for pair in module.kept]
    assert len(kept) > 1
    assert all(torch.equal(now, then) for now, then in kept)


def test_a_stage_with_a_forward_of_its_own_is_called_in_the_decoder():
    class Mine(FactorizerStage):
        calls = 0

        def forward(self, x, overwrite=False):
            Mine.calls += 1
            return super().forward(x, overwrite)

    network = small((8, 12))
    for module in network.modules():
        if type(module) is FactorizerStage:
            module.__class__ = Mine
    network(torch.randn(1, 2, 8, 12))
    assert Mine.calls == sum(isinstance(m, Mine) for m in network.modules())


class KeepingScaled(Keeping, Scaled):
    def __init__(self, base):
        Scaled.__init__(self, base)
        self.kept = []

    made = Scaled.forward


def test_an_adapters_linear_in_another_is_called():
    """Without and with gradients, and what it returned is left as it was."""
    network, expected = small((8, 12)), small((8, 12))
    for block, theirs in zip(network.decoder.blocks, expected.decoder.blocks, strict=True):
        theirs.block.adapter.linear.weight.data *= 3
        block.block.adapter.linear = KeepingScaled(block.block.adapter.linear)
    x = torch.randn(2, 2, 8, 12)
    y = network(x)
    torch.testing.assert_close(y, expected(x))
    y.square().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(network(x), y)
    for block in network.decoder.blocks:
        assert block.block.adapter.linear.scale.grad is not None
        assert all(torch.equal(now, then) for now, then in block.block.adapter.linear.kept)
