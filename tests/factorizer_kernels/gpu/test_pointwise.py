"""The pointwise chains, join, patch_conv and depthwise_conv on a card, against the reference in float64."""

import pytest
import torch
from tests_support import grads_of

import factorizer_kernels as fk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("triton" not in [b.name for b in fk.backends() if b.available], reason="no Triton"),
    pytest.mark.usefixtures("poisoned"),
]

# Relative L2 of products in float32 by torch's precision: three products of TF32 round as float32 does, one
# has operands of 11 bits. Half types: operands and results are rounded. Sums over voxels add to all of them.
PRECISIONS = {"highest": 1e-5, "high": 2e-3}
HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZE = (13, 24, 37)


def mlp(y, x, hidden):
    return [(x, y), (x,), (x,), (x,), (hidden, x), (hidden,), (x, hidden), (x,)]


# The function, how many maps it takes, and the shapes of its maps and weights.
CASES = {
    "linear": (fk.linear, 1, [(2, 32, *SIZE), (3, 32), (3,)]),
    "layer_norm": (fk.layer_norm, 1, [(2, 24, *SIZE), (24,), (24,)]),
    "norm_linear 32": (fk.norm_linear, 1, [(2, 32, *SIZE), (32,), (32,), (32, 32), (32,)]),
    "norm_linear 64": (fk.norm_linear, 1, [(1, 64, *SIZE), (64,), (64,), (64, 64), (64,)]),
    "norm_linear 5": (fk.norm_linear, 1, [(3, 5, *SIZE), (5,), (5,), (9, 5), (9,)]),
    "linear_norm_mlp 32": (fk.linear_norm_mlp, 2, [(2, 32, *SIZE), (2, 32, *SIZE), *mlp(32, 32, 64)]),
    "linear_norm_mlp 64": (fk.linear_norm_mlp, 2, [(1, 64, *SIZE), (1, 64, *SIZE), *mlp(64, 64, 128)]),
    "norm_linear 128": (fk.norm_linear, 1, [(1, 128, *SIZE), (128,), (128,), (96, 128), (96,)]),
    "layer_norm 512": (fk.layer_norm, 1, [(2, 512, 5, 7, 9), (512,), (512,)]),
    "linear_norm_mlp 256": (
        fk.linear_norm_mlp,
        2,
        [(2, 256, 7, 9, 5), (2, 256, 7, 9, 5), *mlp(256, 256, 512)],
    ),
    "linear_norm_mlp 24": (fk.linear_norm_mlp, 2, [(1, 20, *SIZE), (1, 24, *SIZE), *mlp(20, 24, 70)]),
    "join": (fk.join, 2, [(1, 32, 26, 24, 36), (1, 64, 13, 12, 18), (32, 32), (64, 32, 2, 2, 2), (32,)]),
    "patch_conv": (fk.patch_conv, 1, [(1, 32, 26, 24, 36), (64, 32, 2, 2, 2), (64,)]),
    "depthwise_conv": (fk.depthwise_conv, 1, [(2, 33, *SIZE), (33, 3, 3, 3), (33,)]),
    "depthwise_conv 5": (fk.depthwise_conv, 1, [(1, 32, 24, 37), (32, 5, 7), (32,)]),
}


ONE_OF_EACH = ("norm_linear 5", "linear_norm_mlp 24", "join", "patch_conv", "depthwise_conv")


def problem(name, dtype=torch.float32):
    function, num_maps, shapes = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    inputs = []
    for i, shape in enumerate(shapes):
        t = torch.randn(shape, generator=generator)
        if i >= num_maps and len(shape) > 1:
            t /= (shape[0] if function is fk.join else t[0].numel()) ** 0.5
        inputs.append(t.cuda().to(dtype if i < num_maps else torch.float32))
    with fk.use_backend("reference"):
        y = function(*inputs)
    return function, inputs, torch.randn(y.shape, generator=generator).to(y)


def compare(function, inputs, dy, tolerance):
    """Values and gradients, twice to the same bits."""
    exact = grads_of("reference", function, [t.double() for t in inputs], (dy.double(),), {})
    ours, again = (grads_of("triton", function, inputs, (dy,), {}) for _ in range(2))
    expected = (*exact.values, *exact.gradients)
    for result, same, wanted in zip(
        (*ours.values, *ours.gradients), (*again.values, *again.gradients), expected, strict=True
    ):
        assert torch.equal(result, same)
        assert result.is_contiguous()
        size = max(wanted.norm().item(), 0.1 * wanted.numel() ** 0.5)  # a gradient may vanish
        assert (result.double() - wanted).norm().item() <= tolerance * size


