"""The layers: values, gradients, sizes, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
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
from factorizer.layers import pointwise
from factorizer.layers.parts import build
from factorizer.layers.resize import crop_to, pad_to

SWIN = {"head_dim": 4, "patch_size": 4}


def force_unfused(module):
    """A hook that does nothing; a part that is listened to runs on its own."""
    for part in module.modules():
        if isinstance(part, LayerNorm | NMF | MatrixFactorization):
            part.register_forward_hook(lambda *_: None)


def randomise(module):
    """Every parameter away from values at which an error could hide (ones, zeros)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


def value_and_gradients(module, x):
    x = x.detach().clone().requires_grad_()
    y = module(x)
    weight = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


@pytest.fixture(params=["one block", "runs of voxels", "groups of items"])
def block_size(request, monkeypatch):
    """The three ways in which the pointwise chains cut their input."""
    elements = {"one block": 2**18, "runs of voxels": 9, "groups of items": 500}[request.param]
    monkeypatch.setattr(pointwise, "_CPU_BLOCK_PER_THREAD", elements)


# --- pointwise layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 6, 20), (5, 6, 3, 7), (2, 6, 3, 4, 5)])
def test_pointwise_layers_equal_the_plain_formulas(size, block_size, rel):
    torch.manual_seed(0)
    x = torch.randn(size, dtype=torch.float64)

    def channels_last(function):
        return lambda x: function(x.movedim(1, -1)).movedim(-1, 1)

    norm, mlp = randomise(LayerNorm(6).double()), randomise(MLP(6, ratio=2).double())
    linear, no_bias = randomise(Linear(6, 4).double()), randomise(Linear(6, 4, False).double())
    first, second = mlp.block[0].linear, mlp.block[3].linear

    def plain_mlp(x):
        hidden = F.gelu(F.linear(x, first.weight[..., 0], first.bias))
        return F.linear(hidden, second.weight[..., 0], second.bias)

    plain = {
        norm: lambda x: F.layer_norm(x, (6,), norm.norm.weight, norm.norm.bias, 1e-5),
        linear: lambda x: F.linear(x, linear.linear.weight[..., 0], linear.linear.bias),
        no_bias: lambda x: F.linear(x, no_bias.linear.weight[..., 0]),
        mlp: plain_mlp,
    }
    for module, function in plain.items():
        result = value_and_gradients(module, x)
        module.forward = channels_last(function)
        for got, expected in zip(result, value_and_gradients(module, x), strict=True):
            assert rel(got, expected) < 1e-13  # float64, a few roundings of sums of ~100 terms


@pytest.mark.parametrize("kwargs", [{"elementwise_affine": False}, {"bias": False}, {"eps": 0.1}])
def test_layer_norm_takes_the_arguments_of_torch(kwargs, rel):
    x = torch.randn(2, 5, 3, 4)
    module = LayerNorm(5, **kwargs)
    assert rel(module(x), module.norm(x.movedim(1, -1)).movedim(-1, 1)) < 1e-6


def test_layer_norm_of_half_precision_is_computed_in_float32(rel):
    torch.manual_seed(0)
    x = (300 + 100 * torch.randn(2, 8, 5)).half()  # whose squares float16 cannot hold
    assert rel(LayerNorm(8).half()(x), LayerNorm(8)(x.float())) < torch.finfo(torch.float16).eps


@pytest.mark.parametrize(("axes", "kernel_size"), [(1, 5), (2, (3, 7)), (3, 3), (3, (1, 3, 5))])
@pytest.mark.parametrize("bias", [False, True])
def test_depthwise_conv_is_torchs(axes, kernel_size, bias, rel):
    """In its parameters, their initial values, and what it computes."""
    convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    layer = DepthwiseConv(6, kernel_size, bias, axes)
    torch.manual_seed(0)
    padding = kernel_size // 2 if isinstance(kernel_size, int) else tuple(k // 2 for k in kernel_size)
    theirs = convolution(6, 6, kernel_size, padding=padding, groups=6, bias=bias)
    assert all(map(torch.equal, layer.parameters(), theirs.parameters()))
    layer.conv.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 6, *(9, 8, 7)[:axes])
    results = (value_and_gradients(module.double(), x.double()) for module in (layer, theirs))
    for ours, expected in zip(*results, strict=True):
        assert rel(ours, expected) < 1e-14


