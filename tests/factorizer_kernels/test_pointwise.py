"""The pointwise chains, join, patch_conv: formulas, values and gradients in every layout, any derivative."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import grads_of
from torch import Tensor

import factorizer_kernels as fk
from factorizer_kernels.ops.pointwise import reference
from factorizer_kernels.ops.pointwise import torch as pointwise_torch
from factorizer_kernels.ops.pointwise.reference import standardise

BACKENDS = [b.name for b in fk.backends() if b.available and b.name in ("reference", "torch", "cpu")]
KERNELS = [name for name in BACKENDS if name != "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fk.use_backend(request.param):
        yield request.param


class Operator(NamedTuple):
    """A public function, how many of its arguments are maps, and the shapes of all for some sizes."""

    function: Callable[..., Tensor]
    num_maps: int
    shapes: Callable[..., list[tuple[int, ...]]]


def _mlp_shapes(batch, channels, size, other, hidden, **_):
    return [
        (batch, other, *size), (batch, channels, *size), (channels, other), (channels,), (channels,),
        (channels,), (hidden, channels), (hidden,), (channels, hidden), (channels,),
    ]  # fmt: skip


def _join_shapes(batch, channels, size, other, hidden, scale, **_):
    fine = [s * k for s, k in zip(size, scale, strict=True)]
    return [
        (batch, other, *fine), (batch, channels, *size), (hidden, other), (channels, hidden, *scale),
        (hidden,),
    ]  # fmt: skip


def _patch_shapes(batch, channels, size, other, scale, **_):
    fine = [s * k for s, k in zip(size, scale, strict=True)]
    return [(batch, channels, *fine), (other, channels, *scale), (other,)]


OPERATORS = {
    "linear": Operator(
        fk.linear,
        1,
        lambda batch, channels, size, other, **_: [
            (batch, channels, *size),
            (other, channels),
            (other,),
        ],
    ),
    "layer_norm": Operator(
        fk.layer_norm,
        1,
        lambda batch, channels, size, **_: [(batch, channels, *size), (channels,), (channels,)],
    ),
    "norm_linear": Operator(
        fk.norm_linear,
        1,
        lambda batch, channels, size, other, **_: [
            (batch, channels, *size),
            (channels,),
            (channels,),
            (other, channels),
            (other,),
        ],
    ),
    "linear_norm_mlp": Operator(fk.linear_norm_mlp, 2, _mlp_shapes),
    "join": Operator(fk.join, 2, _join_shapes),
    "patch_conv": Operator(fk.patch_conv, 1, _patch_shapes),
}


def _sizes(batch, channels, size, other, hidden, scale=None):
    return {
        "batch": batch, "channels": channels, "size": size, "other": other, "hidden": hidden,
        "scale": scale or (2,) * len(size),
    }  # fmt: skip


# Channels below, at and above a block of rows; voxels below a vector, at a tile, past it; several items in a
# tile; a hidden layer of several pieces; weights worth packing and not; more tiles than groups of them, each
# with a share of the sums.
CASES = [
    _sizes(1, 1, (1,), 1, 1),
    _sizes(3, 5, (7,), 4, 9),
    _sizes(2, 8, (40, 30), 8, 16),
    _sizes(1, 32, (6, 7, 8), 32, 64),
    _sizes(9, 7, (2, 3, 2), 13, 300, (1, 3, 2)),
    _sizes(1, 33, (3, 129), 17, 70, (3, 1)),
    _sizes(40, 6, (1,), 3, 5, (4,)),
    _sizes(1, 130, (4, 5), 140, 270, (1, 1)),
    _sizes(1, 3, (130, 71), 4, 5),
]


def _problem(name, sizes, dtype=torch.float64, seed=0):
    """The arguments, of size one but for weights that keep it, and a gradient of the loss by the result."""
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    arguments = []
    for i, shape in enumerate(operator.shapes(**sizes)):
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) > 1 and i >= operator.num_maps:
            t = t / max(shape[1] if name != "join" else shape[0], 1) ** 0.5
        arguments.append(t.to(dtype if i < operator.num_maps else compute))
    with fk.use_backend("reference"):
        dy = torch.randn(operator.function(*arguments).shape, generator=generator, dtype=torch.float64)
    return arguments, dy.to(dtype)


def _outcome(backend, name, arguments, dy):
    values, gradients = grads_of(backend, OPERATORS[name].function, arguments, (dy,), {})
    return (*values, *gradients)


# --- Values and gradients --------------------------------------------------------------------


def _formula(name, arguments):
    """The function of torch that ours are documented as."""
    norm = lambda x, w, b: F.layer_norm(x.movedim(1, -1), w.shape, w, b, 1e-5).movedim(-1, 1)  # noqa: E731
    mapped = lambda x, w, b: (x.movedim(1, -1) @ w.T + b).movedim(-1, 1)  # noqa: E731
    axes = arguments[0].dim() - 2
    if name == "linear":
        return mapped(*arguments)
    if name == "layer_norm":
        return norm(*arguments)
    if name == "norm_linear":
        x, norm_weight, norm_bias, weight, bias = arguments
        return mapped(norm(x, norm_weight, norm_bias), weight, bias)
    if name == "linear_norm_mlp":
        y, x, weight, bias, norm_weight, norm_bias, weight1, bias1, weight2, bias2 = arguments
        z = x + mapped(y, weight, bias)
        return z + mapped(F.gelu(mapped(norm(z, norm_weight, norm_bias), weight1, bias1)), weight2, bias2)
    if name == "join":
        skip, x, weight_skip, weight_x, bias = arguments
        up = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[axes - 1]
        return mapped(skip, weight_skip, bias) + up(x, weight_x, stride=weight_x.shape[2:])
    x, weight, bias = arguments
    return (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, weight, bias, stride=weight.shape[2:])


@pytest.mark.parametrize("sizes", CASES, ids=lambda s: str(tuple(s.values())))
@pytest.mark.parametrize("name", OPERATORS)
def test_formula(name, sizes, backend):
    arguments, dy = _problem(name, sizes)
    leaves = [t.clone().requires_grad_() for t in arguments]
    expected = _formula(name, leaves)
    gradients = torch.autograd.grad(expected, leaves, dy)
    ours = _outcome(backend, name, arguments, dy)
    for result, exact in zip(ours, (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9)


# Of the L2 norm: the roundings of float32's arithmetic, some ten deep, and what rounding a map does.
FORWARD = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
BACKWARD = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _assert_close(outcome, exact, sizes=None):
    """``sizes``: of what was added up to each result, where that may be much more than the result."""
    sizes = [0.0] * len(exact) if sizes is None else sizes
    for i, (result, expected, size) in enumerate(zip(outcome, exact, sizes, strict=True)):
        assert result.shape == expected.shape
        assert result.is_contiguous()
        tolerance = (BACKWARD if i else FORWARD)[result.dtype]
        # A gradient may vanish: a norm of one channel is constant.
        size = max(expected.norm().item(), expected.numel() ** 0.5, size)
        assert (result.double() - expected).norm().item() <= tolerance * size, i


def _before_cancelling(name, arguments, dy):
    """The L2 norms of the results where a norm takes no mean away, in value and gradient: a sum is as good as
    the roundings of its terms, and of channels that are nearly alike little is left.

    A gradient also inherits the relative error of the standardised values: their largest before the mean is
    taken away, over one, for they are of size one after it.
    """
    largest = 1.0

    def scaled(x, eps):
        nonlocal largest
        _, scale = standardise(x.detach(), eps)
        largest = max(largest, (x.detach() * scale).abs().max().item())
        return x * scale, scale

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "standardise", scaled)
        y, *gradients = _outcome("reference", name, arguments, dy)
    return [y.norm().item(), *(largest * g.norm().item() for g in gradients)]


@pytest.mark.parametrize("sizes", CASES, ids=lambda s: str(tuple(s.values())))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_cpu_meets_reference(name, dtype, sizes, poisoned):
    arguments, dy = _problem(name, sizes, dtype)
    exact = _outcome("reference", name, [t.double() for t in arguments], dy.double())
    ours = _outcome("cpu", name, arguments, dy)
    assert [t.dtype for t in ours] == [dtype, *(t.dtype for t in arguments)]
    _assert_close(ours, exact)


@pytest.mark.parametrize("size", [(62, 62, 66), (64, 64, 64)], ids=["lines between", "whole lines"])
@pytest.mark.parametrize("name", OPERATORS)
def test_maps_that_outgrow_the_caches(name, size, poisoned):
    """Results of more than 8 MiB are written past the caches, in whole lines of memory where these lie so."""
    coarse = tuple(s // 2 for s in size)
    sizes = _sizes(1, 9, coarse if name in ("join", "patch_conv") else size, 9, 9)
    arguments, dy = _problem(name, sizes, torch.float32)
    exact = _outcome("reference", name, [t.double() for t in arguments], dy.double())
    _assert_close(_outcome("cpu", name, arguments, dy), exact)


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    spatial = [draw(st.integers(1, n)) for n in draw(st.sampled_from([(300, 4, 3), (4, 20, 5), (8, 8, 8)]))]
    scale = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(axes))
    channels, other, hidden = (draw(st.integers(1, 40)) for _ in range(3))
    sizes = _sizes(draw(st.integers(1, 3)), channels, tuple(spatial[:axes]), other, hidden, scale)
    name, dtype = draw(st.sampled_from(list(OPERATORS))), draw(st.sampled_from(DTYPES))
    return name, sizes, dtype, draw(st.integers(0, 2**31))


@pytest.mark.parametrize("channels", [5, 9, 13, 17, 21, 33])
@pytest.mark.parametrize("rows", [8, 18, 20, 40])
def test_products_with_transposed_weights(channels, rows, backend, rel):
    """The gradient of x, whose weights are packed from columns: panels and steps of every remainder."""
    x = torch.randn(2, channels, 7, requires_grad=True)
    weight, bias, dy = torch.randn(rows, channels), torch.randn(rows), torch.randn(2, rows, 7)
    (dx,) = torch.autograd.grad(fk.linear(x, weight, bias), x, dy)
    assert rel(dx, weight.double().mT @ dy.double()) < 1e-6


@settings(deadline=None)
@given(problems())
def test_any_problem(problem):
    name, sizes, dtype, seed = problem
    arguments, dy = _problem(name, sizes, dtype, seed)
    exact = _outcome("reference", name, [t.double() for t in arguments], dy.double())
    terms = _before_cancelling(name, [t.double() for t in arguments], dy.double())
    for backend in KERNELS:
        ours = _outcome(backend, name, arguments, dy)
        if backend == "cpu" or dtype in (torch.float32, torch.float64):
            _assert_close(ours, exact, terms)


@pytest.mark.parametrize("elements", [9, 100], ids=["runs of voxels", "groups of items"])
@pytest.mark.parametrize("name", OPERATORS)
def test_blocks_of_torch(name, elements, monkeypatch):
    """However it cuts the maps."""
    monkeypatch.setattr(pointwise_torch, "_CPU_BLOCK", elements)
    arguments, dy = _problem(name, _sizes(5, 4, (3, 2), 3, 6))
    _assert_close(_outcome("torch", name, arguments, dy), _outcome("reference", name, arguments, dy))


@pytest.mark.parametrize("name", OPERATORS)
def test_half_precision_of_torch(name):
    """The products in half precision are torch's: a rounding for each of them."""
    arguments, dy = _problem(name, CASES[3], torch.bfloat16)
    exact = _outcome("reference", name, [t.double() for t in arguments], dy.double())
    for backend in ("reference", "torch"):
        for result, expected in zip(_outcome(backend, name, arguments, dy), exact, strict=True):
            assert (result.double() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("name", OPERATORS)
def test_without_bias(name, backend):
    arguments, _ = _problem(name, CASES[1])
    if name == "layer_norm":
        pytest.skip("it has no bias that may be None")
    biases = [i for i, t in enumerate(arguments) if t.dim() == 1]
    if "norm" in name:  # scale and shift are given always
        biases = {"norm_linear": [4], "linear_norm_mlp": [3, 7, 9]}[name]
    zeros = [torch.zeros_like(t) if i in biases else t for i, t in enumerate(arguments)]
    none = [None if i in biases else t for i, t in enumerate(arguments)]
    function = OPERATORS[name].function
    assert torch.equal(function(*none), function(*zeros))


@pytest.mark.parametrize("name", OPERATORS)
def test_only_what_is_wanted(name, backend):
    arguments, dy = _problem(name, CASES[1])
    expected = _outcome(backend, name, arguments, dy)[1:]
    for wanted in range(len(arguments)):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(arguments)]
        OPERATORS[name].function(*leaves).backward(dy)
        torch.testing.assert_close(leaves[wanted].grad, expected[wanted])


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_keeps_inputs_only(name, kernels):
    arguments, _ = _problem(name, CASES[3])
    leaves = [t.requires_grad_() for t in arguments]
    kept = set()
    with (
        fk.use_backend(kernels),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t),
    ):
        OPERATORS[name].function(*leaves)
    assert kept <= {t.data_ptr() for t in leaves}


