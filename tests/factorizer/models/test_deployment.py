"""A Factorizer beyond its training script: ONNX, AOTInductor, mixed precision, state dicts."""

import copy
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import factorizer_kernels as fk
from factorizer import Factorizer, SWMatricize

X = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Factorizer(
        2, 3, (16, 16), encoder_depth=(1, 1), encoder_width=(8, 16), strides=(1, 2), decoder_depth=(1,),
        reshape=(SWMatricize, {"head_dim": 8, "patch_size": 4}), rank=1, num_iters=2, mlp_ratio=2,
    ).eval()  # fmt: skip


@pytest.mark.slow
def test_onnx_of_the_reference(network, tmp_path):
    """The reference is plain PyTorch, so the graph holds standard operators; ONNX Runtime runs it."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "network.onnx"
    with fk.use_backend("reference"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = network(X)
        torch.onnx.export(network, (X,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    # float32 in another order: some thousand roundings in all.
    torch.testing.assert_close(torch.from_numpy(result), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_aot_inductor(network, backend, tmp_path):
    """Compiled ahead of time. With kernels the package calls them back, so it needs this process."""
    with fk.use_backend(backend), torch.no_grad():
        expected = network(X)
        program = torch.export.export(network, (X,))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "network.pt2")
        )
    result = torch._inductor.aoti_load_package(package)(X)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_training(network, dtype):
    """Autocast, scaled loss, step: everything stays finite, though half of x is background."""
    x = X.clone()
    x[..., :8] = 0
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in network.parameters()]
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype):
            y = network(x)
        loss = (y.float() - 1).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() >= 2.0**10  # no step was left out
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in network.parameters())
    assert any((p != b).any() for p, b in zip(network.parameters(), before, strict=True))


def test_activation_checkpointing(network):
    x = X.clone().requires_grad_()
    gradients = []
    for run in (network, lambda x: checkpoint(network, x, use_reentrant=False)):
        network.zero_grad()
        (dx,) = torch.autograd.grad(run(x).square().sum(), x)
        gradients.append(dx)
    assert torch.equal(*gradients)


def test_second_derivatives(network):
    """A gradient penalty: on the reference, and an error that names it elsewhere."""
    network.double()
    x, direction = X[:1].double(), torch.randn(1, 2, 16, 16, dtype=torch.float64)
    x.requires_grad_()

    def penalty(x):
        (dx,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        return dx.square().sum()

    with (
        fk.use_backend("cpu"),
        pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'),
    ):
        torch.autograd.grad(penalty(x), x)
    with fk.use_backend("reference"):
        (gradient,) = torch.autograd.grad(penalty(x), x)
        ahead, behind = (penalty(x + h * direction).item() for h in (1e-5, -1e-5))
    slope = (gradient * direction).sum().item()
    assert abs(slope - (ahead - behind) / 2e-5) < 1e-5 * abs(slope)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_state_dicts_move_between_backends_and_dtypes(network, dtype, tmp_path):
    torch.save(network.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = copy.deepcopy(network).to(dtype)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    other.load_state_dict(state)
    with torch.no_grad():
        expected = network(X)
        for backend in ("reference", "cpu"):
            with fk.use_backend(backend):
                result = other(X.to(dtype))
            assert result.dtype == dtype
            # Weights and some ten layers' activations, each rounded to the dtype.
            tolerance = 20 * torch.finfo(dtype).eps + 1e-5
            assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def test_memory_that_holds_nothing_is_filled(network):
    """Every module that holds a parameter or a buffer draws it: built without memory, then `to_empty`."""
    empty = copy.deepcopy(network).to("meta")
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in empty.state_dict().values():
            tensor.fill_(float("nan"))
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in empty.state_dict().values())
    assert empty(X).isfinite().all()


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_with_gradients(network):
    """torch's own check runs the network again, without gradients: the graph must be the same."""
    traced = torch.jit.trace(network, X)
    torch.testing.assert_close(traced(X), network(X))


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_no_items_under_autocast(stem_stride):
    torch.manual_seed(0)
    network = Factorizer(
        2, 3, (16, 16), encoder_depth=(1,), encoder_width=(8,), strides=(1,), decoder_depth=(),
        reshape=(SWMatricize, {"head_dim": 8, "patch_size": 4}), local=3, stem_stride=stem_stride,
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        assert network(X[:0]).dtype == network(X).dtype
    assert network.bfloat16()(X[:0].bfloat16()).dtype == torch.bfloat16


@pytest.fixture
def mesh():
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_fsdp_with_a_stem_of_its_own(network, mesh):
    """The network's input is converted before the stem's weights are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    expected = network(X)
    for part in (network.stem, network):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    y = network(X)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    y.float().square().mean().backward()
    assert all(p.grad.full_tensor().isfinite().all() for p in network.parameters())


def test_x_of_another_dtype_is_refused(network):
    with pytest.raises(TypeError, match=r"x must be torch.float32, as the weights are, got torch.float64"):
        network(X.double())


@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors(network, mesh):
    """They know torch's operators alone: plain PyTorch, by itself."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    expected = network(X)
    expected.square().sum().backward()
    gradients = [p.grad for p in network.parameters()]
    network.zero_grad()
    distributed = distribute_module(network, mesh)
    y = distributed(distribute_tensor(X, mesh, [Shard(0)]))
    torch.testing.assert_close(y.full_tensor(), expected)
    y.square().sum().backward()
    for parameter, gradient in zip(distributed.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-3, atol=1e-4)
