"""What a call leaves out, the second time or where nobody looks, and what it never does."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import factorizer_kernels as fk
from factorizer_kernels.ops.nmf import spec
from factorizer_kernels.shared import checks, native

needs_cpu = pytest.mark.skipif(native.missing is not None, reason="no compiled module")


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.rand(2, 8, 8, 8, dtype=dtype), torch.rand(8, 1), torch.rand(16, 1)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"patch_size": (4, True)}, TypeError),
        ({"patch_size": (4, 4.0)}, TypeError),
        ({"patch_size": 4.0}, TypeError),
        ({"head_dim": 8.0}, TypeError),
        ({"shifts": [None, 2.0]}, TypeError),
        ({"num_iters": True}, TypeError),
        ({"num_iters": 1.0}, TypeError),
        ({"eps": 1}, None),
        ({"eps": True}, TypeError),
        ({"solver": "HALS"}, ValueError),
        ({"patch_size": np.array([4, 4])}, TypeError),
        ({"patch_size": [4, 4]}, None),
        ({"num_iters": np.int64(1)}, None),
    ],
)
def test_what_equals_something_right_is_still_wrong(wrong, error):
    """True is 1 and 4.0 is 4 to a table."""
    x, u0, v0 = inputs()
    right = {"head_dim": 8, "patch_size": (4, 4), "shifts": [None, 2], "num_iters": 1, "eps": 1.0}
    for _ in range(2):
        expected = fk.swin_nmf(x, u0, v0, **right)
        if error is None:
            assert torch.equal(fk.swin_nmf(x, u0, v0, **right | wrong), expected)
        else:
            with pytest.raises(error, match=next(iter(wrong))):
                fk.swin_nmf(x, u0, v0, **right | wrong)


def test_other_tensors_are_checked_again():
    x, u0, v0 = inputs()
    options = {"head_dim": 8, "patch_size": 4}
    fk.swin_nmf(x, u0, v0, **options)
    for arguments, words in [
        ((x.int(), u0, v0), "x must be float32"),
        ((x, u0.to("meta"), v0), "u0 must be on the device of x"),
        ((x, u0, v0[1:]), "v0 must have 16 rows"),
        ((x, u0, v0.to_sparse()), "v0 must be a dense"),
        ((x[:, :, :6], u0, v0), "must divide the spatial size"),
        ((x, u0, v0.numpy()), r"v0 must be a torch\.Tensor"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            fk.swin_nmf(*arguments, **options)
    assert fk.swin_nmf(x.double(), u0, v0, **options).dtype == torch.float64


def test_results_are_kept_and_errors_are_not():
    calls = []

    @checks.remembered
    def half(value):
        calls.append(value)
        if value % 2:
            raise ValueError(value)
        return value // 2

    for _ in range(2):
        assert half(8) == 4
        with pytest.raises(ValueError, match="7"):
            half(7)
    assert calls == [8, 7, 7]


@needs_cpu
def test_plain_calls_go_past_the_dispatcher():
    x, u0, v0 = inputs()
    assert checks.plain((x, u0, v0, "cpu"))
    assert not checks.plain((x, torch.rand(2).as_subclass(Subclass)))


class Subclass(torch.Tensor):
    pass


def opposite(x):
    """-x of x's values, negated by a bit of the view."""
    view = torch.complex(torch.zeros_like(x), x).conj().imag
    assert view.is_neg()
    return view


@needs_cpu
def test_views_of_the_opposite_sign():
    x, u0, v0 = inputs()
    x -= 0.5
    options = {"head_dim": 8, "patch_size": 4}
    negative = opposite(x)
    expected = fk.swin_nmf(-x, u0, v0, **options)
    assert torch.equal(fk.swin_nmf(negative, u0, v0, **options), expected)
    with torch.inference_mode():
        assert torch.equal(fk.swin_nmf(negative, u0, v0, **options), expected)
    x = x.requires_grad_()
    dy = torch.rand_like(x)
    plain, bit = (
        torch.autograd.grad(fk.swin_nmf(x, u0, v0, **options), x, gradient)[0]
        for gradient in (-dy, opposite(dy))
    )
    assert torch.equal(plain, bit)


@needs_cpu
def test_who_watches_sees_the_operators():
    x, u0, v0 = inputs()
    matrices = x.flatten(2)
    v0 = torch.rand(64, 1)

    class Log(TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen = (*self.seen, function)
            return function(*args, **(kwargs or {}))

    with Log() as log:
        fk.nmf(matrices, u0, v0)
    assert spec.nmf in log.seen
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        fk.nmf(matrices, u0, v0)
    assert "factorizer_kernels::nmf" in {event.name for event in profile.function_events}
