"""How the CUDA backend is chosen, and refused with a reason, where there is no card to ask."""

import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import factorizer_kernels as fk
from factorizer_kernels import choice
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.shared import cuda

pytestmark = pytest.mark.skipif(cuda.native is None, reason="compiled without nvcc")


@pytest.mark.parametrize(
    ("versions", "architectures", "capability", "words"),
    [
        ((13000, 13000), "80,90+", (9, 0), None),
        ((12080, 13000), "80,90+", (9, 0), "the driver knows CUDA up to 12.8, .* compiled with 13.0"),
        ((0, 13000), "80,90+", (9, 0), "the driver knows CUDA up to 0.0"),
        ((13000, 13010), "80,90+", (9, 0), None),  # machine code of the same major version
        ((13010, 13010), "80,90+", (12, 0), None),  # from the PTX,
        (
            (13000, 13010),
            "80,90+",
            (12, 0),
            "the driver knows CUDA up to 13.0",
        ),  # which an older driver rejects
        ((13000, 13000), "80,90", (8, 9), None),
        ((13000, 13000), "80,90", (12, 0), "FACTORIZER_KERNELS_CUDA_ARCHS=120"),
        ((13000, 13000), "80,90+", (7, 5), "FACTORIZER_KERNELS_CUDA_ARCHS=75"),
    ],
)
def test_devices_with_and_why_no_code(versions, architectures, capability, words, monkeypatch):
    native = SimpleNamespace(cuda_versions=lambda: versions, cuda_architectures=lambda: architectures)
    monkeypatch.setattr(cuda, "native", native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    reason = cuda._why_no_code.__wrapped__(0)  # past the cache
    assert reason is None if words is None else re.search(words, reason)


def test_a_driver_that_is_too_old_is_told_once(monkeypatch):
    """The kernels are passed over for Triton's: without a word nobody would know."""
    monkeypatch.setattr(cuda, "native", SimpleNamespace(
        cuda_versions=lambda: (12080, 13000), cuda_architectures=lambda: "80,90+"
    ))  # fmt: skip
    cuda._why_no_code.cache_clear()
    cuda._warn.cache_clear()
    with FakeTensorMode():
        x = torch.empty(1, 8, 16, device="cuda")
    try:
        with pytest.warns(UserWarning, match=r"are not used: the driver knows CUDA up to 12\.8"):
            assert choice.choose("nmf", x, MatrixSizes(8, 16, 1, 1, 5, "hals")) != "cuda"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            choice.choose("nmf", x, MatrixSizes(8, 16, 1, 1, 5, "hals"))
    finally:
        cuda._why_no_code.cache_clear()
        cuda._warn.cache_clear()


def test_cuda_that_does_not_start(monkeypatch):
    """As in a process forked off one that uses the GPU: it has a reason, and the other backends go on."""

    def current_device():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", current_device)
    by_name = {backend.name: backend for backend in fk.backends()}
    assert not by_name["cuda"].available
    assert not by_name["triton"].available
    assert "CUDA does not start (Cannot re-initialize" in by_name["cuda"].reason
    assert by_name["reference"].available


def test_naming_a_backend_asks_no_other(monkeypatch):
    record = choice._RECORDS["cuda"]._replace(probe=lambda: pytest.fail("asked the GPU"))
    monkeypatch.setitem(choice._RECORDS, "cuda", record)
    with fk.use_backend("reference"):
        pass


class Layer(torch.nn.Module):
    def forward(self, x, u0, v0):
        return fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=4, shifts=[None, 2])


class Factors(torch.nn.Module):
    def forward(self, x, u0, v0):
        return fk.nmf_factors(x.flatten(2), u0, v0, num_iters=2)[0]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("layer", "size", "columns"), [(Layer, (2, 8, 8, 12), 16), (Factors, (2, 8, 4, 4), 16)]
)
def test_tracing_chooses_it(layer, size, columns, strict, monkeypatch):
    """In one graph, with a batch of any size. A card would be asked for its code while Dynamo looks on."""
    monkeypatch.setattr(cuda, "_why_no_code", lambda device: None)
    with FakeTensorMode():
        x, u0, v0 = (torch.empty(*shape, device="cuda") for shape in (size, (8, 1), (columns, 1)))
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(layer(), (x, u0, v0), dynamic_shapes=(batch, None, None), strict=strict)
    (node,) = (n for n in program.graph.nodes if "factorizer_kernels" in str(n.target))
    assert node.args[-1] == "cuda"