def test_chains_pass_gradcheck(block_size):
    torch.manual_seed(0)

    def random(*size):
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    check = torch.autograd.gradcheck
    x, norm, linear = random(2, 3, 2, 2), (random(3), random(3)), (random(4, 3), random(4))
    assert check(lambda x, *n: pointwise.norm(x, n, 1e-5), (x, *norm))
    assert check(lambda x, *w: pointwise.linear(x, w), (x, *linear))
    chain = lambda x, a, b, c, d: pointwise.norm_linear(x, (a, b), (c, d), 1e-5)  # noqa: E731
    assert check(chain, (x, *norm, *linear))
    y, back = random(2, 4, 2, 2), (random(3, 4), random(3))
    chain = lambda y, x, a, b, c, d, e, f, g, h: pointwise.linear_norm_mlp(  # noqa: E731
        y, x, (a, b), (c, d), (e, f), (g, h), 1e-5
    )
    assert check(chain, (y, x, *back, *norm, *linear, *back))


def test_autograd_keeps_little_more_than_the_input_of_a_block():
    block = FactorizerBlock(8, (16, 16, 16), reshape=(SWMatricize, SWIN))
    x = torch.randn(1, 8, 16, 16, 16, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    size = x.numel() * x.element_size()
    # x, and the factorisation's input and output; 5 % for weights and factors.
    assert sum(kept.values()) < 3.05 * size


def test_empty_batch():
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    assert block(torch.zeros(0, 8, 8, 8)).shape == (0, 8, 8, 8)


def test_a_batch_is_its_items(rel):
    torch.manual_seed(0)
    block = FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))
    x = torch.randn(3, 8, 8, 8)
    assert rel(block(x), torch.cat([block(item) for item in x.split(1)])) < 1e-6


def test_positional_embedding_is_added_and_interpolated(rel):
    torch.manual_seed(0)
    module = PositionalEmbedding(3, (4, 6))
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(module(x), x + module.pos)
    x = torch.randn(2, 3, 8, 6)
    resized = F.interpolate(module.pos, (8, 6), mode="bilinear")
    assert rel(module(x), x + resized) < 1e-7
    module(x).sum().backward()
    assert module.pos.grad.abs().min() > 0


# --- matricise -----------------------------------------------------------------------------------


@pytest.mark.golden_kind("matricize")
def test_matricize_golden(golden, backend, rel):
    meta = golden["meta"]
    options = {k: meta[k] for k in ("head_dim", "num_heads", "patch_size", "grid_size") if k in meta}
    size = (None, *meta["size"][1:])
    if meta["kind"] == "matricize":
        module = Matricize(size, shifts=meta["shifts"], **options)
    else:
        module = SWMatricize(size, shifts=meta["shifts"], **options)
    assert module.output_size[1:] == tuple(golden["y"].shape[1:])
    assert torch.equal(module(golden["x"]), golden["y"])
    assert rel(module.inverse_forward(golden["z"]), golden["inverse_z"]) < 1e-15


def test_default_shifts_are_none_and_half_a_patch():
    x = torch.randn(1, 4, 8, 12)
    plain = SWMatricize((None, 4, 8, 12), head_dim=2, patch_size=(4, 6))
    named = SWMatricize((None, 4, 8, 12), head_dim=2, patch_size=(4, 6), shifts=[None, (2, 3)])
    assert torch.equal(plain(x), named(x))


def test_matricize_has_one_shift():
    x = torch.randn(1, 4, 8, 8)
    module = Matricize((None, 4, 8, 8), num_heads=2, grid_size=2, shifts=1)
    rolled = Matricize((None, 4, 8, 8), num_heads=2, grid_size=2)(x.roll((1, 1), (2, 3)))
    assert torch.equal(module(x), rolled)
    assert torch.equal(module.inverse_forward(module(x)), x)