# --- Derivatives -----------------------------------------------------------------------------

SMALL = _sizes(2, 3, (2, 2), 2, 4, (1, 2))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(name, backend):
    arguments, _ = _problem(name, SMALL)
    leaves = [t.requires_grad_() for t in arguments]
    function = OPERATORS[name].function
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [CASES[1], CASES[3], CASES[5]], ids=lambda s: str(tuple(s.values())))
def test_residual(sizes, dtype, backend):
    """The gradient of the x that is returned joins the other one, whatever its layout."""
    (x, *weights), dy = _problem("norm_linear", sizes, dtype)
    other = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)[0]
    other = other.transpose(0, 1).contiguous().transpose(0, 1)

    def gradients(x, weights, residual):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        y = fk.norm_linear(*leaves, residual=residual)
        y, passed = y if residual else (y, leaves[0])
        assert passed.shape == x.shape
        torch.autograd.backward([y, passed], [dy.to(x.dtype), other.to(x.dtype)])
        return [t.grad for t in leaves]

    with fk.use_backend("reference"):
        exact = gradients(x.double(), [w.double() for w in weights], False)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, expected in zip(gradients(x, weights, True), exact, strict=True):
        assert (ours.double() - expected).norm() <= tolerance * expected.norm()


def test_derivatives_of_residual(backend):
    """Unused outputs, second derivatives, forward mode and vmap."""
    arguments, _ = _problem("norm_linear", CASES[1])
    arguments = [t.requires_grad_() for t in arguments]
    pair = partial(fk.norm_linear, residual=True)
    alone = [torch.autograd.grad(pair(*arguments)[i].sin().sum(), arguments[:1])[0] for i in (0, 1)]
    both = torch.autograd.grad(sum(t.sin().sum() for t in pair(*arguments)), arguments[:1])[0]
    torch.testing.assert_close(alone[0] + alone[1], both)
    torch.testing.assert_close(alone[1], arguments[0].cos())
    assert torch.autograd.gradcheck(pair, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(pair, arguments, fast_mode=True)

    def loss(x):
        return sum(t.sin().sum() for t in pair(x[None], *(w.detach() for w in arguments[1:])))

    x = arguments[0].detach()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), both)


