"""Mixer, block and stage: fused and unfused, any size, half precision."""

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from tests_support import Scaled
from torch import nn

from factorizer import (
    MLP,
    NMF,
    DepthwiseConv,
    FactMixer,
    FactorizerBlock,
    FactorizerStage,
    LayerNorm,
    Linear,
    Matricize,
    MatrixFactorization,
    PositionalEmbedding,
    SWMatricize,
)
from factorizer.layers.factorization.solvers import HALS

SWIN = {"head_dim": 4, "patch_size": 4}


def force_unfused(module):
    """A hook that does nothing; a part that is listened to runs on its own."""
    for part in module.modules():
        if isinstance(part, LayerNorm | NMF | MatrixFactorization):
            part.register_forward_hook(lambda *_: None)


def value_and_gradients(module, x):
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


RESHAPES = [
    (Matricize, {"num_heads": 1, "grid_size": 1}),
    (Matricize, {"head_dim": 4, "patch_size": 4}),
    (Matricize, {"head_dim": 8, "patch_size": 4, "shifts": 2}),
    (SWMatricize, {"head_dim": 4, "patch_size": 4}),
    (SWMatricize, {"num_heads": 2, "grid_size": 2}),
    (SWMatricize, {"head_dim": 2, "patch_size": 4, "shifts": [None, 1, 2, 3]}),
]


@pytest.mark.parametrize("reshape", RESHAPES, ids=lambda r: f"{r[0].__name__}-{r[1]}")
@pytest.mark.parametrize("size", [(8, 8), (12, 8), (7, 9)])
def test_fused_equals_unfused(reshape, size, backend, rel):
    torch.manual_seed(0)
    block = FactorizerBlock(8, (8, 8), reshape=reshape).double()
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    assert block.fused
    assert block.fact.fused
    fused = value_and_gradients(block, x)
    force_unfused(block)
    assert not block.fused
    assert not block.fact.fused
    for got, expected in zip(fused, value_and_gradients(block, x), strict=True):
        assert rel(got, expected) < 1e-9  # five iterations and their adjoint, in another order


