"""What a launch is told: the device, the stream, how many blocks; and what becomes of its errors."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import factorizer_kernels as fk
from factorizer_kernels.ops.nmf import cuda

OPTIONS = {"head_dim": 8, "patch_size": 4, "shifts": [None, 2]}


def inputs(rank=1):
    return torch.rand(1, 8, 8, 8), torch.rand(8, rank), torch.rand(16, rank)


@pytest.mark.parametrize("solver", ["hals", "mu"])
def test_go_to_the_tensors_device_and_stream(solver, device):
    """It is current while they are made, by torch's own guard."""
    x, u0, v0 = inputs()
    x.requires_grad_()
    for device.index, device.stream in ((0, 0), (1, 0x1234), (0, 0x5678), (1, 0)):
        with fk.use_backend("cuda"):
            y = fk.swin_nmf(x, u0, v0, solver=solver, **OPTIONS)
            forward = device.launches()
            torch.autograd.grad(y.sum(), x)
            backward = device.launches()
        assert len(forward) == len(backward) == 2
        assert {launch[:2] for launch in forward + backward} == {(device.index, device.stream)}


def test_never_make_a_device_current_themselves(device, monkeypatch):
    """To go back to a device that nobody uses would create a context there, of half a gigabyte."""
    monkeypatch.setattr(cuda.cuda, "current", lambda x: nullcontext())
    device.index = 1
    with fk.use_backend("cuda"), pytest.raises(ValueError, match="its device must be the current one"):
        fk.swin_nmf(*inputs(), **OPTIONS)
    assert device.launches() == []


def test_torch_makes_the_device_current(monkeypatch):
    """Its guard goes back without a context; the operators' own code has no other."""
    calls = []
    monkeypatch.undo()  # the emulation's own
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: calls.append(index) or 0)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", lambda index: calls.append("back") or 1)
    with cuda.cuda.current(SimpleNamespace(device=torch.device("cuda:1"))):
        assert calls == [1]
    assert calls == [1, "back"]


@pytest.mark.parametrize(("dtype", "blocks", "threads"), [(torch.float32, 2, 64), (torch.bfloat16, 1, 128)])
def test_windows_of_one_warp_share_a_block(dtype, blocks, threads, device):
    """As many as its shared memory holds. And a box of the map is a block where they are composed."""
    x, u0, v0 = torch.rand(1, 8, 8, 8, 32, dtype=dtype), torch.rand(8, 1), torch.rand(512, 1)
    with fk.use_backend("cuda"):
        fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8, shifts=[None, 4])
        assert device.launches()[0] == (0, 0, 2 * blocks, threads)
        fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8)
        assert device.launches() == [(0, 0, blocks, threads)]


@pytest.mark.parametrize("solver", ["hals", "mu"])
def test_errors_name_the_operator_and_leave_nothing_behind(solver, device):
    x, u0, v0 = inputs()
    x.requires_grad_()
    with fk.use_backend("cuda"):
        device.library.emulation_fail_next_launch(719)
        with pytest.raises(RuntimeError, match="'cuda', swin_nmf: an error asked for"):
            fk.swin_nmf(x, u0, v0, solver=solver, **OPTIONS)
        y = fk.swin_nmf(x, u0, v0, solver=solver, **OPTIONS)
        device.library.emulation_fail_next_launch(719)
        with pytest.raises(RuntimeError, match="'cuda', swin_nmf_backward: an error asked for"):
            torch.autograd.grad(y.sum(), x)
    assert device.library.emulation_pending_error() == 0


@pytest.mark.parametrize("error", [900, 901])
def test_a_kernel_that_a_capture_does_not_let_load(error, device):
    device.library.emulation_fail_next_launch(error)
    with fk.use_backend("cuda"), pytest.raises(RuntimeError, match="once before the graph is captured"):
        fk.swin_nmf(*inputs(), **OPTIONS)


@pytest.mark.parametrize("solver", ["hals", "mu"])
def test_the_gradient_of_a_sum_is_read_as_packs(solver, device, monkeypatch):
    """dy of strides 0, or channels last, is made contiguous: element by element it takes twice the time."""
    seen = []
    backward = cuda.CudaProblem.backward

    def recorded(self, factor_grads, **loss):
        seen.append(loss["dy"][2])
        return backward(self, factor_grads, **loss)

    monkeypatch.setattr(cuda.CudaProblem, "backward", recorded)
    x, u0, v0 = inputs()
    x.requires_grad_()
    with fk.use_backend("cuda"):
        y = fk.swin_nmf(x, u0, v0, solver=solver, **OPTIONS)
        for dy in (torch.ones(()).expand_as(y), torch.ones(1, 8, 8, 8).to(memory_format=torch.channels_last)):
            torch.autograd.grad(y, x, dy, retain_graph=True)
    assert seen == [(512, 64, 8, 1)] * 2


@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 2)])
@pytest.mark.parametrize("size", [(0, 8, 8, 8), (2, 0, 8, 8)], ids=str)
def test_empty_maps_launch_nothing(size, solver, rank, device):
    """Nor by the operators themselves, as a graph that was traced for another size calls them."""
    x, (u0, v0) = torch.rand(size), inputs(rank)[1:]
    with fk.use_backend("cuda"):
        assert fk.swin_nmf(x, u0, v0, **OPTIONS).shape == size
    windows = (8, [4, 4], [0, 0, 2, 2])
    operators = torch.ops.factorizer_kernels
    y = operators.swin_nmf(x, u0, v0, *windows, True, 3, solver, 3, 1e-16, "cuda")
    dx, du0, dv0 = operators.swin_nmf_backward(
        y, x, u0, v0, True, *windows, True, 3, solver, 3, 1e-16, "cuda"
    )
    assert y.shape == dx.shape == size
    assert torch.equal(du0, torch.zeros_like(u0))
    assert torch.equal(dv0, torch.zeros_like(v0))
    assert device.launches() == []


def test_scratch_memory_off_its_multiple(device, monkeypatch):
    """Where a device would stop with a misaligned address, and take the context with it."""
    monkeypatch.setattr(cuda.CudaProblem, "floats", lambda problem, count: torch.empty(count + 1)[1:])
    with fk.use_backend("cuda"), pytest.raises(ValueError, match="work must lie on a multiple of 16 bytes"):
        fk.swin_nmf(*inputs(), **OPTIONS)
    assert device.launches() == []


def test_more_iterations_than_an_int_counts(device):
    with fk.use_backend("cuda"), pytest.raises(ValueError, match="'cuda' does not serve"):
        fk.swin_nmf(*inputs(), num_iters=2**31 + 1, **OPTIONS)
    assert device.launches() == []


def test_the_emulation_refuses_what_a_device_would_hang_on(device):
    """Barriers and shuffles that some threads of the block or mask never reach; the last kernel is sound."""
    launch_failure = 719
    assert [device.library.emulation_misuse(which) for which in range(6)] == [launch_failure] * 5 + [0]
