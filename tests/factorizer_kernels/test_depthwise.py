"""depthwise_conv: the formula, values and gradients in every layout, any derivative, threads, autocast."""

import itertools
from math import prod

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests_support import grads_of

import factorizer_kernels as fk

# Sizes of x and of a filter, for all that the kernel does: rows and planes shorter and longer than vectors
# and than blocks of them, tiles of the rows, columns and planes of large maps, several maps handed out at
# once.
CASES = [
    ((2, 3, 48), (3,)),
    ((1, 2, 7), (7,)),
    ((2, 1, 9000), (5,)),
    ((2, 3, 13, 20), (3, 5)),
    ((1, 2, 9, 8), (1, 7)),
    ((1, 1, 70, 300), (7, 3)),
    ((1, 2, 5, 4200), (3, 3)),
    ((2, 3, 12, 14, 16), (3, 3, 3)),
    ((1, 2, 9, 17, 33), (5, 5, 5)),
    ((1, 1, 10, 11, 12), (7, 7, 7)),
    ((2, 5, 4, 4, 4), (3, 3, 3)),
    ((1, 3, 3, 2, 1), (5, 3, 7)),
    ((1, 2, 33, 6, 5), (3, 1, 3)),
    ((1, 1, 40, 24, 24), (3, 3, 3)),
    ((1, 1, 9, 130, 140), (3, 5, 3)),
    ((1, 2, 8, 8, 8), (1, 1, 1)),
    ((1, 1, 1, 1, 1), (3, 3, 3)),
    ((3, 40, 5, 6, 7), (3, 3, 3)),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _problem(size, kernel_size, dtype=torch.float64, seed=0):
    """(x, weight, bias), and a gradient of the loss by y."""
    generator = torch.Generator().manual_seed(seed)
    channels = size[1]
    shapes = (size, (channels, *kernel_size), (channels,), size)
    x, weight, bias, dy = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(dtype), weight.to(compute), bias.to(compute)), dy.to(dtype)


def _outcome(backend, inputs, dy):
    values, gradients = grads_of(backend, fk.depthwise_conv, inputs, (dy,), {})
    return (*values, *gradients)