@pytest.mark.parametrize(
    ("solver", "act"),
    [
        ("mu", nn.ReLU),
        ("hals", nn.ReLU),
        ("nncd", (nn.ReLU, {"inplace": True})),
        ("hals", nn.Identity),
        ("hals", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_fused_equals_unfused_for_every_solver_and_act(act, solver, dims, backend, rel):
    torch.manual_seed(1)
    options = {"solver": solver, "rank": 2, "num_iters": 3, "num_grad_steps": 2}
    mixer = FactMixer(8, 8, (8,) * dims, (SWMatricize, SWIN), act=act, **options).double()
    x = torch.randn(2, 8, *(8,) * dims, dtype=torch.float64)
    assert mixer.fused
    fused = value_and_gradients(mixer, x)
    force_unfused(mixer)
    for got, expected in zip(fused, value_and_gradients(mixer, x), strict=True):
        assert rel(got, expected) < 1e-9


@pytest.mark.parametrize(
    "parts",
    [
        {"act": nn.Softplus},
        {"solver": "cd"},
        {"solver": "mu-0"},
        {"solver": ("mu-0", "mu-1")},
        {"init": "svd"},
        {"verbose": True},
        {"factorize": (MatrixFactorization, {"solver": "ls"})},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(8, 8), (10, 8)])
def test_parts_that_the_operator_does_not_know_run_unfused(parts, size):
    mixer = FactMixer(8, 6, (8, 8), (SWMatricize, {"head_dim": 3, "patch_size": 4}), **parts)
    assert not mixer.fused
    assert mixer(torch.randn(2, 8, *size)).shape == (2, 6, *size)


def test_hooks_of_all_parts_are_called():
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    x = torch.randn(1, 8, 8, 8)
    silent = {"fact.reshape"}  # only what it does is called: its inverse has no hook
    for name, part in block.named_modules():
        if name in silent:
            continue
        called = []
        handle = part.register_forward_hook(lambda *_, called=called: called.append(1))
        y = block(x)
        handle.remove()
        assert called, name
        torch.testing.assert_close(y, block(x))


def mine(kind):
    """A subclass whose forward adds 1 to the result."""
    return type("Mine", (kind,), {"forward": lambda self, *args: kind.forward(self, *args) + 1})


def pruned(layer):
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


CHANGES = {
    "linear in another": lambda b: setattr(b.fact.in_proj, "linear", Scaled(b.fact.in_proj.linear)),
    "norm in another": lambda b: setattr(b.norm1, "norm", Scaled(b.norm1.norm)),
    "filter in another": lambda b: setattr(b.local, "conv", Scaled(b.local.conv)),
    "linear pruned": lambda b: pruned(b.mlp.block[0].linear),
    "filter pruned": lambda b: pruned(b.local.conv),
    "weight norm": lambda b: torch.nn.utils.parametrizations.weight_norm(b.fact.out_proj.linear),
    "another GELU": lambda b: b.mlp.block.__setitem__(1, nn.GELU(approximate="tanh")),
    "no GELU": lambda b: b.mlp.block.__delitem__(1),
    "one more": lambda b: b.mlp.block.append(nn.GELU()),
    "another mixer": lambda b: setattr(b.fact, "__class__", mine(FactMixer)),
    "another MLP": lambda b: setattr(b.mlp, "__class__", mine(MLP)),
    "another forward": lambda b: setattr(b.mlp, "forward", lambda x: 2 * b.mlp.block(x)),
    "no mixer": lambda b: setattr(b, "fact", nn.Identity()),
    "norms in a row": lambda b: setattr(b, "norm2", nn.Sequential(b.norm2, nn.ReLU())),
    "three linear layers": lambda b: b.mlp.block.append(Linear(8, 8)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_was_changed_is_called(change):
    """As if every part were called by itself, without and with the gradients that training has."""
    torch.manual_seed(0)
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN), local=3, mlp_ratio=1).double()
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    plain = block(x)
    CHANGES[change](block)
    block.double()
    expected = x + block.local.conv(x)
    expected = expected + block.fact(block.norm1(expected))
    expected = expected + block.mlp(block.norm2(expected))
    assert (expected - plain).abs().max() > 1e-6 or change == "weight norm"
    torch.testing.assert_close(block(x), expected)
    for _ in range(2):  # a pruned weight is made anew for each
        block(x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    with torch.no_grad():
        torch.testing.assert_close(block(x.clone(), overwrite=True), expected)


def test_another_rule_of_a_solver_is_used():
    class Frozen(HALS):
        def update(self, x, u, v, **kwargs):
            return u if self.factor == (0,) else super().update(x, u, v, **kwargs)

    changed, plain = NMF((8, 16), rank=1, solver=Frozen), NMF((8, 16), rank=1, solver=HALS)
    assert plain.kernel_options is not None
    assert changed.kernel_options is None


def test_methods_that_the_kernel_does_not_know_are_called():
    """Those of a solver and of a factorisation, of a class or of one object."""

    class Halved(HALS):
        def __call__(self, x, u, v, w):
            u, v = super().__call__(x, u, v, w)
            return u / 2, v

    class HalfProduct(NMF):
        def reconstruct(self, u, v):
            return super().reconstruct(u, v) / 2

    torch.manual_seed(0)
    start = torch.rand(8, 2), torch.rand(16, 2)
    x = torch.rand(3, 8, 16)
    plain = NMF((8, 16), rank=2, num_iters=1)
    solver, product = (NMF((8, 16), rank=2, num_iters=1) for _ in range(2))
    rule = solver.solvers[0].update
    solver.solvers[0].update = lambda *arguments: rule(*arguments) / 2**0.5
    product.reconstruct = lambda u, v: u @ v.mT / 2
    changed = (
        NMF((8, 16), rank=2, num_iters=1, solver=Halved), HalfProduct((8, 16), rank=2, num_iters=1), product,
    )  # fmt: skip
    for module in changed:
        torch.testing.assert_close(module(x, start=start), plain(x, start=start) / 2)
    u = plain.solvers[0].update(x, *start, None) / 2**0.5
    v = plain.solvers[0].update(x.mT, start[1], u, None) / 2**0.5
    torch.testing.assert_close(solver(x, start=start), u @ v.mT)


def test_another_inverse_of_the_windows_is_called():
    mixer = FactMixer(8, 8, (8, 8), (SWMatricize, SWIN))
    x = torch.randn(1, 8, 8, 8)
    plain, inverse = mixer.mix(x), mixer.reshape.inverse_forward
    mixer.reshape.inverse_forward = lambda *arguments: 2 * inverse(*arguments)
    torch.testing.assert_close(mixer.mix(x), 2 * plain)


def test_global_hooks_see_every_part():
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    seen = set()
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module)):
        block(torch.randn(1, 8, 8, 8))
    assert {block.norm1, block.norm1.norm, block.mlp, block.fact.in_proj.linear} <= seen


def test_a_foreign_reshape_needs_no_spatial_size():
    class Flat(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size[2:]
            self.output_size = (None, size[1], size[2] * size[3])

        def forward(self, x):
            return x.flatten(2)

        def inverse_forward(self, z):
            return z.unflatten(2, self.size)

    mixer = FactMixer(4, 4, (6, 6), reshape=Flat)
    assert not mixer.fused
    same = FactMixer(4, 4, (6, 6))
    same.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(mixer(x), same(x))


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_partial_windows_are_factorised_alone(solver, rel):
    torch.manual_seed(0)
    mixer = FactMixer(4, 4, (8,), (Matricize, {"head_dim": 4, "patch_size": 4}), solver=solver)
    mixer = mixer.double()
    nn.init.dirac_(mixer.in_proj.linear.weight)
    nn.init.dirac_(mixer.out_proj.linear.weight)
    nn.init.zeros_(mixer.out_proj.linear.bias)
    x = torch.rand(1, 4, 6, dtype=torch.float64)
    alone = NMF((4, 2), solver=solver).double()
    alone.init.u0, alone.init.v0 = mixer.factorize.init.u0, mixer.factorize.init.v0[:2]
    # With zeros in the other columns: C = 0 there, so V = 0 (up to eps) and A, B are the same.
    assert rel(mixer(x)[..., 4:], alone(x[..., 4:])) < 1e-12


def test_v0_of_windows_that_grow_is_interpolated(backend, rel):
    torch.manual_seed(0)
    mixer = FactMixer(4, 4, (4, 6), (Matricize, {"head_dim": 4, "grid_size": 1}), num_iters=1)
    grown = FactMixer(4, 4, (8, 6), (Matricize, {"head_dim": 4, "grid_size": 1}), num_iters=1)
    state = mixer.state_dict()
    v0 = state["factorize.init.v0"].T.reshape(1, 1, 4, 6)
    v0 = F.interpolate(v0, (8, 6), mode="bilinear").reshape(1, 48).T
    grown.load_state_dict(state | {"factorize.init.v0": v0})
    x = torch.randn(2, 4, 8, 6)
    assert rel(mixer(x), grown(x)) < 1e-6
    force_unfused(mixer)
    assert rel(mixer(x), grown(x)) < 1e-6


def test_v0_of_windows_of_fixed_size_is_left_alone(backend):
    torch.manual_seed(0)
    mixer = FactMixer(4, 4, (8, 8), (Matricize, SWIN))
    x = torch.randn(1, 4, 12, 16)
    tile = torch.cat([mixer(part) for part in x.split(8, 3)], 3)
    torch.testing.assert_close(mixer(x), tile)


def test_mixer_decomposes(rel):
    torch.manual_seed(0)
    mixer = FactMixer(8, 8, (8, 8), (SWMatricize, SWIN), rank=2)
    x = torch.randn(2, 8, 8, 8)
    u, v = mixer.decompose(x)
    assert u.shape == (2 * 2 * 2, 4, 4, 2)
    assert v.shape == (2 * 2 * 2, 4, 16, 2)
    y = mixer.out_proj(mixer.reshape.inverse_forward(u @ v.mT))
    assert rel(mixer(x), y) < 1e-5


@pytest.mark.parametrize("fused", [True, False])
def test_local_filter_comes_before_the_block(fused, rel):
    torch.manual_seed(0)
    arguments = {"reshape": (SWMatricize, SWIN)}
    with_filter = FactorizerBlock(8, (8, 8), local=3, **arguments).double()
    without = FactorizerBlock(8, (8, 8), **arguments).double()
    state = with_filter.state_dict()
    conv = DepthwiseConv(8, 3, spatial_dims=2).double()
    conv.load_state_dict({name: state.pop(f"local.{name}") for name in ("conv.weight", "conv.bias")})
    without.load_state_dict(state)  # the rest of a block's weights is what it was
    if not fused:
        force_unfused(with_filter)
        force_unfused(without)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    assert rel(with_filter(x), without(x + conv(x))) <= 1e-14


def test_stage_adapts_channels_and_embeds_positions():
    stage = FactorizerStage(6, 8, (8, 8), depth=2, pos_embed=PositionalEmbedding, reshape=(SWMatricize, SWIN))
    assert stage(torch.randn(2, 6, 8, 8)).shape == (2, 8, 8, 8)
    names = set(stage.state_dict())
    assert {"adapter.linear.weight", "pos_embed.pos"} <= names
    assert "adapter.linear.bias" not in names
    same = FactorizerStage(8, 8, (8, 8), reshape=(SWMatricize, SWIN))
    assert not any(name.startswith(("adapter", "pos_embed")) for name in same.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_on_an_all_zero_window(dtype, autocast, backend):
    torch.manual_seed(0)
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    x = torch.randn(1, 8, 8, 8)
    x[..., :4] = 0
    x.requires_grad_()
    expected = block(x)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = block(x) if autocast else block.to(dtype)(x.to(dtype))
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *block.parameters()])
    # Two linear maps, a normalisation and an activation, each rounded to half precision.
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps
