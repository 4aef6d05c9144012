"""The operators in PyTorch's settings: opcheck, compile, export, func, vmap, checkpointing, threads."""

import threading
from functools import partial

import pytest
import torch
from tests_support import defined_operators
from torch.autograd import forward_ad

import factorizer_kernels as fk


def _nmf_arguments(rank=2):
    return torch.rand(2, 3, 6, 20), torch.rand(6, rank), torch.rand(20, rank)


CUT = {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}


def _layouts(x):
    yield x
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield x[:1].expand(x.shape)


ops = torch.ops.factorizer_kernels
OPERATORS = {
    "nmf": lambda x, u0, v0: (x, u0, v0, 3, "hals", 3, 1e-16, "cpu"),
    "nmf_backward": lambda x, u0, v0: (x, x, u0, v0, True, 3, "mu", 2, 1e-16, "cpu"),
    "nmf_factors": lambda x, u0, v0: (x, u0, v0, 3, "mu", 3, 1e-16, "cpu"),
    "nmf_factors_backward": lambda x, u0, v0: (
        x[..., :2], x.mT[..., :2], x, u0, v0, False, 3, "mu", 3, 1e-16, "cpu",
    ),
}  # fmt: skip
_NORM, _LINEAR = (torch.rand(4), torch.rand(4)), (torch.rand(6, 4), torch.rand(6))
_MLP = (torch.rand(4, 4), torch.rand(4), *_NORM, *_LINEAR, torch.rand(4, 6), torch.rand(4))
_JOIN = torch.rand(5, 4), torch.rand(4, 5, 2, 4), torch.rand(5)
_PATCH = torch.rand(5, 4, 2, 4), torch.rand(5)
MAP_OPERATORS = {
    "norm_linear": lambda x: (x, *_NORM, *_LINEAR, 1e-5, x.dtype, "cpu"),
    "norm_linear_backward": lambda x: (
        torch.rand(2, 6, 8, 16), x, x, *_NORM, *_LINEAR, 1e-5, x.dtype, True, "cpu",
    ),
    "linear_norm_mlp": lambda x: (x, x + 1, *_MLP, 1e-5, x.dtype, "cpu"),
    "linear_norm_mlp_backward": lambda x: (x, x, x + 1, *_MLP, 1e-5, x.dtype, True, "cpu"),
    "join": lambda x: (x, x[..., ::2, ::4], *_JOIN, x.dtype, "cpu"),
    "join_backward": lambda x: (
        torch.rand(2, 5, 8, 16), x, x[..., ::2, ::4], *_JOIN, x.dtype, True, "cpu",
    ),
    "patch_conv": lambda x: (x, *_PATCH, x.dtype, "cpu"),
    "patch_conv_backward": lambda x: (torch.rand(2, 5, 4, 4), x, *_PATCH, x.dtype, False, "cpu"),
    "depthwise_conv": lambda x: (x, torch.rand(4, 3, 5), torch.rand(4), "cpu"),
    "depthwise_conv_backward": lambda x: (x, x, torch.rand(4, 3, 5), [True, True, False], "cpu"),
    "sw_matricize": lambda x: (x, 4, [4, 4], [0, 0, 2, 2], True, "cpu"),
    "sw_dematricize": lambda x: (
        torch.rand(4, 8, 4, 16).mT.contiguous().mT, [2, 4, 8, 16], 4, [4, 4], [0, 0, 2, 2], False, "cpu",
    ),
    "swin_nmf": lambda x: (
        x, torch.rand(4, 1), torch.rand(16, 1), 4, [4, 4], [0, 0, 2, 2], True, 3, "hals", 3, 1e-16,
        "cpu",
    ),
    "swin_nmf_backward": lambda x: (
        x, x, torch.rand(4, 1), torch.rand(16, 1), True, 4, [4, 4], [0, 0, 2, 2], True, 3, "hals", 3, 1e-16,
        "cpu",
    ),
}  # fmt: skip


def test_the_tables_hold_every_operator():
    assert OPERATORS.keys() | MAP_OPERATORS.keys() == defined_operators()


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_nmf(name):
    x, u0, v0 = _nmf_arguments()
    for layout in _layouts(x):
        torch.library.opcheck(getattr(ops, name).default, OPERATORS[name](layout, u0, v0))