@pytest.mark.parametrize("name", OPERATORS)
def test_per_sample_gradients(name, backend):
    """vmap of the gradient, with weights in common and weights of their own, against a loop."""
    operator = OPERATORS[name]
    arguments, _ = _problem(name, SMALL)
    maps, weights = arguments[: operator.num_maps], arguments[operator.num_maps :]
    samples = [torch.stack([m, m.flip(0), m * 2]) for m in maps]
    own = [torch.stack([w, w * 2, w + 1]) for w in weights]

    def loss(*arguments):
        return operator.function(*arguments).pow(3).sum()

    everything = tuple(range(len(arguments)))
    for chosen, weight_dim in ((weights, None), (own, 0)):
        for argnums in (everything, everything[: operator.num_maps]):
            slope = torch.func.grad(loss, argnums)
            dims = (0,) * len(maps) + (weight_dim,) * len(weights)
            ours = torch.func.vmap(slope, dims)(*samples, *chosen)
            each = [
                slope(*(s[i] for s in samples), *(w if weight_dim is None else w[i] for w in chosen))
                for i in range(3)
            ]
            torch.testing.assert_close(ours, tuple(map(torch.stack, zip(*each, strict=True))))
        values = torch.func.vmap(operator.function, dims)(*samples, *chosen)
        each = [
            operator.function(*(s[i] for s in samples), *(w if weight_dim is None else w[i] for w in chosen))
            for i in range(3)
        ]
        torch.testing.assert_close(values, torch.stack(each))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_compiled_without_gradients(name, kernels):
    """In one graph where no tensor wants a gradient, and where gradients are off."""
    function, num_maps, _ = OPERATORS[name]
    arguments, _ = _problem(name, SMALL)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    with fk.use_backend(kernels):
        expected = function(*arguments)
        torch.testing.assert_close(compiled(*arguments), expected)
        wanting = [t.requires_grad_() if i < num_maps else t for i, t in enumerate(arguments)]
        with torch.no_grad():
            torch.testing.assert_close(compiled(*wanting), expected)


