"""The pointwise chains, join and patch_conv in Triton, interpreted, against the reference in float64."""

import pytest
import torch
from tests_support import grads_of

import factorizer_kernels as fk
from factorizer_kernels.ops.pointwise.triton import blocks

pytestmark = pytest.mark.usefixtures("poisoned")

# Relative L2. float32: some ten roundings. Half types: operands of products and results are rounded; the
# interpreter truncates bfloat16.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}


# The function, and the shapes of its maps and weights. Channels below, at and above 16, more rows of a weight
# than a block has; voxels below a tile, of several tiles, of several programs; several hidden blocks.
CASES = {
    "linear": (fk.linear, 1, [(2, 5, 7, 3), (3, 5), (3,)]),
    "linear, wide": (fk.linear, 1, [(1, 17, 70), (70, 17), (70,)]),
    "layer_norm": (fk.layer_norm, 1, [(2, 19, 70), (19,), (19,)]),
    "norm_linear": (fk.norm_linear, 1, [(2, 8, 5, 30), (8,), (8,), (9, 8), (9,)]),
    "norm_linear, programs": (fk.norm_linear, 1, [(1, 16, 530), (16,), (16,), (16, 16), (16,)]),
    "norm_linear, wider than a tile": (fk.norm_linear, 1, [(2, 70, 9), (70,), (70,), (33, 70), (33,)]),
    "linear, wider than a tile": (fk.linear, 1, [(2, 9, 5, 3), (65, 9), (65,)]),
    "layer_norm, wide": (fk.layer_norm, 1, [(2, 300, 21), (300,), (300,)]),
    "norm_linear, one": (fk.norm_linear, 1, [(1, 1, 1), (1,), (1,), (1, 1), (1,)]),
    "linear_norm_mlp": (fk.linear_norm_mlp, 2, [
        (2, 7, 5, 3, 5), (2, 20, 5, 3, 5), (20, 7), (20,), (20,), (20,), (40, 20), (40,), (20, 40), (20,),
    ]),
    "linear_norm_mlp, programs": (fk.linear_norm_mlp, 2, [
        (1, 16, 530), (1, 16, 530), (16, 16), (16,), (16,), (16,), (16, 16), (16,), (16, 16), (16,),
    ]),
    "linear_norm_mlp, wider than a tile": (fk.linear_norm_mlp, 2, [
        (2, 7, 5, 3), (2, 66, 5, 3), (66, 7), (66,), (66,), (66,), (40, 66), (40,), (66, 40), (66,),
    ]),
    "join": (fk.join, 2, [(2, 5, 4, 6, 2), (2, 7, 2, 3, 2), (3, 5), (7, 3, 2, 2, 1), (3,)]),
    "join, wide": (fk.join, 2, [(1, 33, 80), (1, 40, 40), (50, 33), (40, 50, 2), (50,)]),
    "patch_conv": (fk.patch_conv, 1, [(2, 3, 4, 6, 9), (5, 3, 2, 2, 3), (5,)]),
    "patch_conv, pairs": (fk.patch_conv, 1, [(2, 3, 4, 6, 10), (5, 3, 2, 2, 2), (5,)]),
    "join, pairs": (fk.join, 2, [(2, 5, 4, 6, 10), (2, 7, 2, 3, 5), (3, 5), (7, 3, 2, 2, 2), (3,)]),
    "patch_conv, wide": (fk.patch_conv, 1, [(1, 40, 80), (50, 40, 2), (50,)]),
}  # fmt: skip


def problem(name, dtype):
    function, num_maps, shapes = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    inputs = []
    for i, shape in enumerate(shapes):
        t = torch.randn(shape, generator=generator)
        if i >= num_maps and len(shape) > 1:
            t = t / max(shape[0 if function is fk.join else 1], 1) ** 0.5
        inputs.append(t.to(dtype) if i < num_maps else t)
    with fk.use_backend("reference"):
        y = function(*inputs)
    return function, inputs, torch.randn(y.shape, generator=generator).to(y.dtype)