@pytest.mark.parametrize(
    ("size", "kernel_size"), [((2, 3, 11), (3,)), ((1, 2, 4, 6), (5, 1)), ((2, 2, 3, 4, 5), (3, 5, 7))]
)
def test_formula(size, kernel_size, backend):
    (x, weight, bias), _ = _problem(size, kernel_size)
    padded = F.pad(x, [r for k in reversed(kernel_size) for r in (k // 2, k // 2)])
    expected = bias.view(-1, *(1,) * len(kernel_size)).expand(x.shape)
    for tap in itertools.product(*map(range, kernel_size)):
        seen = padded[(..., *(slice(t, t + n) for t, n in zip(tap, size[2:], strict=True)))]
        expected = expected + weight[(slice(None), *tap)].view(-1, *(1,) * len(kernel_size)) * seen
    torch.testing.assert_close(fk.depthwise_conv(x, weight, bias), expected)
    torch.testing.assert_close(
        fk.depthwise_conv(x, weight), expected - bias.view(-1, *(1,) * len(kernel_size))
    )


# Of the L2 norm: what rounding a result to its dtype does, or the roundings of a sum of 1e5 terms in float64
# and, in a few lanes, of 2e4 in float32.
TOLERANCES = {torch.float32: 2e-6, torch.float64: 5e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def _assert_close(result, expected, terms):
    """``expected`` are sums of so many products of normal draws: of size √terms, if they do not cancel."""
    assert result.shape == expected.shape
    size = max(expected.norm().item(), (expected.numel() * terms) ** 0.5)
    assert (result.double() - expected).norm().item() <= TOLERANCES[result.dtype] * size


@pytest.mark.parametrize(("size", "kernel_size"), CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_meets_reference(size, kernel_size, dtype, poisoned):
    inputs, dy = _problem(size, kernel_size, dtype)
    exact = _outcome("reference", [t.double() for t in inputs], dy.double())
    ours = _outcome("cpu", inputs, dy)
    types = (dtype, dtype, inputs[1].dtype, inputs[1].dtype)
    taps, voxels = prod(kernel_size), prod(size) // size[1]
    for result, expected, wanted, terms in zip(ours, exact, types, (taps, taps, voxels, voxels), strict=True):
        assert result.dtype == wanted
        assert result.is_contiguous()
        _assert_close(result, expected, terms)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_only_what_is_wanted(mask, backend):
    inputs, dy = _problem((2, 3, 6, 5, 4), (3, 3, 3))
    expected = _outcome("reference", inputs, dy)[1:]
    leaves = [t.clone().requires_grad_(wanted) for t, wanted in zip(inputs, mask, strict=True)]
    fk.depthwise_conv(*leaves).backward(dy)
    for leaf, wanted, gradient in zip(leaves, mask, expected, strict=True):
        if wanted:
            torch.testing.assert_close(leaf.grad, gradient)
        else:
            assert leaf.grad is None


def test_keeps_x_and_weight(backend):
    (x, weight, bias), _ = _problem((1, 4, 8, 8, 8), (3, 3, 3))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        fk.depthwise_conv(*leaves)
    assert kept <= {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize(
    ("size", "kernel_size"), [((2, 2, 5), (3,)), ((1, 2, 3, 4), (3, 5)), ((1, 2, 3, 2, 4), (3, 1, 3))]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(size, kernel_size, with_bias, backend):
    (x, weight, bias), _ = _problem(size, kernel_size)
    leaves = [t.requires_grad_() for t in (x, weight, bias)[: 2 + with_bias]]
    assert torch.autograd.gradcheck(fk.depthwise_conv, leaves)
    assert torch.autograd.gradgradcheck(fk.depthwise_conv, leaves)


def test_third_derivative(backend):
    (x, weight, bias), _ = _problem((1, 2, 3, 4), (3, 3))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def slope(*leaves):
        y = fk.depthwise_conv(*leaves).pow(3).sum()
        return torch.autograd.grad(y, leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(slope, leaves)


@pytest.mark.filterwarnings("error")  # such as the one about a slow loop over the mapped dimension
def test_vmap_of_second_derivatives(backend):
    """Of samples with weights in common and with weights of their own, against a loop."""
    (x, weight, bias), _ = _problem((3, 2, 4, 5), (3, 3))
    weights = torch.stack([weight, weight.flip(-1), weight * 2])

    def penalty(x, weight):
        def energy(x, weight):
            return fk.depthwise_conv(x[None], weight, bias).pow(3).sum()

        dx, dweight = torch.func.grad(energy, (0, 1))(x, weight)
        return dx.square().sum() + dweight.square().sum()

    slope = torch.func.grad(penalty, (0, 1))
    for w, dim in ((weight, None), (weights, 0)):
        ours = torch.func.vmap(slope, (0, dim))(x, w)
        each = [slope(x[i], w if dim is None else w[i]) for i in range(len(x))]
        torch.testing.assert_close(ours, tuple(map(torch.stack, zip(*each, strict=True))))


def _layouts(t):
    """The same numbers, laid out otherwise: reversed axes, channels last, every second element, an offset."""
    order = list(reversed(range(t.dim())))
    yield t.permute(order).contiguous().permute(order)
    yield t.movedim(1, -1).contiguous().movedim(-1, 1)
    yield torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    yield torch.cat([t.new_full((3,), float("nan")), t.flatten()])[3:].view(t.shape)


@pytest.mark.parametrize(
    ("size", "kernel_size"), [((2, 3, 20), (3,)), ((2, 3, 9, 8), (5, 3)), ((2, 3, 7, 9, 16), (3, 3, 3))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(size, kernel_size, dtype, backend):
    inputs, dy = _problem(size, kernel_size, dtype)
    expected = _outcome(backend, inputs, dy)
    for x, other_dy in zip(_layouts(inputs[0]), _layouts(dy), strict=True):
        y = fk.depthwise_conv(x, *inputs[1:])
        torch.testing.assert_close(y, expected[0])
        leaf = x.detach().requires_grad_()
        weight = inputs[1].clone().requires_grad_()
        gradients = torch.autograd.grad(fk.depthwise_conv(leaf, weight), (leaf, weight), other_dy)
        torch.testing.assert_close(gradients, expected[1:3])
    for weight in _layouts(inputs[1]):
        torch.testing.assert_close(fk.depthwise_conv(inputs[0], weight, inputs[2]), expected[0])


def test_expanded(backend):
    """Strides of 0: one map for all the channels and samples."""
    (x, weight, bias), dy = _problem((1, 1, 6, 7, 8), (3, 3, 3))
    x, dy = x.expand(2, 4, 6, 7, 8), dy.expand(2, 4, 6, 7, 8)
    weight, bias = torch.randn(4, 3, 3, 3, dtype=torch.float64), bias.expand(4)
    expected = _outcome(backend, (x.contiguous(), weight, bias.contiguous()), dy.contiguous())
    leaves = (x.detach().requires_grad_(), weight.requires_grad_(), bias.detach().requires_grad_())
    y = fk.depthwise_conv(*leaves)
    torch.testing.assert_close((y, *torch.autograd.grad(y, leaves, dy)), expected)


def test_strides_beyond_32_bits():
    """A channel 2**31 elements from the next, in memory that is never touched in between."""
    with fk.use_backend("cpu"):
        memory = torch.empty(2**31 + 512, dtype=torch.bfloat16)
        x = memory.as_strided((1, 2, 8, 8), (0, 2**31, 8, 1)).copy_(torch.randn(1, 2, 8, 8))
        weight = torch.randn(2, 3, 3)
        torch.testing.assert_close(fk.depthwise_conv(x, weight), fk.depthwise_conv(x.contiguous(), weight))


@pytest.mark.parametrize(
    "size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 2, 6), (1, 2, 0, 3, 4)], ids=str
)
def test_empty(size, backend):
    (x, weight, bias), dy = _problem(size, (3,) * (len(size) - 2))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = fk.depthwise_conv(*leaves)
    assert y.shape == size
    gradients = torch.autograd.grad(y, leaves, dy)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    for dtype in DTYPES:
        for offset in (bias, None):
            assert fk.depthwise_conv(x.to(dtype), weight, offset).dtype == dtype


def test_empty_operators():
    """The operators themselves, which a graph that was traced with other sizes may call with none."""
    ops = torch.ops.factorizer_kernels
    for size in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)):
        (x, weight, bias), dy = _problem(size, (3, 3))
        assert ops.depthwise_conv(x, weight, bias, "cpu").shape == size
        dx, dweight, dbias = ops.depthwise_conv_backward(dy, x, weight, (True, True, True), "cpu")
        assert dx.shape == size
        assert torch.equal(dweight, torch.zeros_like(weight))
        assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize(("size", "kernel_size"), [
    ((1, 1, 40, 24, 24), (3, 3, 3)), ((2, 3, 12, 12, 12), (5, 5, 5)), ((1, 2, 200, 300), (7, 7)),
    ((1, 70, 4, 4, 4), (3, 3, 3)), ((1, 1, 9000), (3,)),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_threads(size, kernel_size, dtype):
    """The same bits, whatever their number."""
    inputs, dy = _problem(size, kernel_size, dtype)
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outcomes.append(_outcome("cpu", inputs, dy))
    finally:
        torch.set_num_threads(before)
    for others in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], others, strict=True))


@pytest.mark.parametrize("size", [(1, 3, 9, 10, 11), (1, 3, 16, 16, 16), (1, 3, 20, 21)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_spoiled_voxel(size, value, backend):
    """A NaN or infinity spoils what the filter sees it from, and of the weights its channel's."""
    kernel_size = (3,) * (len(size) - 2)
    inputs, dy = _problem(size, kernel_size, torch.float32)
    clean = _outcome(backend, inputs, dy)
    place = (0, 1, *(n - 2 for n in size[2:]))
    reached = torch.zeros(size, dtype=torch.bool)
    reached[(0, 1, *(slice(n - 3, n) for n in size[2:]))] = True

    inputs[0][place] = value
    y, dx, dweight, dbias = _outcome(backend, inputs, dy)
    assert torch.equal(y[~reached], clean[0][~reached])
    assert not y[reached].isfinite().any()
    assert torch.equal(dx, clean[1])
    assert torch.equal(dweight[[0, 2]], clean[2][[0, 2]])
    assert torch.equal(dbias, clean[3])

    inputs, dy = _problem(size, kernel_size, torch.float32)
    dy[place] = value
    y, dx, dweight, dbias = _outcome(backend, inputs, dy)
    assert torch.equal(y, clean[0])
    assert torch.equal(dx[~reached], clean[1][~reached])
    assert not dx[reached].isfinite().any()
    for ours, before in ((dweight, clean[2]), (dbias, clean[3])):
        assert torch.equal(ours[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e30])
def test_extreme_values(scale, backend):
    """Zeros, numbers below the normal ones, which are kept, and large ones."""
    inputs, dy = _problem((1, 2, 6, 7, 16), (3, 3, 3), torch.float32)
    expected = _outcome("reference", [t.double() for t in (inputs[0] * scale, *inputs[1:])], dy.double())
    ours = _outcome(backend, (inputs[0] * scale, *inputs[1:]), dy)
    for result, exact in zip(ours, expected, strict=True):
        # Of subnormal x each product is rounded to a multiple of 1.4e-45.
        torch.testing.assert_close(
            result.double(), exact, rtol=1e-5, atol=max(1e-6 * exact.abs().max().item(), 1e-43)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast(dtype, backend):
    """As of torch's convolution: x takes autocast's dtype, float64 stays; parameters are not rounded."""
    (x, weight, bias), _ = _problem((1, 2, 6, 8), (3, 3), dtype)
    weight, bias = (t.float().requires_grad_() for t in (weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        y = fk.depthwise_conv(x, weight, bias)
        assert y.dtype == F.conv2d(x, weight[:, None].to(x.dtype), groups=2).dtype
    (y.float() if dtype != torch.float64 else y).sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
    rounded = x if dtype == torch.float64 else x.bfloat16()
    torch.testing.assert_close(y, fk.depthwise_conv(rounded, weight, bias))


def test_dtypes_of_the_weights(backend):
    """They are converted to the arithmetic's dtype, and their gradients back."""
    (x, weight, bias), _ = _problem((1, 2, 6, 8), (3, 3), torch.bfloat16)
    for dtype in DTYPES:
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (weight, bias)]
        y = fk.depthwise_conv(x, *leaves)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert all(leaf.grad.dtype == dtype for leaf in leaves)


def test_large_filters_are_left_to_the_reference():
    (x, weight, bias), dy = _problem((1, 2, 12, 12), (9, 3))
    expected = _outcome("reference", (x, weight, bias), dy)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = fk.depthwise_conv(*leaves)
    torch.testing.assert_close((y, *torch.autograd.grad(y, leaves, dy)), expected)
    with fk.use_backend("cpu"), pytest.raises(ValueError, match=r"kernels of 1, 3, 5 or 7.*got \(9, 3\)"):
        fk.depthwise_conv(x, weight)


@st.composite
def problems(draw):
    axes = draw(st.integers(1, 3))
    kernel_size = [draw(st.sampled_from([1, 3, 5, 7])) for _ in range(axes)]
    spatial = [
        draw(st.integers(1, most)) for most in draw(st.sampled_from([(9, 9, 40), (9, 40, 20), (40, 9, 9)]))
    ]
    size = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), *spatial[3 - axes :])
    return size, kernel_size, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**31))


@settings(deadline=None)
@given(problems())
def test_any_problem(problem):
    size, kernel_size, dtype, seed = problem
    inputs, dy = _problem(size, kernel_size, dtype, seed)
    exact = _outcome("reference", [t.double() for t in inputs], dy.double())
    taps, voxels = prod(kernel_size), prod(size) // size[1]
    for result, expected, terms in zip(
        _outcome("cpu", inputs, dy), exact, (taps, taps, voxels, voxels), strict=True
    ):
        _assert_close(result, expected, terms)