@pytest.mark.parametrize("name", MAP_OPERATORS)
def test_opcheck_maps(name):
    for layout in _layouts(torch.rand(2, 4, 8, 16)):
        torch.library.opcheck(getattr(ops, name).default, MAP_OPERATORS[name](layout))


def _stacked(arguments, mapped):
    """The arguments with a leading dimension of 3 in the ``mapped`` ones, and where each has it."""
    generator = torch.Generator().manual_seed(0)
    scales = 0.5 + torch.rand(3, generator=generator)
    stacked = [
        torch.stack([a * scale for scale in scales]) if i in mapped else a for i, a in enumerate(arguments)
    ]
    return stacked, tuple(0 if i in mapped else None for i in range(len(arguments)))


@pytest.mark.parametrize("name", [*OPERATORS, *MAP_OPERATORS])
def test_vmap_of_every_operator(name):
    """Its own rule, with every argument mapped, or one alone, against a loop."""
    in_maps = name in MAP_OPERATORS
    arguments = (
        MAP_OPERATORS[name](torch.rand(2, 4, 8, 16)) if in_maps else OPERATORS[name](*_nmf_arguments())
    )
    operator = getattr(ops, name).default
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    for mapped in (tensors, *([i] for i in tensors)):
        stacked, dims = _stacked(arguments, mapped)
        result = torch.func.vmap(operator, dims)(*stacked)
        loop = [
            operator(*(a[i] if d == 0 else a for a, d in zip(stacked, dims, strict=True))) for i in range(3)
        ]
        if isinstance(result, torch.Tensor):
            result, loop = (result,), [(t,) for t in loop]
        for ours, theirs in zip(result, zip(*loop, strict=True), strict=True):
            torch.testing.assert_close(ours, torch.stack(theirs))


def _value_and_grad(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx


@pytest.mark.parametrize(
    ("backend_name", "dynamic"),
    [
        ("cpu", True),
        ("reference", False),
        # Two minutes: each of the reference's reshapes is reasoned about in symbols.
        pytest.param("reference", True, marks=pytest.mark.slow),
    ],
)
def test_compile_fullgraph(backend_name, dynamic):
    """Forward and backward in one graph, and, of dynamic ones, no new one for another batch or map."""
    u0, v0, weight, bias = torch.rand(4, 1), torch.rand(16, 1), torch.rand(8, 1, 3), torch.rand(8)

    def network(x):
        y = fk.swin_nmf(fk.depthwise_conv(x * 2, weight, bias), u0, v0, num_iters=2, **CUT)
        z = fk.sw_matricize(y, **CUT)
        z = z + fk.nmf(z.relu(), u0, v0, num_iters=1, solver="mu")
        return fk.sw_dematricize(z, y.shape, **CUT).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with fk.use_backend(backend_name):
        with torch._dynamo.config.patch(error_on_recompile=False):
            first = torch.rand(2, 8, 12, 20)  # no size equals another, which would tie them together
            torch.testing.assert_close(_value_and_grad(compiled, first), _value_and_grad(network, first))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in ((3, 8, 12, 20), (5, 8, 16, 24)) if dynamic else ():
                x = torch.rand(shape)
                torch.testing.assert_close(_value_and_grad(compiled, x), _value_and_grad(network, x))


def test_compile_pointwise():
    """The chains stay operators of ours, in one graph with their backwards."""
    square, wide, patch = torch.rand(4, 4), torch.rand(6, 4), torch.rand(4, 4, 2, 2)

    def network(x):
        y = fk.norm_linear(x, *_NORM, square)
        y = fk.linear_norm_mlp(y, x, square, None, *_NORM, wide, None, wide.mT, None)
        return fk.join(y, fk.patch_conv(y, patch), square, patch)

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 4, 80, 104)  # so large that the kernels run without a graph too
    torch.testing.assert_close(_value_and_grad(compiled, x), _value_and_grad(network, x))


def test_export_and_reload(tmp_path):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("u0", torch.rand(4, 1))
            self.register_buffer("v0", torch.rand(16, 1))
            self.weight = torch.nn.Parameter(torch.rand(8, 3, 3))

        def forward(self, x):
            return fk.swin_nmf(fk.depthwise_conv(x, self.weight), self.u0, self.v0, **CUT)

    layer, x = Layer(), torch.rand(2, 8, 8, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})
    torch.export.save(program, tmp_path / "layer.pt2")
    reloaded = torch.export.load(tmp_path / "layer.pt2").module()
    other = torch.rand(5, 8, 8, 8)
    torch.testing.assert_close(reloaded(other), layer(other))


