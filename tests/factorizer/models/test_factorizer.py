"""The networks: golden cases, the published arguments, any size, and what they refuse."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import factorizer
import factorizer_kernels as fk
from factorizer import (
    NMF,
    PRESETS,
    Factorizer,
    FactorizerBlock,
    LayerNorm,
    Matricize,
    PositionalEmbedding,
    SWMatricize,
    UNet,
    preset,
    set_num_iters,
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


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


def check_golden(golden, dtype, rel, published_mu):
    """Value, and gradients of the input and of all parameters, of a published module.

    The arithmetic differs in order only, so float64 agrees to a few thousand roundings (1e-16). In
    float32 the values pass some twenty layers, each within a few roundings (6e-8); the gradients
    also pass ReLU and HALS in reverse, where a value near zero may fall on the other side.
    """
    arguments = golden["meta"]["args"]
    cls, keywords = arguments["reshape"]
    arguments["reshape"] = (getattr(factorizer, cls), keywords)
    if arguments["solver"] == "mu":
        arguments["solver"] = published_mu
    module = getattr(factorizer, golden["meta"]["cls"])(**arguments).to(dtype).eval()
    state = {k[len("state/") :]: v for k, v in golden.items() if k.startswith("state/")}
    module.load_state_dict(state, strict=True)

    x = golden["x"].to(dtype).requires_grad_()
    outputs = module(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert len(outputs) == sum(k.startswith("y") for k in golden)
    torch.autograd.backward(outputs, [golden[f"dy{i}"].to(dtype) for i in range(len(outputs))])

    value, gradient = (1e-9, 1e-8) if dtype == torch.float64 else (2e-5, 2e-3)
    for i, y in enumerate(outputs):
        assert rel(y, golden[f"y{i}"]) < value
    assert rel(x.grad, golden["dx"]) < gradient
    for name, parameter in module.named_parameters():
        assert rel(parameter.grad, golden[f"grad/{name}"]) < gradient, name


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@DTYPES
@pytest.mark.golden_kind("mixer")
def test_golden_mixer(golden, dtype, backend, rel, published_mu):
    check_golden(golden, dtype, rel, published_mu)


@DTYPES
@pytest.mark.golden_kind("block")
def test_golden_block(golden, dtype, backend, rel, published_mu):
    check_golden(golden, dtype, rel, published_mu)


@DTYPES
@pytest.mark.golden_kind("model")
def test_golden_model(golden, dtype, backend, rel, published_mu):
    check_golden(golden, dtype, rel, published_mu)


def test_arguments_are_the_published_ones():
    expected = {
        "in_channels": inspect.Parameter.empty,
        "out_channels": inspect.Parameter.empty,
        "spatial_size": inspect.Parameter.empty,
        "encoder_depth": (1, 1, 1, 1, 1),
        "encoder_width": (32, 64, 128, 256, 512),
        "strides": (1, 2, 2, 2, 2),
        "decoder_depth": (1, 1, 1, 1),
        "stem": None,
        "downsample": None,
        "upsample": None,
        "head": None,
        "pos_embed": PositionalEmbedding,
        "num_deep_supr": False,
        "stem_stride": 1,  # ours
        "kwargs": inspect.Parameter.empty,
    }
    parameters = inspect.signature(Factorizer).parameters
    assert {name: p.default for name, p in parameters.items()} == expected


def test_all_arguments_of_a_bundle():
    network = Factorizer(
        in_channels=2,
        out_channels=3,
        spatial_size=[16, 16, 16],
        encoder_depth=[1, 1, 1],
        encoder_width=[8, 16, 32],
        strides=[1, 2, 2],
        decoder_depth=[1, 1],
        norm=LayerNorm,
        reshape=[SWMatricize, {"head_dim": 8, "patch_size": 4}],
        act=nn.ReLU,
        factorize=NMF,
        rank=1,
        num_iters=5,
        num_grad_steps=None,
        init="uniform",
        solver="hals",
        mlp_ratio=2,
        dropout=0.1,
        stem=[nn.Conv3d, {"kernel_size": 3, "padding": 1, "bias": False}],
        downsample=[nn.Conv3d, {"kernel_size": 2, "stride": 2}],
        upsample=[nn.ConvTranspose3d, {"kernel_size": 2, "stride": 2}],
        head=[nn.Conv3d, {"kernel_size": 1}],
        pos_embed=PositionalEmbedding,
        num_deep_supr=2,
    )
    plain = small((16, 16, 16), (SWMatricize, {"head_dim": 8, "patch_size": 4}), num_deep_supr=2)
    plain.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(2, 2, 16, 16, 16)
    for got, expected in zip(network.eval()(x), plain(x), strict=True):
        torch.testing.assert_close(got, expected)  # the default head is a product, torch's a convolution


def test_parts_are_built_as_they_are_named():
    network = small(
        stem=(nn.Conv2d, (5, 1, 2)),
        head=(nn.Conv2d, {"kernel_size": 3, "padding": 1}),
        act=nn.Softplus,
        factorize=(NMF, {"rank": 3}),
        pos_embed=nn.Identity,
    )
    assert network.stem.kernel_size == (5, 5)
    assert network.head.kernel_size == (3, 3)
    mixers = [b.fact for b in network.modules() if isinstance(b, FactorizerBlock)]
    assert {type(m.act) for m in mixers} == {nn.Softplus}
    assert {m.factorize.rank for m in mixers} == {3}
    assert not any("pos" in name for name in network.state_dict())
    assert network(torch.randn(1, 2, 16, 16)).shape == (1, 3, 16, 16)


def test_positions_are_embedded_at_the_bottleneck_only():
    names = [name for name in small().state_dict() if "pos" in name]
    assert names == ["encoder.blocks.2.block.pos_embed.pos"]


def test_state_does_not_depend_on_the_backend():
    names = {}
    for backend in fk.backends():
        if backend.available:
            with fk.use_backend(backend.name):
                names[backend.name] = list(small().state_dict())
    assert len({tuple(n) for n in names.values()}) == 1


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("global-brats", {}, 5_855_619),
        ("local-brats", {}, 5_855_619),
        ("swin-brats", {}, 5_855_619),
        (
            "swin-brats",
            {
                "mlp_ratio": 4,
                "reshape": (
                    SWMatricize,
                    {"head_dim": 8, "patch_size": 8, "shifts": [0, 2, 4, 6]},
                ),
            },
            7_603_459,
        ),
        ("swin-isles22", {}, 7_372_289),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, overrides, count):
    with torch.device("meta"):
        assert parameter_count(preset(name, **overrides)) == count


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_run(name):
    size = (32, 32, 32)
    network = preset(name, spatial_size=size).eval()
    with torch.no_grad():
        y = network(torch.randn(1, network.in_channels, *size))
    assert y.shape == (1, network.out_channels, *size)
    assert y.isfinite().all()
    reshape = network.encoder.blocks[0].block.blocks[0].fact.reshape
    assert type(reshape) is (SWMatricize if "swin" in name else Matricize)


def test_importing_is_quiet_and_needs_no_monai():
    script = (
        "import sys, factorizer; "
        "heavy = {'monai', 'nibabel', 'matplotlib', 'rich', 'typer'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout + run.stderr == b""


def test_dropout_acts_everywhere_it_is_declared():
    """Nine blocks with three dropouts each, and one after the positional embedding: 28."""
    network = Factorizer(2, 3, (16, 16), encoder_width=(8, 8, 8, 8, 8), reshape=SWIN, dropout=0.5).train()
    dropouts = [part for part in network.modules() if isinstance(part, nn.Dropout)]
    assert [part.p for part in dropouts] == [0.5] * 28
    dropped = []
    for part in dropouts:
        part.register_forward_hook(lambda _, args, y: dropped.append((y == 0).float().mean()))
    x = torch.randn(2, 2, 16, 16)
    network(x)
    assert len(dropped) == 28
    assert all(share > 0.2 for share in dropped)  # the smallest tensor has 16 entries


@pytest.mark.parametrize("index", range(28))
def test_each_dropout_changes_the_result(index):
    network = Factorizer(2, 3, (16, 16), encoder_width=(8, 8, 8, 8, 8), reshape=SWIN, dropout=0.5).train()
    x = torch.randn(1, 2, 16, 16)
    dropouts = [part for part in network.modules() if isinstance(part, nn.Dropout)]
    for i, part in enumerate(dropouts):
        part.p = 0.9 if i == index else 0.0
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(("argument", "heads"), [(True, 3), (3, 3), (1, 1), (2, 2), (5, 5)])
def test_deep_supervision_has_the_heads_that_are_asked_for(argument, heads):
    network = Factorizer(2, 3, (16, 16), encoder_width=(8,) * 5, reshape=SWIN, num_deep_supr=argument)
    outputs = network(torch.randn(2, 2, 16, 16))
    assert isinstance(outputs, list)
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 16 >> i, 16 >> i) for i in range(heads)]
    assert sum(name.endswith(".weight") for name in network.state_dict() if "heads." in name) == heads
    # Every head learns: with gradients that reach it from its own output only.
    for i, y in enumerate(outputs):
        gradients = torch.autograd.grad(
            y.sum(), list(network.heads.parameters()), retain_graph=True, allow_unused=True
        )
        assert [g is not None for g in gradients[::2]] == [j == i for j in range(heads)]


@pytest.mark.parametrize("argument", [False, 0])
def test_without_deep_supervision_there_is_one_tensor(argument):
    network = small(num_deep_supr=argument)
    assert isinstance(network(torch.randn(1, 2, 16, 16)), torch.Tensor)
    assert {n for n in network.state_dict() if n.startswith("head")} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["hals", "mu"])
def test_autocast_gives_no_nan_where_the_input_is_zero(dtype, solver, backend):
    network = small((16, 16, 16), solver=solver)
    x = torch.randn(1, 2, 16, 16, 16)
    x[..., :8] = 0
    expected = network(x)
    with torch.autocast("cpu", dtype):
        y = network(x)
        y.float().square().mean().backward()
    assert (y - expected).norm() / expected.norm() < 10 * torch.finfo(dtype).eps
    assert all(p.grad.isfinite().all() for p in network.parameters())


GLOBAL = (Matricize, {"head_dim": 4, "grid_size": 1})


LOCAL = (Matricize, {"head_dim": 4, "patch_size": 4})


def _step_by_step(network, x):
    """The logits of a network of three levels: each stride finds an even size, by zeros where it has to."""

    def even(x):
        return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))

    levels = [network.encoder.blocks[0](network.stem(even(x)))]
    for block in network.encoder.blocks[1:]:
        levels.append(block.block(block.downsample(even(levels[-1]))))
    outputs = [levels.pop()]
    for block in network.decoder.blocks:
        skip = levels.pop()
        up = block.upsample(outputs[0])[..., : skip.shape[2], : skip.shape[3]]
        outputs.insert(0, block.block(torch.cat([skip, up], 1)))
    sizes = x.shape[2:], [(s + 1) // 2 for s in x.shape[2:]]
    heads = zip(network.heads, outputs, sizes, strict=False)
    return [head(y)[..., : size[0], : size[1]] for head, y, size in heads]


@pytest.mark.parametrize("reshape", [GLOBAL, LOCAL, SWIN], ids=["global", "local", "swin"])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (5, 3), (1, 1), (64, 20)])
def test_any_size(reshape, size, backend):
    network = small(reshape=reshape, num_deep_supr=2)
    x = torch.randn(2, 2, *size)
    fine, coarse = network(x)
    assert fine.shape == (2, 3, *size)
    assert coarse.shape == (2, 3, *((s + 1) // 2 for s in size))
    for ours, by_hand in zip((fine, coarse), _step_by_step(network, x), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)
    fine.sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_to_three_axes_and_sizes_made_for_that_do_not_fit(dims):
    made_for = (18, 14, 10)[:dims]
    network = small(made_for)
    assert network(torch.randn(2, 2, *made_for)).shape == (2, 3, *made_for)
    assert network.encoder.blocks[2].block.pos_embed.pos.shape[2:] == (5, 4, 3)[:dims]


def test_a_network_made_for_another_size_is_the_same_where_nothing_depends_on_it():
    """Without an embedding, the windows of a Swin Factorizer know no size."""
    one, other = small((16, 16), pos_embed=nn.Identity), small((32, 24), pos_embed=nn.Identity)
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 2, 24, 40)
    assert torch.equal(one(x), other(x))


def test_strides_of_each_axis():
    network = small((16, 8), strides=(1, (2, 1), (2, 2)), num_deep_supr=2)
    fine, coarse = network(torch.randn(1, 2, 13, 7))
    assert fine.shape == (1, 3, 13, 7)
    assert coarse.shape == (1, 3, 7, 7)


def test_memory_formats_and_subclasses_give_the_same():
    network = small((8, 8, 8))
    x = torch.randn(2, 2, 8, 8, 8)
    expected = network(x)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last_3d)), expected)
    torch.testing.assert_close(network(x.transpose(2, 3)), network(x.transpose(2, 3).contiguous()))
    monai_data = pytest.importorskip("monai.data")
    y = network(monai_data.MetaTensor(x))
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, expected)


def test_fewer_iterations_on_a_trained_network():
    network = small()
    fewer = small(num_iters=2)
    fewer.load_state_dict(network.state_dict())
    x = torch.randn(1, 2, 16, 16)
    before = network(x)
    set_num_iters(network, 2)
    assert torch.equal(network(x), fewer(x))
    assert not torch.equal(network(x), before)
    set_num_iters(network, 5)
    assert torch.equal(network(x), before)


def test_networks_are_copied_and_saved(tmp_path):
    network = small()
    x = torch.randn(1, 2, 16, 16)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    twin = small(seed=1)
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(twin(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))


def test_training_lowers_the_loss():
    network = small(num_deep_supr=2)
    torch.manual_seed(0)
    x = torch.randn(2, 2, 16, 16)
    target = (x[:, :1] > 0).float().expand(-1, 3, -1, -1)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-2)
    losses = []
    for _ in range(20):
        fine, coarse = network(x)
        loss = F.binary_cross_entropy_with_logits(fine, target)
        loss = loss + F.binary_cross_entropy_with_logits(coarse, F.avg_pool2d(target, 2))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.filterwarnings("ignore")  # what dynamo says about itself
def test_networks_are_compiled_exported_and_transformed(rel):
    network = small(encoder_depth=(1, 1), encoder_width=(8, 16), strides=(1, 2), decoder_depth=(1,))
    x = torch.randn(2, 2, 16, 16)
    expected = network(x)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}

    network.zero_grad()
    compiled = torch.compile(network, fullgraph=True, backend="eager")(x)
    compiled.square().sum().backward()
    assert rel(compiled, expected) < 1e-6
    assert all(rel(p.grad, gradients[n]) < 1e-4 for n, p in network.named_parameters())

    assert rel(torch.export.export(network.eval(), (x,)).module()(x), expected) < 1e-6

    def loss(parameters):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    parameters = {name: p.detach() for name, p in network.named_parameters()}
    for name, gradient in torch.func.grad(loss)(parameters).items():
        assert rel(gradient, gradients[name]) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_backward_graph_of_the_reference(rel):
    """A view in it once failed where a gradient came in channels-last order, in a map of one window."""
    network = small(
        spatial_size=(8, 8), encoder_depth=(1, 1), encoder_width=(8, 16), strides=(1, 2), decoder_depth=(1,),
        num_iters=1,
    )  # fmt: skip
    x = torch.randn(2, 2, 8, 8)
    gradients = []
    with fk.use_backend("reference"):
        for run in (network, torch.compile(network, fullgraph=True, dynamic=False, backend="aot_eager")):
            network.zero_grad()
            run(x).square().sum().backward()
            gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(rel(ours, expected) < 1e-4 for ours, expected in zip(*gradients, strict=True))


def forward(x, **kwargs):
    return lambda: small(**kwargs)(x)


@pytest.mark.parametrize(
    ("build_it", "error", "message"),
    [
        (forward(torch.zeros(1, 3, 16, 16)), ValueError, "Factorizer: x must have 2 channels, got 3"),
        (forward(torch.zeros(1, 2, 16)), ValueError, r"p = 2, got shape \(1, 2, 16\)"),
        (forward(torch.zeros(2, 16, 16)), ValueError, r"p = 2, got shape \(2, 16, 16\)"),
        (forward(torch.zeros(1, 2, 16, 0)), ValueError, r"spatial axes .*not be empty.* \(1, 2, 16, 0\)"),
        (forward(torch.zeros(1, 2, 16, 16).long()), TypeError, "float32.*got torch.int64"),
        (forward(torch.zeros(1, 2, 16, 16).double()), TypeError, "float32.* got torch.float64"),
        (forward("x"), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: small(in_channels=0), ValueError, "in_channels must be at least 1, got 0"),
        (lambda: small(out_channels="3"), TypeError, "out_channels must be an integer, got '3'"),
        (lambda: small(128), TypeError, "spatial_size must be a sequence of integers, got 128"),
        (lambda: small((8, 8, 8, 8)), ValueError, "spatial_size must have 1 or 2 or 3 entries"),
        (lambda: small((8, -8)), ValueError, r"spatial_size\[1\] must be at least 1, got -8"),
        (
            lambda: small(encoder_width=(8, 18, 32)),
            ValueError,
            "head_dim=4 must divide the 18 channels",
        ),
        (lambda: small(encoder_width=(8, 16)), ValueError, "encoder_depth must have 2 entries"),
        (lambda: small(encoder_width=8), TypeError, "encoder_width must be a sequence of integers"),
        (lambda: small(strides=(1, 2)), ValueError, r"strides must have 3 entries.* got \(1, 2\)"),
        (lambda: small(strides=(1, 2, 0)), ValueError, r"strides\[2\]\[0\] must be at least 1"),
        (lambda: small(strides=(1, 2, (2, 2, 2))), ValueError, r"strides\[2\] must have 2 entries"),
        (lambda: small(decoder_depth=(1, 1, 1)), ValueError, "decoder_depth must have 2 entries"),
        (lambda: small(encoder_depth=(1, 1, 0)), ValueError, r"encoder_depth\[2\] must be at least"),
        (lambda: small(num_deep_supr=4), ValueError, "num_deep_supr must be at most 3"),
        (lambda: small(num_deep_supr=-1), ValueError, "num_deep_supr must be at least 0, got -1"),
        (lambda: small(num_deep_supr=1.5), TypeError, "num_deep_supr must be an integer, got 1.5"),
        (lambda: small(stem="conv"), TypeError, "stem must be a class, or a pair"),
        (lambda: small(dropout=1), ValueError, r"dropout must lie in \[0, 1\), got 1"),
        (lambda: small(patch_size=4), TypeError, "patch_size"),
        (lambda: small(reshape=(SWMatricize, {"head_dim": 4})), ValueError, "patch_size"),
        (lambda: small(solver="sgd"), ValueError, "solver must be one of"),
        (lambda: UNet(2, 3, spatial_dims=4), ValueError, "spatial_dims must be one of .*got 4"),
        (
            lambda: UNet(2, 3, spatial_dims=2, spatial_size=(8, 8, 8)),
            ValueError,
            "spatial_size must have 2 entries",
        ),
        (lambda: preset("unet"), ValueError, "name must be one of global-brats, .* got 'unet'"),
    ],
)
def test_wrong_arguments_are_named(build_it, error, message):
    with pytest.raises(error, match=message):
        build_it()