@pytest.mark.parametrize("options", [SWIN, {"num_heads": 2, "grid_size": 3}])
@pytest.mark.parametrize("size", [(6, 6), (7, 13), (3, 12)])
def test_matricize_takes_any_size(options, size, rel):
    x = torch.randn(2, 8, *size)
    module = SWMatricize((None, 8, 12, 12), **options)
    assert rel(module.inverse_forward(module(x), size), x) < 1e-7
    fitted = module.fitted_size(size)
    assert torch.equal(module(x), module(F.pad(x, (0, fitted[1] - size[1], 0, fitted[0] - size[0]))))


# --- mixer, block, stage -------------------------------------------------------------------------

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
    silent = {"fact.factorize.init", *(n for n, m in block.named_modules() if n.endswith("linear"))}
    silent |= {n for n, m in block.named_modules() if n.endswith(".norm")}
    silent |= {"fact.reshape"}  # only what it does is called: its inverse has no hook
    for name, part in block.named_modules():
        if name in silent:
            continue
        called = []
        handle = part.register_forward_hook(lambda *_, called=called: called.append(1))
        y = block(x)
        handle.remove()
        assert called, name
        torch.testing.assert_close(y, block(x))


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
    arguments = {"reshape": (SWMatricize, SWIN)}
    with_filter = randomise(FactorizerBlock(8, (8, 8), local=3, **arguments).double())
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


# --- parts and refusals --------------------------------------------------------------------------


def test_build_takes_the_three_forms():
    assert isinstance(build("act", nn.ReLU), nn.ReLU)
    assert build("act", (nn.LeakyReLU, {"negative_slope": 0.3})).negative_slope == 0.3
    assert build("act", [nn.LeakyReLU, [0.3]]).negative_slope == 0.3
    conv = build("stem", (nn.Conv2d, (5,)), 2, 3, kernel_size=1)
    assert (conv.in_channels, conv.kernel_size) == (2, (5, 5))
    assert build("stem", (nn.Conv2d, {"bias": False}), 2, 3, kernel_size=1).bias is None


@pytest.mark.parametrize("part", ["ReLU", None, (nn.ReLU,), (nn.ReLU, "x"), (nn.ReLU, {}, {})])
def test_build_refuses_the_rest(part):
    with pytest.raises(TypeError, match=r"act must be a class, or a pair"):
        build("act", part)