def compare(function, inputs, dy):
    exact = grads_of("reference", function, [t.double() for t in inputs], (dy.double(),), {})
    before = [t.clone() for t in inputs]
    ours = grads_of("triton", function, inputs, (dy,), {})
    results, expected = (*ours.values, *ours.gradients), (*exact.values, *exact.gradients)
    dtype = inputs[0].dtype
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == (inputs[i - 1].dtype if i else dtype)
        assert result.is_contiguous()
        # A gradient may vanish: a norm of one channel is constant.
        size = max(wanted.norm().item(), 0.1 * wanted.numel() ** 0.5)
        assert (result.double() - wanted).norm().item() <= TOLERANCES[dtype] * size, i
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_float32(name, monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", 32)  # so that wide ones take several
    compare(*problem(name, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "layer_norm",
        "norm_linear",
        "linear_norm_mlp",
        "join",
        "patch_conv",
        "norm_linear, wider than a tile",
        "linear_norm_mlp, wider than a tile",
    ],
)
def test_half_types(name, dtype):
    compare(*problem(name, dtype))


def test_strides():
    """Channels last, every other voxel, an expanded gradient: copied where voxels do not lie side by side."""
    function, (x, *weights), dy = problem("norm_linear", torch.float32)
    strided = torch.stack([x, x], -1)[..., 0]
    for layout in (x.to(memory_format=torch.channels_last), strided):
        compare(function, [layout, *weights], dy.mT.contiguous().mT)
    compare(function, [x, *weights], dy[:, :1, :1, :1].expand_as(dy))


@pytest.mark.parametrize("name", ["norm_linear", "linear_norm_mlp"])
def test_wide_maps_are_refused_by_name(name):
    function, num_maps, shapes = CASES[name]
    wide = {shapes[num_maps - 1][1]: 1025}
    inputs = [torch.randn([wide.get(n, n) for n in shape]) for shape in shapes]
    with fk.use_backend("triton"), pytest.raises(ValueError, match="at most 1024 channels, got 1025"):
        function(*inputs)
    with fk.use_backend("triton"), pytest.raises(ValueError, match="no float64"):
        function(*(t.double() for t in inputs))


def test_empty_operators():
    """The operators themselves, which a graph that was traced with other sizes may call with no voxel."""
    ops = torch.ops.factorizer_kernels
    x, vector, matrix = torch.rand(2, 4, 0), torch.rand(4), torch.rand(4, 4)
    arguments = (x, vector, vector, matrix, vector, 1e-5, torch.float32)
    assert ops.norm_linear(*arguments, "triton").shape == x.shape
    dx, *gradients = ops.norm_linear_backward(x, None, x, *arguments[1:], True, "triton")
    assert dx.shape == x.shape
    assert not any(g.any() for g in gradients)
    assert not any(g.isnan().any() for g in gradients)


@pytest.mark.parametrize("name", ["norm_linear", "norm_linear, wider than a tile"])
def test_the_residual_gets_its_gradient(name):
    _, (x, *weights), _ = problem(name, torch.float32)
    gradients = []
    for backend in ("triton", "reference"):
        z = x.detach().requires_grad_()
        with fk.use_backend(backend):
            y, same = fk.norm_linear(z, *weights, residual=True)
            (y.square().sum() + (3 * same).sum()).backward()
        gradients.append(z.grad)
    torch.testing.assert_close(*gradients)


def test_a_voxel_that_is_nan_spoils_itself_alone():
    function, (x, *weights), _ = problem("norm_linear", torch.float32)
    with fk.use_backend("triton"):
        clean = function(x, *weights)
        x[0, 3, 2, 7] = float("nan")
        y = function(x, *weights)
    reached = torch.zeros(y.shape, dtype=torch.bool)
    reached[0, :, 2, 7] = True
    assert torch.equal(y.isnan(), reached)
    assert torch.equal(y[~reached], clean[~reached])


def test_the_backward_inside_of_autocast():
    """Sums beyond float16, which autocast would have the product of them in."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 70016, generator=generator)
    weights = [torch.randn(shape, generator=generator) for shape in ((3,), (3,), (3, 3), (3,))]
    found = []
    for backend in ("triton", "reference"):
        shift = weights[1].clone().requires_grad_()
        with fk.use_backend(backend), torch.autocast("cpu", torch.float16):
            fk.norm_linear(x, weights[0], shift, *weights[2:]).float().sum().backward()
        found.append(shift.grad)
    torch.testing.assert_close(*found, rtol=2e-3, atol=0)


def test_kernels_of_many_voxels(monkeypatch):
    """A grid has 65535 programs on its second axis."""
    grids = []
    monkeypatch.setattr(blocks, "launch", lambda kernel, grid, *_, **__: grids.append((kernel, grid)))
    dy, x, weight = torch.empty(1, 2, 1, 1), torch.empty(1, 1, 256, 257), torch.empty(2, 1, 256, 257)
    blocks.patch_conv_backward(dy, x, weight, torch.empty(2), torch.float32, True)
    grid = dict(grids)[blocks.block_sums_kernel]
    assert grid == (256 * 257, 1)