class Windowed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.u0, self.v0 = (torch.nn.Parameter(torch.rand(n, 1)) for n in (4, 16))

    def forward(self, x):
        return fk.swin_nmf(x, self.u0, self.v0, num_iters=2, **CUT)


def test_traced_graphs_need_torch_alone(tmp_path):
    """They hold the reference, with its gradient; a kernel only where its backend is named."""
    layer, x = Windowed(), torch.rand(1, 4, 8, 8)
    traced = torch.jit.trace(layer, x)
    traced.save(tmp_path / "traced.pt")
    assert "factorizer_kernels::" not in str(traced.inlined_graph)
    reloaded = torch.jit.load(tmp_path / "traced.pt")
    other = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(reloaded(other), layer(other))
    # Of v0 alone: at rank 1 HALS never reads u0.
    ours, theirs = (torch.autograd.grad(f(other).square().sum(), f.v0) for f in (reloaded, layer))
    torch.testing.assert_close(ours, theirs)
    with fk.use_backend("cpu"):
        with pytest.raises(NotImplementedError, match=r"swin_nmf: trace inside torch.no_grad\(\); or inside"):
            torch.jit.trace(layer, x)
        with torch.no_grad():
            assert "factorizer_kernels::swin_nmf" in str(torch.jit.trace(layer, x).inlined_graph)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx_files_hold_no_kernel(dynamo, tmp_path):
    """The reference, by itself; where a kernel is named, the error names the way."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    layer, x, path = Windowed(), torch.rand(1, 4, 8, 8), str(tmp_path / "layer.onnx")
    torch.onnx.export(layer, (x,), path, dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(result), layer(x).detach(), rtol=1e-4, atol=1e-5)
    with (
        fk.use_backend("cpu"),
        pytest.raises(Exception, match="an ONNX file holds no kernel; leave the choice"),
    ):
        torch.onnx.export(layer, (x,), path, dynamo=dynamo, verbose=False)


def _each(function, size, in_dims, arguments):
    """``function`` on one slice after the other, its outputs stacked: what vmap must give."""
    outputs = [
        function(*(t if d is None else t.select(d, i) for t, d in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    ]
    return (
        torch.stack(outputs)
        if isinstance(outputs[0], torch.Tensor)
        else tuple(map(torch.stack, zip(*outputs, strict=True)))
    )


def _square_sum(function):
    def loss(*arguments):
        outputs = function(*arguments)
        return sum(t.square().sum() for t in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return loss


def _vmap_cases():
    """name, function of three tensors, arguments, where the mapped dimension of 3 is in each."""

    def rand(*shape):
        return torch.rand(shape, dtype=torch.float64)

    nmf, factors = partial(fk.nmf, solver="mu"), partial(fk.nmf_factors, solver="mu")
    swin = partial(fk.swin_nmf, solver="mu", **CUT)
    matrices, maps, v0, v_map = rand(3, 2, 6, 20), rand(3, 2, 8, 8, 8) - 0.3, rand(20, 2), rand(16, 2)
    yield "nmf", nmf, (matrices, rand(6, 2), v0), (0, None, None)
    yield "nmf of x's second", nmf, (matrices.movedim(0, 1), rand(6, 2), v0), (1, None, None)
    yield "nmf of u0", nmf, (matrices[0], rand(3, 6, 2), v0), (None, 0, None)
    yield "nmf of all", nmf, (matrices, rand(2, 3, 6, 2), rand(20, 3, 2)), (0, 1, 1)
    yield "nmf_factors", factors, (matrices, rand(6, 2), v0), (0, None, None)
    yield "nmf_factors of v0", factors, (matrices, rand(2, 6, 2), rand(3, 20, 2)), (0, None, 0)
    yield "swin_nmf", swin, (maps, rand(4, 2), v_map), (0, None, None)
    yield "swin_nmf of x's last", swin, (maps.movedim(0, -1), rand(4, 2), v_map), (4, None, None)
    yield "swin_nmf of u0", swin, (maps[0], rand(3, 4, 2), v_map), (None, 0, None)
    yield "swin_nmf, u0 per window", swin, (maps, rand(8, 4, 4, 2), v_map), (0, None, None)
    yield (
        "swin_nmf, factors per copy and head",
        swin,
        (maps, rand(8, 1, 4, 2), rand(3, 8, 1, 16, 2)),
        (0, None, 0),
    )
    conv, weight, bias = fk.depthwise_conv, rand(8, 3, 5), rand(8)
    yield "depthwise_conv", conv, (maps, weight, bias), (0, None, None)
    yield "depthwise_conv of x's last", conv, (maps.movedim(0, -1), weight, bias), (4, None, None)
    yield "depthwise_conv of weight", conv, (maps[0], rand(8, 3, 3, 5), bias), (None, 1, None)
    yield "depthwise_conv of bias", conv, (maps[0], weight, rand(3, 8)), (None, None, 0)
    yield "depthwise_conv of all", conv, (maps, rand(3, 8, 3, 5), rand(8, 3)), (0, 0, 1)


VMAP_CASES = {name: case for name, *case in _vmap_cases()}


@pytest.mark.parametrize("case", VMAP_CASES)
@pytest.mark.filterwarnings("error")  # such as the one about a slow loop over the mapped dimension
def test_vmap(case, backend):
    """vmap of the operators, of their gradients, and gradients through vmap, against a loop."""
    function, arguments, in_dims = VMAP_CASES[case]
    mapped = torch.func.vmap(function, in_dims)
    torch.testing.assert_close(mapped(*arguments), _each(function, 3, in_dims, arguments))
    for argnums in ((0, 1, 2), (0,)):
        gradient = torch.func.grad(_square_sum(function), argnums)
        expected = _each(gradient, 3, in_dims, arguments)
        torch.testing.assert_close(torch.func.vmap(gradient, in_dims)(*arguments), expected)
        through = torch.func.grad(_square_sum(mapped), argnums)(*arguments)
        for ours, slices, dim in zip(through, expected, in_dims, strict=False):
            torch.testing.assert_close(ours, slices.sum(0) if dim is None else slices.movedim(0, dim))


@pytest.mark.filterwarnings("error")
def test_vmap_of_windows(backend):
    x = torch.randn(3, 2, 8, 8, 8, dtype=torch.float64)
    cut, join = partial(fk.sw_matricize, **CUT), partial(fk.sw_dematricize, size=x.shape[1:], **CUT)
    z = torch.func.vmap(cut)(x)
    assert torch.equal(z, torch.stack([cut(t) for t in x]))
    assert torch.equal(torch.func.vmap(cut, in_dims=2)(x.movedim(0, 2)), z)
    z = z * torch.rand_like(z)  # the copies differ
    torch.testing.assert_close(torch.func.vmap(join)(z), torch.stack([join(t) for t in z]))
    for function, argument in ((cut, x), (join, z)):
        gradient = torch.func.grad(lambda t, f=function: f(t).pow(3).sum())
        torch.testing.assert_close(
            torch.func.vmap(gradient)(argument), torch.stack([gradient(t) for t in argument])
        )


def test_vmap_twice_and_without_gradient_steps(backend):
    x, u0, v0 = _nmf_arguments()
    constant = partial(fk.nmf, num_grad_steps=0)
    mapped = torch.func.vmap(torch.func.vmap(constant, (0, None, None)), (0, None, None))
    torch.testing.assert_close(mapped(x, u0, v0), constant(x, u0, v0))
    slope = torch.func.vmap(torch.func.grad(lambda x: constant(x, u0, v0).sum()))(x)
    assert (slope == 0).all()


@pytest.mark.parametrize("rank", [1, 2])
def test_func_grad(backend, rank):
    x, u0, v0 = _nmf_arguments(rank)
    loss = _square_sum(partial(fk.nmf, solver="mu"))
    gradients = torch.func.grad(loss, argnums=(0, 1, 2))(x, u0, v0)
    leaves = [t.clone().requires_grad_() for t in (x, u0, v0)]
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(*leaves), leaves))


def test_func_grad_of_windows(backend):
    u0, v0, x = torch.rand(4, 1), torch.rand(16, 1), torch.randn(2, 8, 8, 8)

    def loss(x):
        return fk.swin_nmf(x, u0, v0, **CUT).square().sum()

    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.grad(loss(leaf), leaf)[0])


def test_forward_mode_of_the_reference():
    x, u0, v0 = (t.double() for t in _nmf_arguments())
    direction = torch.randn_like(x)
    with fk.use_backend("reference"):
        _, slope = torch.func.jvp(lambda x: fk.nmf(x, u0, v0, solver="mu"), (x,), (direction,))
        y = [fk.nmf(x + h * direction, u0, v0, solver="mu") for h in (1e-6, -1e-6)]
    # Central differences: h² of truncation and rounding / h, both below 1e-8 of values near 1.
    torch.testing.assert_close(slope, (y[0] - y[1]) / 2e-6, rtol=1e-6, atol=1e-7)


def test_checkpointing(backend):
    x, u0, v0 = _nmf_arguments()
    leaf = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(fk.nmf, leaf, u0, v0, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    (expected,) = torch.autograd.grad(fk.nmf(leaf, u0, v0).sum(), leaf)
    torch.testing.assert_close(dx, expected)


def test_inplace_change_of_a_saved_tensor_is_caught(backend):
    x, u0, v0 = _nmf_arguments()
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    y = fk.nmf(inner, u0, v0)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


DIFFERENTIABLE = {
    "nmf": partial(fk.nmf, solver="mu"),
    "nmf_factors": lambda x, u0, v0: fk.nmf_factors(x, u0, v0, solver="mu")[1],
    "swin_nmf": partial(fk.swin_nmf, head_dim=6, patch_size=20, solver="mu"),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_double_backward_names_the_way(name):
    x, u0, v0 = (t.double() for t in _nmf_arguments())
    x = x[0].requires_grad_()

    def penalty():
        (dx,) = torch.autograd.grad(DIFFERENTIABLE[name](x, u0, v0).square().sum(), x, create_graph=True)
        return dx.square().sum()

    with fk.use_backend("cpu"):
        once = penalty()  # itself it has a value
        with pytest.raises(NotImplementedError, match=r'cannot be differentiated twice.*use_backend\("ref'):
            once.backward()
        with pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
            torch.func.hessian(lambda x: DIFFERENTIABLE[name](x, u0, v0).sum())(x.detach())
    with fk.use_backend("reference"):
        torch.testing.assert_close(penalty(), once)
        penalty().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "sw_matricize", "sw_dematricize", "depthwise_conv"])
def test_forward_mode_names_the_way(name):
    x, u0, v0 = _nmf_arguments()
    cut = {"head_dim": 6, "patch_size": 20}
    functions = {
        **{key: partial(function, u0=u0, v0=v0) for key, function in DIFFERENTIABLE.items()},
        "sw_matricize": partial(fk.sw_matricize, **cut),
        "sw_dematricize": lambda x: fk.sw_dematricize(x[:, None], (3, 6, 20), **cut),
        "depthwise_conv": partial(fk.depthwise_conv, weight=torch.rand(6, 3)),
    }
    function, x = functions[name], x[0]
    with fk.use_backend("cpu"):
        with pytest.raises(NotImplementedError, match=r'forward mode.*use_backend\("reference"\)'):
            torch.func.jvp(function, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
            function(forward_ad.make_dual(x, x))
    with fk.use_backend("reference"):
        _, slope = torch.func.jvp(function, (x,), (x,))
    assert slope.isfinite().all()


def test_many_threads_at_once():
    x, u0, v0 = torch.rand(16, 8, 512), torch.rand(8, 1), torch.rand(512, 1)
    expected = fk.nmf(x, u0, v0)
    outcomes = []

    def work():
        outcomes.extend(torch.equal(fk.nmf(x, u0, v0), expected) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(outcomes) == 120
    assert all(outcomes)


def test_choice_belongs_to_its_thread():
    seen = []
    with fk.use_backend("reference"):
        x, u0, v0 = _nmf_arguments()
        x.requires_grad_()
        thread = threading.Thread(target=lambda: seen.append(type(fk.nmf(x, u0, v0).grad_fn).__name__))
        thread.start()
        thread.join()
    assert seen == ["NMFBackward"]


def test_negative_view(backend):
    """A view whose numbers are the negatives of those in memory."""
    x, u0, v0 = _nmf_arguments()
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(fk.nmf(negative, u0, v0), fk.nmf(x, u0, v0))


class Tagged(torch.Tensor):
    """A subclass that does nothing but be one."""


SUBCLASSES = {
    "subclass": lambda x: x.as_subclass(Tagged),
    "MetaTensor": lambda x: pytest.importorskip("monai").data.MetaTensor(x),
}


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
@pytest.mark.parametrize(
    "name",
    [
        "depthwise_conv", "nmf", "nmf_factors", "sw_matricize", "sw_dematricize", "swin_nmf", "norm_linear",
        "linear_norm_mlp", "join", "patch_conv",
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", SUBCLASSES.values(), ids=SUBCLASSES)
def test_subclass(wrap, name, backend_name):
    """The same values, as plain tensors, and the same gradients, whichever of the tensors is wrapped."""
    u0, v0 = torch.rand(4, 2), torch.rand(16, 2)
    image = torch.rand(2, 8, 8, 8)
    factored, cut = (
        partial(fk.swin_nmf, num_iters=2, **CUT),
        partial(fk.sw_dematricize, size=image.shape, **CUT),
    )
    function, inputs = {
        "depthwise_conv": (fk.depthwise_conv, (image, torch.rand(8, 3, 3), torch.rand(8))),
        "nmf": (partial(fk.nmf, num_iters=2), (torch.rand(3, 4, 16), u0, v0)),
        "nmf_factors": (partial(fk.nmf_factors, num_iters=2), (torch.rand(3, 4, 16), u0, v0)),
        "sw_matricize": (partial(fk.sw_matricize, **CUT), (image,)),
        "sw_dematricize": (cut, (fk.sw_matricize(image, **CUT),)),
        "swin_nmf": (factored, (image, u0, v0)),
        "norm_linear": (fk.norm_linear, (image[:, :4], *_NORM, *_LINEAR)),
        "linear_norm_mlp": (fk.linear_norm_mlp, (image[:, :4], image[:, 4:], *_MLP)),
        "join": (fk.join, (image[:, :4], image[:, 4:, ::2, ::4], *_JOIN)),
        "patch_conv": (fk.patch_conv, (image[:, :4], *_PATCH)),
    }[name]

    def run(*tensors):
        leaves = [t.requires_grad_() for t in tensors]
        result = function(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        sum(y.square().sum() for y in outputs).backward()
        return outputs, [torch.Tensor(leaf.grad) for leaf in leaves]

    with fk.use_backend(backend_name):
        expected, gradients = run(*(t.clone() for t in inputs))
        for wrapped in range(len(inputs)):
            mixed = [wrap(t.clone()) if i == wrapped else t.clone() for i, t in enumerate(inputs)]
            outputs, ours = run(*mixed)
            assert all(type(y) is torch.Tensor for y in outputs)
            for a, b in zip((*outputs, *ours), (*expected, *gradients), strict=True):
                assert torch.equal(a.as_subclass(torch.Tensor), b)


def _transformable():
    """Every public operator as a function of one map (2, 8, 8), with a scalar result."""
    generator = torch.Generator().manual_seed(3)
    rand = partial(torch.rand, generator=generator, dtype=torch.float64)
    u0, v0, m, w1, w2 = rand(4, 1), rand(4, 1), rand(8, 8), rand(6, 8), rand(8, 6)
    ones, cut = torch.ones(8, 1, dtype=torch.float64), {"head_dim": 4, "patch_size": 4}
    return {
        "swin_nmf": lambda x: fk.swin_nmf(x, u0, v0, **cut),
        "nmf": lambda x: fk.nmf(x.square(), ones, ones),
        "nmf_factors": lambda x: fk.nmf_factors(x.square(), ones, ones)[0],
        "depthwise_conv": lambda x: fk.depthwise_conv(x, w1[0].expand(8, 8)[:, :3]),
        "sw_matricize": lambda x: fk.sw_matricize(x, **cut),
        "layer_norm": lambda x: fk.layer_norm(x, m[0], m[1]),
        "linear": lambda x: fk.linear(x, m),
        "linear_norm_mlp": lambda x: fk.linear_norm_mlp(
            x.sin(), x, m, None, m[0], m[1], w1, None, w2, None
        ),
        "patch_conv": lambda x: fk.patch_conv(x, m[:, :, None].expand(8, 8, 2)),
        "norm_linear_swin_nmf": lambda x: fk.norm_linear_swin_nmf(x, m[0], m[1], m, None, u0, v0, **cut)[0],
    }  # fmt: skip


@pytest.mark.parametrize("name", _transformable())
def test_transforms_that_are_compiled(name):
    function = _transformable()[name]
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(x):
        return function(x).square().sum()

    torch._dynamo.reset()
    expected = torch.func.grad(loss)(x)
    assert expected.any()
    compiled = partial(torch.compile, backend="eager")
    torch.testing.assert_close(compiled(torch.func.grad(loss))(x), expected)
    pulled = compiled(lambda x: torch.func.vjp(loss, x)[1](torch.ones((), dtype=x.dtype))[0])
    torch.testing.assert_close(pulled(x), expected)
    pushed = compiled(lambda x: torch.func.jvp(loss, (x,), (x.cos(),))[1])
    torch.testing.assert_close(pushed(x), (expected * x.cos()).sum())


def test_a_backend_that_a_compiled_transform_cannot_have_is_refused():
    u0, v0 = torch.rand(4, 1), torch.rand(4, 1)

    def loss(x):
        return fk.swin_nmf(x, u0, v0, head_dim=4, patch_size=4).sum()

    torch._dynamo.reset()  # or what was compiled before may be as much as it keeps
    with fk.use_backend("cpu"), pytest.raises(Exception, match=r"compiled transform of torch\.func"):
        torch.compile(torch.func.grad(loss), backend="eager", fullgraph=True)(torch.randn(2, 8, 8))


@pytest.mark.parametrize("name", ["layer_norm", "linear", "linear_norm_mlp", "patch_conv"])
def test_nested_forward_mode(name):
    function = _transformable()[name]
    x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = x.cos()

    def slope(x):
        return torch.func.jvp(lambda x: function(x).square().sum(), (x,), (direction,))[1]

    found = torch.func.jvp(slope, (x,), (direction,))[1]
    mixed = torch.func.jvp(
        torch.func.grad(lambda x: function(x).square().sum()), (x,), (direction,)
    )[1]  # fmt: skip
    with fk.use_backend("reference"):
        expected = torch.func.jvp(slope, (x,), (direction,))[1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((mixed * direction).sum(), expected)
    small = x[:1]
    hessian = torch.func.hessian(lambda x: function(x).square().sum())(small)
    with fk.use_backend("reference"):
        expected = torch.func.hessian(lambda x: function(x).square().sum())(small)
    torch.testing.assert_close(hessian, expected)


@pytest.mark.parametrize("name", _transformable())
def test_batched_gradients(name):
    function = _transformable()[name]
    x = torch.randn(2, 8, 8, dtype=torch.float64, requires_grad=True)
    y = function(x)
    dys = torch.randn(3, *y.shape, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
    (found,) = torch.autograd.grad(y, x, dys, is_grads_batched=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["nmf", "nmf_factors", "swin_nmf"])
@pytest.mark.parametrize("steps", [0, 1])
def test_what_no_gradient_reaches_is_a_constant(name, steps):
    x, u0, v0 = (t.requires_grad_() for t in (torch.rand(2, 4, 16), torch.rand(4, 1), torch.rand(16, 1)))
    options = {"num_iters": 3, "num_grad_steps": steps}
    if name == "swin_nmf":
        options |= {"head_dim": 4, "patch_size": 16}

    def run(x):
        y = getattr(fk, name)(x, u0, v0, **options)
        return y[0] if name == "nmf_factors" else y

    for backend in ("cpu", "reference"):
        with fk.use_backend(backend):
            assert not run(x.detach()).requires_grad  # u0 and v0 alone
            assert run(x).requires_grad == (steps > 0)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, run(x))
    assert compiled.requires_grad == (steps > 0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_iterations_the_factors_have_memory_of_their_own(backend):
    x, u0, v0 = torch.rand(2, 4, 16), torch.rand(4, 1), torch.rand(16, 1)
    before = u0.clone(), v0.clone()
    with fk.use_backend(backend):
        for factor in fk.nmf_factors(x, u0, v0, num_iters=0):
            factor.mul_(0)
        fk.nmf(x, u0, v0, num_iters=0).mul_(0)
        for factor in fk.nmf_factors(x[0], u0, v0, num_iters=0):
            factor.mul_(0)
    assert torch.equal(u0, before[0])
    assert torch.equal(v0, before[1])