@pytest.fixture(params=PRECISIONS)
def tolerance(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield PRECISIONS[request.param]
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", CASES)
def test_float32(name, tolerance):
    compare(*problem(name), tolerance)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_types(name, dtype):
    compare(*problem(name, dtype), HALF[dtype])


@pytest.mark.parametrize("name", ["norm_linear 32", "linear_norm_mlp 24", "join", "depthwise_conv"])
def test_layouts(name):
    """Channels last, an expanded gradient: as of contiguous ones."""
    function, inputs, dy = problem(name)
    maps = CASES[name][1]
    last = [x.to(memory_format=torch.channels_last_3d) for x in inputs[:maps]]
    compare(function, [*last, *inputs[maps:]], dy.to(memory_format=torch.channels_last_3d), 1e-5)
    compare(function, inputs, dy[:, :1, :1, :1, :1].expand_as(dy), 1e-5)


@pytest.mark.parametrize(
    "name", ["norm_linear 5", "linear_norm_mlp 24", "join", "patch_conv", "depthwise_conv"]
)
def test_vmap(name):
    """Over the maps: the same as an item at a time."""
    function, inputs, _ = problem(name)
    maps = CASES[name][1]
    many = [torch.stack([x, 2 * x, -x]) for x in inputs[:maps]]
    in_dims = [0] * maps + [None] * (len(inputs) - maps)
    with fk.use_backend("triton"):
        together = torch.func.vmap(function, in_dims=tuple(in_dims))(*many, *inputs[maps:])
        for i, y in enumerate(together):
            torch.testing.assert_close(y, function(*(x[i] for x in many), *inputs[maps:]))


@pytest.mark.parametrize(
    "name", ["norm_linear 5", "linear_norm_mlp 24", "join", "patch_conv", "depthwise_conv"]
)
def test_opcheck(name):
    """Schema, fake, autograd registration and traces of the operators behind the functions."""
    function, inputs, _ = problem(name)
    ops = torch.ops.factorizer_kernels
    operator = getattr(ops, name.split()[0])
    kept = () if function is fk.depthwise_conv else (torch.float32,)
    eps = (1e-5,) if function in (fk.norm_linear, fk.linear_norm_mlp) else ()
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(operator.default, (*leaves, *eps, *kept, "triton"))


def test_choice():
    """Triton where it serves; wide maps and float64 go elsewhere, to the same values."""
    _, inputs, _ = problem("norm_linear 32")
    for arguments in ([t.double() for t in inputs], [torch.randn(s).cuda() for s in
                      ((1, 1040, 5, 6, 7), (1040,), (1040,), (8, 1040), (8,))]):  # fmt: skip
        with fk.use_backend("reference"):
            expected = fk.norm_linear(*arguments)
        torch.testing.assert_close(fk.norm_linear(*arguments), expected)


def test_offsets_pass_32_bits():
    """Maps of more than 2^31 elements: the last voxels against the same voxels alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB")
    voxels = 2**26 + 512
    x = torch.rand(1, 32, voxels, device="cuda", dtype=torch.float16)
    weights = [torch.rand(s, device="cuda") for s in ((32,), (32,), (32, 32), (32,))]
    filters = torch.rand(32, 3, device="cuda")
    with fk.use_backend("triton"):
        last = x[..., -4096:].clone()
        assert torch.equal(fk.norm_linear(x, *weights)[..., -4096:], fk.norm_linear(last, *weights))
        assert torch.equal(
            fk.depthwise_conv(x, filters)[..., -4000:], fk.depthwise_conv(last, filters)[..., -4000:]
        )


def test_a_training_step_in_a_graph():
    """Forward, backward and the optimiser's step of a whole network, captured and replayed."""
    factorizer = pytest.importorskip("factorizer")
    torch.manual_seed(0)
    network = factorizer.preset("swin-brats", in_channels=4, out_channels=3, spatial_size=[32] * 3).cuda()
    optimizer = torch.optim.AdamW(network.parameters(), capturable=True)
    x = torch.randn(1, 4, 32, 32, 32, device="cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = network(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    before = [p.detach().clone() for p in network.parameters()]
    graph.replay()
    first = loss.item()
    for _ in range(10):
        graph.replay()
    assert loss.item() < first
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