SWIN_MIXER = (8, 8, (8, 8), (SWMatricize, SWIN))


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (lambda: Linear(0, 3), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: Linear(3, 2.0), TypeError, "out_channels must be an int, got 2.0"),
        (lambda: Linear(3, 2)(torch.zeros(1, 4, 5)), ValueError, "must have 3 channels.* got 4"),
        (lambda: Linear(3, 2)(torch.zeros(1, 3)), ValueError, r"spatial axes, got shape \(1, 3\)"),
        (lambda: Linear(3, 2)(torch.zeros(1, 3, 5).int()), TypeError, "floating-point.*int32"),
        (lambda: Linear(3, 2)(torch.zeros(1, 3, 5).double()), TypeError, "float32.*got.*float64"),
        (lambda: Linear(3, 2)([1.0]), TypeError, "x must be a tensor, got list"),
        (lambda: LayerNorm(3)(torch.zeros(1, 4, 5)), ValueError, "must have 3 channels.* got 4"),
        (lambda: DepthwiseConv(0), ValueError, "channels must be at least 1, got 0"),
        (lambda: DepthwiseConv(3, 4), ValueError, r"kernel_size must be odd.* got \(4, 4, 4\)"),
        (lambda: DepthwiseConv(3, (3, 3)), ValueError, "kernel_size must have 3 entries"),
        (lambda: DepthwiseConv(3, 3.0), TypeError, "kernel_size must be an int, got 3.0"),
        (lambda: DepthwiseConv(3, spatial_dims=4), ValueError, "spatial_dims must be 1, 2 or 3, got 4"),
        (lambda: DepthwiseConv(3)(torch.zeros(1, 4, 5, 5, 5)), ValueError, "must have 3 channels.* got 4"),
        (lambda: DepthwiseConv(3)(torch.zeros(1, 3, 5, 5)), ValueError, "3 spatial axes"),
        (lambda: MLP(4, ratio=0), ValueError, "ratio must be positive, got 0"),
        (lambda: MLP(4, dropout=1.0), ValueError, r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: MLP(4, dropout="0"), TypeError, "dropout must be a number, got '0'"),
        (lambda: PositionalEmbedding(4, 8), TypeError, "spatial_size must be a sequence"),
        (
            lambda: PositionalEmbedding(4, (8, 8))(torch.zeros(1, 4, 8)),
            ValueError,
            "2 spatial axes",
        ),
        (lambda: PositionalEmbedding(4, (1, 2, 3, 4)), ValueError, "spatial_size must have 1 or 2"),
        (lambda: SWMatricize((None, 8)), ValueError, r"input_size\[1:\] must have 2 or 3"),
        (
            lambda: SWMatricize((None, 8, 8), head_dim=3, patch_size=4),
            ValueError,
            "head_dim=3 must divide the 8 channels",
        ),
        (lambda: SWMatricize((None, 8, 8), head_dim=4), ValueError, "grid_size and patch_size"),
        (
            lambda: SWMatricize((None, 8, 8), num_heads=1, head_dim=4, patch_size=4),
            ValueError,
            "exactly one of num_heads and head_dim",
        ),
        (
            lambda: SWMatricize((None, 8, 8, 8), head_dim=4, patch_size=(2, 2, 2)),
            ValueError,
            "patch_size must have one entry per spatial axis",
        ),
        (
            lambda: SWMatricize((None, 8, 8), head_dim=4, patch_size=0),
            ValueError,
            "patch_size must be at least 1, got 0",
        ),
        (
            lambda: Matricize((None, 8, 8), head_dim=4, patch_size=4, shifts=[None, 2]),
            (TypeError, ValueError),
            "shifts must",
        ),
        (
            lambda: Matricize((None, 8, 8), head_dim=4, patch_size=4)(torch.zeros(1, 6, 8)),
            ValueError,
            "must have 8 channels.* got 6",
        ),
        (
            lambda: Matricize((None, 8, 8), head_dim=4, patch_size=4)(torch.zeros(1, 8, 8, 8)),
            ValueError,
            "1 spatial axes, got shape",
        ),
        (
            lambda: FactMixer(*SWIN_MIXER)(torch.zeros(1, 6, 8, 8)),
            ValueError,
            "FactMixer: x must have 8 channels",
        ),
        (lambda: FactMixer(*SWIN_MIXER)(torch.zeros(1, 8, 8)), ValueError, "2 spatial axes"),
        (lambda: FactMixer(8, 8, (8, 8), act="relu"), TypeError, "act must be a class"),
        (lambda: FactMixer(*SWIN_MIXER, ranks=2), TypeError, "ranks"),
        (lambda: FactMixer(*SWIN_MIXER, dropout=-1), ValueError, "dropout must lie"),
        (
            lambda: FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN))(torch.zeros(1, 8, 8)),
            ValueError,
            "2 spatial axes",
        ),
        (
            lambda: FactorizerBlock(8, (8,), reshape=(SWMatricize, SWIN))(torch.zeros(1, 4, 8)),
            ValueError,
            "must have 8 channels",
        ),
        (
            lambda: FactorizerBlock(8, (8, 8), reshape=(SWMatricize, SWIN), local=True),
            TypeError,
            "kernel_size must be an int, got True",
        ),
        (lambda: FactorizerStage(8, 8, (8, 8), depth=0), ValueError, "depth must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(build_it, error, message):
    with pytest.raises(error, match=message):
        build_it()


def test_resize_helpers_leave_what_fits_alone():
    x = torch.randn(1, 2, 3, 4)
    assert pad_to(x, (3, 4)) is x
    assert crop_to(x, (3, 4)) is x
    padded = pad_to(x, (4, 6))
    assert torch.equal(padded[..., :3, :4], x)
    assert padded.count_nonzero() == x.count_nonzero()
    assert torch.equal(crop_to(padded, (3, 4)), x)