def test_one_map_in_two_places():
    """Dynamo traces no Function that gets a tensor twice."""
    (_, x, *weights), _ = _problem("linear_norm_mlp", SMALL | {"other": SMALL["channels"]})
    x = x.requires_grad_()

    def twice(x):
        return fk.linear_norm_mlp(x, x, *weights)

    torch._dynamo.reset()
    runs = twice, torch.compile(twice, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = [torch.autograd.grad(run(x).square().sum(), x) for run in runs]
    torch.testing.assert_close(*gradients)


# --- Memory ----------------------------------------------------------------------------------


def _layouts(t):
    """The same numbers, laid out otherwise: reversed axes, channels last, every second element, an offset."""
    order = list(reversed(range(t.dim())))
    yield t.permute(order).contiguous().permute(order)
    yield t.movedim(min(1, t.dim() - 1), -1).contiguous().movedim(-1, min(1, t.dim() - 1))
    yield torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    yield torch.cat([t.new_full((3,), float("nan")), t.flatten()])[3:].view(t.shape)
    yield torch.cat([t, torch.full_like(t, float("nan"))], min(1, t.dim() - 1)).narrow(
        min(1, t.dim() - 1), 0, t.shape[min(1, t.dim() - 1)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_layouts(name, dtype, backend):
    arguments, dy = _problem(name, _sizes(2, 5, (3, 4, 6), 4, 6), dtype)
    expected = _outcome(backend, name, arguments, dy)
    for *others, other_dy in zip(*map(_layouts, (*arguments, dy)), strict=True):
        leaves = [t.detach().requires_grad_() for t in others]
        y = OPERATORS[name].function(*leaves)
        gradients = torch.autograd.grad(y, leaves, other_dy)
        tolerance = {"rtol": 1e-5, "atol": 5e-5} if dtype == torch.float32 else {}  # of sums in another order
        torch.testing.assert_close((y, *gradients), expected, **tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_expanded(name, backend):
    """Strides of 0: of the maps' batch and voxels, and of the gradient, as a sum's is."""
    operator = OPERATORS[name]
    arguments, _ = _problem(name, _sizes(1, 3, (1, 1), 2, 4, (1, 1)))
    leaves = [t.clone().requires_grad_() for t in arguments]
    wide = [t.expand(2, t.shape[1], 4, 5) if i < operator.num_maps else t for i, t in enumerate(leaves)]
    same = [t.contiguous() for t in wide]
    y, z = operator.function(*wide), operator.function(*same)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(z, leaves, torch.ones_like(z))
    )


def test_strides_beyond_32_bits():
    """A channel 2**31 elements from the next, in memory that is never touched in between."""
    with fk.use_backend("cpu"):
        memory = torch.empty(2**31 + 512, dtype=torch.bfloat16)
        x = memory.as_strided((1, 2, 8, 8), (0, 2**31, 8, 1)).copy_(torch.randn(1, 2, 8, 8))
        weight = torch.randn(3, 2)
        assert torch.equal(fk.linear(x, weight), fk.linear(x.contiguous(), weight))


@pytest.mark.parametrize("sizes", [
    _sizes(0, 3, (4, 2), 2, 5), _sizes(2, 3, (0, 2), 2, 5), _sizes(2, 3, (4, 0), 2, 5),
    _sizes(0, 2, (6,), 2, 3),
], ids=lambda s: str(tuple(s.values())))  # fmt: skip
@pytest.mark.parametrize("name", OPERATORS)
def test_empty(name, sizes, backend):
    arguments, dy = _problem(name, sizes)
    y, *gradients = _outcome(backend, name, arguments, dy)
    assert y.shape == dy.shape
    for argument, gradient in zip(arguments, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(argument))


@pytest.mark.parametrize("name", ["linear_norm_mlp", "join"])
def test_a_map_without_channels(name, backend):
    """Beside x, which has some."""
    arguments, dy = _problem(name, _sizes(2, 3, (4, 2), 0, 5))
    assert arguments[0].shape[1] == 0
    found, wanted = (_outcome(kernels, name, arguments, dy) for kernels in (backend, "reference"))
    torch.testing.assert_close(found, wanted)


def test_empty_operators():
    """The operators themselves, which a graph that was traced with other sizes may call with none."""
    ops = torch.ops.factorizer_kernels
    for size in ((0, 3, 4, 6), (2, 3, 0, 6)):
        x, weight, bias = torch.rand(size), torch.rand(5, 3), torch.rand(5)
        norm = torch.rand(3), torch.rand(3)
        y = ops.norm_linear(x, *norm, weight, bias, 1e-5, torch.float32, "cpu")
        assert y.shape == (size[0], 5, *size[2:])
        dx, *dweights = ops.norm_linear_backward(
            y, None, x, *norm, weight, bias, 1e-5, torch.float32, True, "cpu"
        )
        assert dx.shape == size
        assert all(torch.equal(d, torch.zeros_like(d)) for d in dweights)
        weight = torch.rand(5, 3, 2, 3)
        y = ops.patch_conv(x, weight, bias, torch.float32, "cpu")
        assert y.shape == (size[0], 5, size[2] // 2, 2)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threads(name, dtype):
    """The same bits, whatever their number."""
    arguments, dy = _problem(name, _sizes(2, 9, (30, 40), 7, 20), dtype)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outcomes.append([_outcome(kernels, name, arguments, dy) for kernels in KERNELS])
    finally:
        torch.set_num_threads(before)
    for others in outcomes[1:]:
        for first, other in zip(outcomes[0][KERNELS.index("cpu")], others[KERNELS.index("cpu")], strict=True):
            assert torch.equal(first, other)


# --- Values that are not ordinary --------------------------------------------------------------


@pytest.mark.parametrize("voxels", [7, 64, 100])
def test_an_mlp_without_eps(voxels, backend):
    """Where the tile has more columns than voxels the norm divides by zero there."""
    arguments, dy = _problem("linear_norm_mlp", _sizes(1, 8, (voxels,), 5, 12), torch.float32)
    arguments[3] = torch.zeros_like(arguments[3])  # a padding column is this bias, alike in all channels
    function = partial(fk.linear_norm_mlp, eps=0.0)
    found, wanted = (
        grads_of(kernels, function, [t.to(dtype) for t in arguments], (dy.to(dtype),), {})
        for kernels, dtype in ((backend, torch.float32), ("reference", torch.float64))
    )
    for mine, exact in zip(found.gradients, wanted.gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", OPERATORS)
def test_spoiled_voxel(name, value, backend):
    """What is not finite in one voxel reaches that voxel's results, and no other's."""
    operator = OPERATORS[name]
    arguments, dy = _problem(name, _sizes(1, 5, (12, 14), 6, 7), torch.float32)
    clean = _outcome(backend, name, arguments, dy)
    for spoiled in range(operator.num_maps):
        changed = [t.clone() for t in arguments]
        changed[spoiled][0, 1, 3, 4] = value
        y, *gradients = _outcome(backend, name, changed, dy)
        assert not y.isfinite().all()
        assert (~y.isfinite()).any(1).sum() <= 4  # a block's voxels at most
        kept = y.isfinite().all(1, keepdim=True).expand_as(y)
        torch.testing.assert_close(y[kept], clean[0][kept])
        for gradient, before in zip(gradients[: operator.num_maps], clean[1:], strict=False):
            spoilt = ~gradient.isfinite().all(1, keepdim=True).expand_as(gradient)
            assert spoilt[0, 0].sum() <= 4
            torch.testing.assert_close(gradient[~spoilt], before[~spoilt])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-12, 1e12])
def test_extreme_values(scale, kernels):
    """eps keeps a norm of nearly nothing finite; a large map is normalised as another."""
    arguments, dy = _problem("norm_linear", CASES[3], torch.float32)
    arguments[0] *= scale
    exact = _outcome("reference", "norm_linear", [t.double() for t in arguments], dy.double())
    for result, expected in zip(_outcome(kernels, "norm_linear", arguments, dy), exact, strict=True):
        assert result.isfinite().all()
        torch.testing.assert_close(
            result.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item() + 1e-40
        )


def test_norm_of_a_mean_far_from_zero(backend):
    """A norm takes the mean away before it squares."""
    x = torch.randn(1, 64, 100, dtype=torch.float64) + 1000
    weight, bias = torch.ones(64), torch.zeros(64)
    with fk.use_backend("reference"):
        exact = fk.layer_norm(x.float().double(), weight, bias)
    # The mean is a sum of 64 numbers near 1000, each rounded by 2**-24 of what the sum is then.
    tolerance = sum(1000 * k * 2**-24 for k in range(64)) / 64
    ours = fk.layer_norm(x.float(), weight, bias).double()
    torch.testing.assert_close(ours, exact, rtol=0, atol=tolerance)


def test_no_eps_and_padding(backend):
    """eps = 0, in a map that fills no tile: what pads the tile is no part of any sum."""
    arguments, dy = _problem("norm_linear", CASES[1])
    function = partial(fk.norm_linear, eps=0.0)
    leaves = [t.requires_grad_() for t in arguments]
    gradients = torch.autograd.grad(function(*leaves), leaves, dy)
    assert all(g.isfinite().all() for g in gradients)


def test_gelu():
    """Of the kernel, over the range of float: within 2e-7, or what rounding the result to float32 does."""
    x = torch.cat([torch.linspace(-12, 12, 50_001), torch.tensor([0.0, -0.0, 1e30, 1e-40])])
    one, zero = torch.ones(1, 1), torch.zeros(1)
    # One channel's norm is its shift: it makes the argument of the GELU.
    with fk.use_backend("cpu"):
        values = torch.stack(
            [
                fk.linear_norm_mlp(
                    torch.zeros(1, 1, 1),
                    torch.zeros(1, 1, 1),
                    one,
                    zero,
                    zero,
                    v.view(1),
                    one,
                    zero,
                    one,
                    zero,
                ).flatten()[0]
                for v in x[::50]
            ]
        )
    exact = F.gelu(x[::50].double())
    assert ((values - exact).abs() <= 2e-7 * exact.abs().clamp(min=1)).all()


# --- Dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(name, dtype, backend):
    """A product is of autocast's dtype, a sum of x's; float64 stays; weights keep their gradients' dtype."""
    operator = OPERATORS[name]
    arguments, _ = _problem(name, CASES[3], dtype)
    plain = operator.function(*arguments)
    leaves = [
        t.detach() if i < operator.num_maps else t.to(torch.float32).requires_grad_()
        for i, t in enumerate(arguments)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        y = operator.function(*leaves)
    kept = name in ("layer_norm", "linear_norm_mlp") or dtype == torch.float64
    assert y.dtype == (dtype if kept else torch.bfloat16)
    y.double().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves[operator.num_maps :])
    torch.testing.assert_close(y.double(), plain.double(), rtol=5e-2, atol=5e-2)


def test_mixed_maps_under_autocast(backend):
    """What autocast made of one map goes with another that it left alone."""
    (y, x, *weights), _ = _problem("linear_norm_mlp", CASES[3], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert fk.linear_norm_mlp(y.bfloat16(), x, *weights).dtype == torch.float32
    with pytest.raises(TypeError, match=r"y must be torch.float32, as x is, got torch.bfloat16"):
        fk.linear_norm_mlp(y.bfloat16(), x, *weights)


@pytest.mark.parametrize("name", OPERATORS)
def test_dtypes_of_the_weights(name, backend):
    """They are converted to the arithmetic's dtype, and their gradients back."""
    operator = OPERATORS[name]
    arguments, _ = _problem(name, CASES[1], torch.bfloat16)
    for dtype in DTYPES:
        leaves = [t.detach().to(dtype).requires_grad_() for t in arguments[operator.num_maps :]]
        y = operator.function(*arguments[: operator.num_maps], *leaves)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(leaf.grad.dtype == dtype for leaf in leaves)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels here")
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("name", ["linear", "patch_conv"])
def test_the_open_choice_leaves_small_products_to_plain_pytorch(name, batch):
    """It starts sooner. However many items there are; and who asks for the kernels by name gets them."""
    function, weight = getattr(fk, name), torch.randn(8, 4, *((2, 2, 2) if name == "patch_conv" else ()))
    weight.requires_grad_()

    def kernel_ran(*size: int) -> bool:
        y = function(torch.randn(batch, 4, *size), weight)
        return isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)

    assert not kernel_ran(16, 16, 16)
    assert kernel_ran(16, 16, 18)
    with fk.use_backend("cpu"):
        assert kernel_ran(16, 16, 16)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels here")
@pytest.mark.parametrize("strict", [False, True])
def test_a_graph_for_maps_of_any_size_keeps_the_kernels(strict):
    """Also where it was recorded for a map so small that plain PyTorch would run it."""

    class Network(torch.nn.Module):
        def forward(self, x, weight, filters):
            return fk.patch_conv(fk.linear(x, weight), filters)

    x, weight, filters = torch.randn(1, 4, 4, 10), torch.randn(8, 4), torch.randn(4, 8, 2, 2)
    even = 2 * torch.export.Dim("half", min=2, max=256)
    program = torch.export.export(
        Network(), (x, weight, filters), dynamic_shapes=({2: even}, None, None), strict=strict
    )
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert {"factorizer_kernels.norm_linear.default", "factorizer_kernels.patch_conv.default"} <= set(called)
    large = torch.randn(1, 4, 512, 10)  # for which the open choice takes the kernels too
    torch.testing.assert_close(program.module()(large, weight, filters), Network()(large, weight, filters))


def _overwriting(name: str, coarse: Tensor) -> Callable[..., Tensor]:
    """A call with a map (B, 8, 6, 5, 8), a second one beside it where there are two, and the memory."""
    norm, square, wide = torch.rand(8), torch.randn(8, 8), torch.randn(12, 8)
    factors = torch.rand(4, 1), torch.rand(8, 1)
    windows = {"head_dim": 4, "patch_size": (2, 1, 4), "shifts": (None, (1, 0, 2))}

    def call(x: Tensor, beside: Tensor, memory: Tensor | None = None) -> Tensor:
        if name == "linear_norm_mlp":
            weights = square, None, norm, norm, wide, None, wide.mT, None
            return fk.linear_norm_mlp(x, beside, *weights, overwrite=memory)
        if name == "join":
            return fk.join(x, coarse, square, torch.ones(16, 8, 2, 1, 2), norm, overwrite=memory)
        if name == "swin_nmf":
            return fk.swin_nmf(x, *factors, **windows, overwrite=memory)
        weights = norm, norm, square, None, *factors
        return fk.norm_linear_swin_nmf(x, *weights, **windows, overwrite=memory)[0]

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear_norm_mlp", "join", "norm_linear_swin_nmf"])
def test_a_result_may_lie_in_a_map_that_is_not_read_any_more(backend, name, dtype):
    if (backend, name) == ("torch", "norm_linear_swin_nmf"):
        pytest.skip("the backend torch has no swin_nmf")
    torch.manual_seed(0)
    y, x, coarse = (torch.randn(2, c, *s).to(dtype) for c, s in ((8, (6, 5, 8)),) * 2 + ((16, (3, 5, 4)),))
    call = _overwriting(name, coarse)
    expected = call(y, x)
    memory, other = y.clone(), x.clone()
    result = call(memory, other, memory)
    assert torch.equal(result, expected)
    assert torch.equal(other, x)
    if backend == "cpu":
        assert result.data_ptr() == memory.data_ptr()
        assert memory._version > 0  # a backward pass that needed the old values says so
    # Not where something is differentiated, nor where the result does not fit.
    memory, leaf = y.clone(), y.clone().requires_grad_()
    assert call(leaf, leaf, memory).data_ptr() != memory.data_ptr()
    assert torch.equal(memory, y)
    for memory in (y[:, :4].clone(), y.movedim(2, 4).contiguous().movedim(4, 2), y.to(torch.complex64)):
        kept = memory.clone()
        assert torch.equal(call(y, x, memory), expected)
        assert torch.equal(memory, kept)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no compiled kernels here")
@pytest.mark.parametrize("name", ["linear_norm_mlp", "join", "norm_linear_swin_nmf", "swin_nmf"])
def test_memory_that_is_read_in_another_layout_is_left_alone(name):
    """As is memory that requires a gradient, which would be another tensor's then."""
    torch.manual_seed(0)
    call = _overwriting(name, torch.randn(8, 16, 3, 5, 4))
    whole, other = torch.randn(9, 8, 6, 5, 8), torch.randn(8, 8, 6, 5, 8)
    memory = whole[1:]
    kept = memory.clone()
    for x in (memory.transpose(0, 1), memory[:1].expand(8, -1, -1, -1, -1), whole[:-1]):
        for maps in ((x, other), (other, x)) if name == "linear_norm_mlp" else ((x, other),):
            expected = call(*(t.clone() for t in maps))
            torch.testing.assert_close(call(*maps, memory), expected)
            assert torch.equal(memory, kept)
    leaf = kept.clone().requires_grad_()
    for required in (leaf, leaf * 1):
        assert not call(other, other, required).requires_grad
        assert torch.equal(required, kept)
    for x in (memory, memory.view_as(memory)):  # the same layout
        assert call(x, other, memory).data_ptr() == memory.data_ptr()


def test_memory_of_another_type_is_refused(backend):
    x, norm, square = torch.rand(1, 8, 4, 4), torch.rand(8), torch.rand(8, 8)
    factors, windows = (torch.rand(4, 1), torch.rand(4, 1)), {"head_dim": 4, "patch_size": 2}
    chain = square, None, norm, norm, square, None, square, None
    for wrong, got in (("x", "str"), (1, "int"), ([x], "list"), (x.numpy(), "ndarray")):
        for call in (
            partial(fk.linear_norm_mlp, x, x, *chain),
            partial(fk.join, x, x[..., ::2, ::2], square, torch.rand(8, 8, 2, 2)),
            partial(fk.swin_nmf, x, *factors, **windows),
            partial(fk.norm_linear_swin_nmf, x, norm, norm, square, None, *factors, **windows),
        ):
            with pytest.raises(TypeError, match=rf"overwrite must be a torch.Tensor or None, got {got}"):
                call(overwrite=wrong)
