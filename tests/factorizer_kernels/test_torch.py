"""The operators in PyTorch's settings: opcheck, compile, export, func, vmap, checkpointing, threads."""

import threading

import pytest
import torch

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
    "nmf": lambda x, u0, v0: (x, u0, v0, 3, "hals", 1e-16, "cpu"),
    "nmf_backward": lambda x, u0, v0: (x, x, u0, v0, 3, "mu", 2, 1e-16, True, "cpu"),
    "nmf_factors": lambda x, u0, v0: (x, u0, v0, 3, "mu", 1e-16, "cpu"),
    "nmf_factors_backward": lambda x, u0, v0: (
        x[..., :2], x.mT[..., :2], x, u0, v0, 3, "mu", 3, 1e-16, False, "cpu",
    ),
}  # fmt: skip
MAP_OPERATORS = {
    "sw_matricize": lambda x: (x, 4, [4, 4], [0, 0, 2, 2], True, "cpu"),
    "sw_dematricize": lambda x: (
        torch.rand(4, 8, 4, 16).mT.contiguous().mT, [2, 4, 8, 16], 4, [4, 4], [0, 0, 2, 2], False, "cpu",
    ),
    "swin_nmf": lambda x: (
        x, torch.rand(4, 1), torch.rand(16, 1), 4, [4, 4], [0, 0, 2, 2], True, 3, "hals", 1e-16, "cpu",
    ),
    "swin_nmf_backward": lambda x: (
        x, x, torch.rand(4, 1), torch.rand(16, 1), 4, [4, 4], [0, 0, 2, 2], True, 3, "hals", 3, 1e-16,
        True, "cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck_nmf(name):
    x, u0, v0 = _nmf_arguments()
    for layout in _layouts(x):
        torch.library.opcheck(getattr(ops, name).default, OPERATORS[name](layout, u0, v0))


@pytest.mark.parametrize("name", MAP_OPERATORS)
def test_opcheck_maps(name):
    for layout in _layouts(torch.rand(2, 4, 8, 16)):
        torch.library.opcheck(getattr(ops, name).default, MAP_OPERATORS[name](layout))


def _value_and_grad(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), dx


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_compile_fullgraph(backend_name):
    """Forward and backward in one graph, and no new one for another batch or another map."""
    u0, v0 = torch.rand(4, 1), torch.rand(16, 1)

    def network(x):
        y = fk.swin_nmf(x * 2, u0, v0, **CUT)
        z = fk.sw_matricize(y, **CUT)
        z = z + fk.nmf(z.relu(), u0, v0, num_iters=2, solver="mu")
        return fk.sw_dematricize(z, y.shape, **CUT).tanh()

    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend="aot_eager")
    with fk.use_backend(backend_name):
        with torch._dynamo.config.patch(error_on_recompile=False):
            first = torch.rand(2, 8, 12, 20)  # no size equals another, which would tie them together
            torch.testing.assert_close(_value_and_grad(compiled, first), _value_and_grad(network, first))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for shape in ((3, 8, 12, 20), (5, 8, 16, 24)):
                x = torch.rand(shape)
                torch.testing.assert_close(_value_and_grad(compiled, x), _value_and_grad(network, x))


def test_export_and_reload(tmp_path):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("u0", torch.rand(4, 1))
            self.register_buffer("v0", torch.rand(16, 1))

        def forward(self, x):
            return fk.swin_nmf(x, self.u0, self.v0, **CUT)

    layer, x = Layer(), torch.rand(2, 8, 8, 8)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}})
    torch.export.save(program, tmp_path / "layer.pt2")
    reloaded = torch.export.load(tmp_path / "layer.pt2").module()
    other = torch.rand(5, 8, 8, 8)
    torch.testing.assert_close(reloaded(other), layer(other))


@pytest.mark.parametrize("rank", [1, 2])
def test_func_grad_and_vmap(backend, rank):
    x, u0, v0 = _nmf_arguments(rank)

    def loss(x, u0, v0):
        return fk.nmf(x, u0, v0, solver="mu").square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))(x, u0, v0)
    leaves = [t.clone().requires_grad_() for t in (x, u0, v0)]
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(*leaves), leaves))
    for in_dims in ((0, None, None), (1, None, None)):
        mapped = torch.func.vmap(fk.nmf, in_dims=in_dims)(x, u0, v0)
        expected = fk.nmf(x.movedim(in_dims[0], 0), u0, v0)
        torch.testing.assert_close(mapped, expected)
    many_u0 = torch.rand(5, 6, rank)
    mapped = torch.func.vmap(fk.nmf, in_dims=(None, 0, None))(x, many_u0, v0)
    torch.testing.assert_close(mapped, torch.stack([fk.nmf(x, u, v0) for u in many_u0]))
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))(x, u0, v0)
    torch.testing.assert_close(per_sample, gradients[0])
    u, v = torch.func.vmap(fk.nmf_factors, in_dims=(0, None, None))(x, u0, v0)
    torch.testing.assert_close((u, v), fk.nmf_factors(x, u0, v0))


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


def test_double_backward_names_the_way():
    x, u0, v0 = _nmf_arguments()
    x.requires_grad_()
    with fk.use_backend("cpu"):
        (dx,) = torch.autograd.grad(fk.nmf(x, u0, v0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    with fk.use_backend("reference"):
        (dx,) = torch.autograd.grad(fk.nmf(x, u0, v0).square().sum(), x, create_graph=True)
        dx.sum().backward()


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
        thread = threading.Thread(target=lambda: seen.append(fk.nmf(x, u0, v0).grad_fn.name()))
        thread.start()
        thread.join()
    assert seen == ["NMFBackward"]


def test_subclass():
    monai = pytest.importorskip("monai")
    x, u0, v0 = _nmf_arguments()
    meta = monai.data.MetaTensor(x)
    y = fk.nmf(meta, u0, v0)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, fk.nmf(x, u0, v0))
