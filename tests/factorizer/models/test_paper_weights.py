"""Checkpoints of the paper's time: a network with that layout and today's give the same result."""

import pytest
import torch
from torch import nn

import factorizer_kernels as fk
from factorizer import MLP, NMF, Factorizer, LayerNorm, Linear, PositionalEmbedding, SWMatricize
from factorizer.models.paper_weights import PAPER_EPS, convert_paper_checkpoint, load_paper_checkpoint

WIDTH, DEPTH, SIZE = (8, 16, 32), (1, 2, 1), (16, 16)
CUT = {"head_dim": 8, "patch_size": 4}


class _Residual(nn.Module):
    def __init__(self, channels, part):
        super().__init__()
        self.fn = nn.Sequential(LayerNorm(channels), part)

    def forward(self, x):
        return x + self.fn(x)


class _PaperMixer(nn.Module):
    """Linear, matricise, ReLU, NMF with eps 1e-8, back, linear."""

    def __init__(self, channels, size):
        super().__init__()
        self.in_proj = Linear(channels, channels, bias=False)
        self.matricize = SWMatricize((None, channels, *size), **CUT)
        self.factorize = NMF((8, 16), rank=1)
        self.out_proj = Linear(channels, channels)

    def forward(self, x):
        z = self.matricize(self.in_proj(x)).relu()
        z = fk.nmf(z, self.factorize.init.u0, self.factorize.init.v0, eps=1e-8)
        return self.out_proj(self.matricize.inverse_forward(z))


class _PaperBlock(nn.Module):
    def __init__(self, in_channels, channels, size, pos_embed=False):
        super().__init__()
        if in_channels != channels:
            self.adapter = nn.Sequential(Linear(in_channels, channels, bias=False), nn.Dropout(0.1))
        if pos_embed:
            self.pos_embed = PositionalEmbedding(channels, size)
        self.blocks = nn.ModuleDict(
            {
                "nmf": _Residual(channels, _PaperMixer(channels, size)),
                "mlp": _Residual(channels, _mlp(channels)),
            }
        )

    def forward(self, x):
        for name in ("adapter", "pos_embed"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        for block in self.blocks.values():
            x = block(x)
        return x


def _mlp(channels):
    return MLP(channels, ratio=2)


class _PaperNetwork(nn.Module):
    """The wiring and the names of the paper's time, for two or more levels in the plane."""

    def __init__(self, num_heads=1):
        super().__init__()
        sizes = [tuple(s // 2**i for s in SIZE) for i in range(3)]
        self.stem = nn.Conv2d(2, WIDTH[0], 3, padding=1, bias=False)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.blocks, self.decoder.blocks = nn.ModuleList(), nn.ModuleList()
        for i, (width, depth) in enumerate(zip(WIDTH, DEPTH, strict=True)):
            level = nn.Module()
            down = [nn.Conv2d(WIDTH[i - 1], width, 2, stride=2)] if i else []
            blocks = [_PaperBlock(width, width, sizes[i], pos_embed=i == 2 and k == 0) for k in range(depth)]
            level.blocks = nn.Sequential(*down, *blocks)
            self.encoder.blocks.append(level)
        for i, width in enumerate(WIDTH[1::-1]):
            level = nn.Module()
            level.upsample = nn.ConvTranspose2d(WIDTH[2 - i], width, 2, stride=2)
            level.blocks = nn.Sequential(_PaperBlock(2 * width, width, sizes[1 - i]))
            self.decoder.blocks.append(level)
        self.heads = nn.ModuleList(nn.Conv2d(WIDTH[j], 3, 1) for j in range(num_heads))

    def forward(self, x):
        features = []
        x = self.stem(x)
        for level in self.encoder.blocks:
            x = level.blocks(x)
            features.append(x)
        outputs = [x]
        for level, skip in zip(self.decoder.blocks, features[1::-1], strict=True):
            x = level.blocks(torch.cat([skip, level.upsample(x)], 1))
            outputs.insert(0, x)
        return [head(y) for head, y in zip(self.heads, outputs, strict=False)]


def _today(**options):
    return Factorizer(
        2, 3, SIZE, encoder_depth=DEPTH, encoder_width=WIDTH, strides=(1, 2, 2), decoder_depth=(1, 1),
        reshape=(SWMatricize, CUT), rank=1, mlp_ratio=2, **options,
    )  # fmt: skip


@pytest.mark.parametrize("num_heads", [1, 2])
def test_same_network(num_heads):
    torch.manual_seed(0)
    paper = _PaperNetwork(num_heads).double().eval()
    x = 1e-3 * torch.randn(2, 2, *SIZE, dtype=torch.float64)  # small: eps has a say
    expected = paper(x)
    network = _today(num_deep_supr=2 if num_heads == 2 else False).double().eval()
    load_paper_checkpoint(network, paper.state_dict())
    result = network(x)
    for ours, theirs in zip(result if num_heads == 2 else [result], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert {s.eps for m in network.modules() if isinstance(m, NMF) for s in m.solvers} == {PAPER_EPS}


def test_lightning_checkpoint():
    """The network's part of a trainer's checkpoint, whatever it is called there."""
    state = _PaperNetwork().state_dict()
    lightning = {"epoch": 3, "state_dict": {f"network.{name}": t for name, t in state.items()}}
    lightning["state_dict"]["loss.weight"] = torch.ones(3)
    converted = convert_paper_checkpoint(lightning)
    assert converted.keys() == _today().state_dict().keys()
    assert len(converted) == len(state)


@pytest.mark.parametrize(
    ("checkpoint", "error", "message"),
    [
        (3, TypeError, "checkpoint must be a mapping"),
        ({}, ValueError, "checkpoint must hold a network with a stem"),
        ({"stem.weight": 1}, TypeError, "checkpoint must hold tensors, got int for stem.weight"),
        ({"stem.weight": torch.ones(1), "tail.weight": torch.ones(1)}, ValueError, "what is 'tail.weight'"),
        ({"stem.weight": torch.ones(1), "encoder.blocks.0.blocks.0.x": 0}, ValueError, "what is 'encoder.bl"),
    ],
)
def test_other_layouts(checkpoint, error, message):
    with pytest.raises(error, match=message):
        convert_paper_checkpoint(checkpoint)


def test_today_is_not_taken_for_the_paper():
    with pytest.raises(ValueError, match="layout of the paper's time"):
        convert_paper_checkpoint(_today().state_dict())
