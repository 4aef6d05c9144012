"""Wrong arguments raise errors that name the argument, before anything runs."""

import pytest
import torch

import factorizer_kernels as fk
from factorizer_kernels.shared import registry

X = torch.rand(2, 8, 16)
U0, V0 = torch.rand(8, 2), torch.rand(16, 2)
MAP = torch.rand(1, 8, 4, 4)
U_MAP, V_MAP = torch.rand(4, 1), torch.rand(4, 1)
CUT = {"head_dim": 4, "patch_size": 2}
Z = torch.rand(2, 4, 4, 4)

NMF_ERRORS = [
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": X.int()}, TypeError, "x must be float32"),
    ({"x": X.to(torch.complex64)}, TypeError, "x must be float32"),
    ({"x": X[0, 0]}, ValueError, r"x must be \(..., M, N\), got shape \(16,\)"),
    ({"x": X.to_sparse()}, TypeError, "x must be a dense"),
    ({"x": X.to_mkldnn()}, TypeError, "x must be a dense"),
    (
        {"x": torch.nested.nested_tensor([X])},
        TypeError,
        r"x must be a dense \(strided\) tensor, got a nested",
    ),
    ({"x": torch.zeros(X.shape).to(torch.float8_e4m3fn)}, TypeError, "x must be float32"),
    ({"v0": V0.to_sparse()}, TypeError, "v0 must be a dense"),
    ({"x": X.to("meta")}, ValueError, r"u0 must be on the device of x \(meta\), got cpu"),
    ({"v0": V0.to("meta")}, ValueError, r"v0 must be on the device of x \(cpu\), got meta"),
    ({"u0": None}, TypeError, "u0 must be a torch.Tensor"),
    ({"u0": U0.int()}, TypeError, "u0 must be float32"),
    ({"u0": U0[:, 0]}, ValueError, "u0 must be"),
    ({"u0": torch.rand(7, 2)}, ValueError, r"u0 must have 8 rows.*got shape \(7, 2\)"),
    ({"v0": torch.rand(15, 2)}, ValueError, r"v0 must have 16 rows.*got shape \(15, 2\)"),
    ({"v0": torch.rand(16, 3)}, ValueError, "same rank.*got 2 and 3"),
    ({"u0": torch.rand(8, 0), "v0": torch.rand(16, 0)}, ValueError, "rank.*at least 1"),
    ({"u0": torch.rand(3, 8, 2)}, ValueError, "u0's leading dimensions must broadcast"),
    ({"v0": torch.rand(1, 2, 16, 2)}, ValueError, "v0's leading dimensions must broadcast"),
    ({"u0": U0.to("meta")}, ValueError, r"u0 must be on the device of x \(cpu\), got meta"),
    ({"num_iters": -1}, ValueError, "num_iters must be at least 0, got -1"),
    ({"num_iters": 2**63}, ValueError, "num_iters must fit in 64 bits"),
    ({"num_iters": 2.0}, TypeError, "num_iters must be an integer, got 2.0"),
    ({"num_iters": True}, TypeError, "num_iters must be an integer"),
    ({"num_grad_steps": -2}, ValueError, "num_grad_steps must be at least 0"),
    ({"num_grad_steps": "1"}, TypeError, "num_grad_steps must be an integer"),
    ({"solver": "als"}, ValueError, r"solver must be one of \('mu', 'hals'\), got 'als'"),
    ({"solver": None}, TypeError, "solver must be one of"),
    ({"eps": "small"}, TypeError, "eps must be a number"),
    ({"eps": 0.0}, ValueError, "eps must be finite and at least"),
    ({"eps": 1e-50}, ValueError, "eps must be finite and at least"),
    ({"eps": float("nan")}, ValueError, "eps must be finite"),
    ({"eps": float("inf")}, ValueError, "eps must be finite"),
]

CUT_ERRORS = [
    ({"num_heads": 2}, ValueError, "exactly one of num_heads and head_dim must be given, got both"),
    ({"head_dim": None}, ValueError, "exactly one of num_heads and head_dim.*got neither"),
    (
        {"grid_size": 2},
        ValueError,
        "exactly one of grid_size and patch_size must be given, got both",
    ),
    ({"patch_size": None}, ValueError, "exactly one of grid_size and patch_size.*got neither"),
    ({"head_dim": 3}, ValueError, "head_dim=3 must divide the 8 channels"),
    ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
    ({"head_dim": 4.0}, TypeError, "head_dim must be an integer, got 4.0"),
    ({"patch_size": 3}, ValueError, "patch_size=3 must divide.*axis 0 has 4"),
    ({"patch_size": -2}, ValueError, "patch_size must be at least 1"),
    (
        {"patch_size": (2, 2, 2)},
        ValueError,
        r"patch_size must have one entry per spatial axis \(2\)",
    ),
    ({"patch_size": "2"}, TypeError, "patch_size must be an integer or one integer per"),
    ({"patch_size": (2, 2.0)}, TypeError, "patch_size must be an integer or one integer per"),
    ({"shifts": 2}, TypeError, "shifts must be None or a sequence"),
    ({"shifts": []}, ValueError, "shifts must name at least one copy"),
    ({"shifts": [(1, 2, 3)]}, ValueError, r"shifts must have one entry per spatial axis \(2\)"),
    ({"shifts": [2**63]}, ValueError, "shifts must fit in 64 bits"),
    ({"shifts": [1.5]}, TypeError, "shifts must be an integer or one integer per"),
]


@pytest.fixture(autouse=True)
def no_kernel_starts(monkeypatch, request):
    """In this module, but for the tests of the choice of a backend."""
    if "change" in request.fixturenames or "error" in request.fixturenames:
        for key, kernel in registry._KERNELS.items():
            stopped = kernel._replace(function=lambda *arguments: pytest.fail("a kernel was started"))
            monkeypatch.setitem(registry._KERNELS, key, stopped)


@pytest.mark.parametrize(("change", "error", "message"), NMF_ERRORS)
@pytest.mark.parametrize("function", [fk.nmf, fk.nmf_factors])
def test_nmf(function, change, error, message, backend):
    arguments = {"x": X, "u0": U0, "v0": V0} | change
    with pytest.raises(error, match=message):
        function(arguments.pop("x"), arguments.pop("u0"), arguments.pop("v0"), **arguments)


@pytest.mark.parametrize(("change", "error", "message"), CUT_ERRORS)
def test_windows(change, error, message, backend):
    options = CUT | change
    with pytest.raises(error, match=message):
        fk.sw_matricize(MAP, **options)
    with pytest.raises(error, match=message):
        fk.sw_dematricize(Z, MAP.shape, **options)
    with pytest.raises(error, match=message):
        fk.swin_nmf(MAP, U_MAP, V_MAP, **options)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.rand(8, 4), ValueError),
        (torch.rand(1, 8, 2, 2, 2, 2), ValueError),
        (MAP.int(), TypeError),
        (None, TypeError),
    ],
)
def test_map(x, error, backend):
    with pytest.raises(error, match="x must be"):
        fk.sw_matricize(x, **CUT)
    with pytest.raises(error, match="x must be"):
        fk.swin_nmf(x, U_MAP, V_MAP, **CUT)


@pytest.mark.parametrize(
    ("z", "size", "error", "message"),
    [
        (Z[0], MAP.shape, ValueError, r"z must be \(S·B·H"),
        (Z[:1], MAP.shape, ValueError, r"z must have shape \(2, 4, 4, 4\)"),
        (Z, (1, 8), ValueError, "size must have 3 or 4 or 5 entries"),
        (Z, 8, TypeError, "size must be a sequence of integers"),
        (Z, (1, 8, 4.0, 4), TypeError, r"size\[2\] must be an integer"),
        (Z, (1, 8, -4, 4), ValueError, r"size\[2\] must be at least 0, got -4"),
    ],
)
def test_dematricize(z, size, error, message, backend):
    with pytest.raises(error, match=message):
        fk.sw_dematricize(z, size, **CUT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"act": "gelu"}, ValueError, r"act must be one of \('relu', None\), got 'gelu'"),
        ({"act": torch.relu}, TypeError, "act must be one of"),
        ({"u0": torch.rand(5, 1)}, ValueError, "u0 must have 4 rows"),
        ({"v0": torch.rand(5, 1)}, ValueError, "v0 must have 4 rows"),
        ({"solver": "x"}, ValueError, "solver must be one of"),
        ({"u0": U_MAP.to("meta")}, ValueError, "u0 must be on the device of x"),
        ({"v0": V_MAP.to("meta")}, ValueError, "v0 must be on the device of x"),
        ({"v0": torch.rand(3, 4, 1)}, ValueError, "v0's leading dimensions must broadcast"),
        ({"num_iters": None}, TypeError, "num_iters must be an integer"),
        ({"num_grad_steps": 1.0}, TypeError, "num_grad_steps must be an integer"),
        ({"eps": -1e-8}, ValueError, "eps must be finite and at least"),
    ],
)
def test_swin_nmf(change, error, message, backend):
    arguments = {"u0": U_MAP, "v0": V_MAP} | CUT | change
    with pytest.raises(error, match=message):
        fk.swin_nmf(MAP, arguments.pop("u0"), arguments.pop("v0"), **arguments)


FILTERS, OFFSETS = torch.rand(8, 3, 5), torch.rand(8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"x": MAP.int()}, TypeError, "x must be float32"),
        ({"x": MAP[0, 0]}, ValueError, r"x must be \(B, C, S1..Sp\) with p = 1, 2 or 3, got shape \(4, 4\)"),
        ({"x": MAP[..., None, None]}, ValueError, r"x must be \(B, C, S1..Sp\)"),
        ({"weight": 3}, TypeError, "weight must be a torch.Tensor, got int"),
        ({"weight": FILTERS.int()}, TypeError, "weight must be float32"),
        ({"weight": FILTERS.to_sparse()}, TypeError, "weight must be a dense"),
        (
            {"weight": FILTERS[:, None]},
            ValueError,
            r"weight must be \(C, k1..kp\), one k for each spatial axis",
        ),
        ({"weight": FILTERS[:7]}, ValueError, r"weight must have 8 filters.*got shape \(7, 3, 5\)"),
        ({"weight": FILTERS[:, :2]}, ValueError, r"weight must have an odd extent.*got shape \(8, 2, 5\)"),
        ({"weight": FILTERS[:, :0]}, ValueError, r"weight must have an odd extent.*got shape \(8, 0, 5\)"),
        ({"weight": FILTERS.to("meta")}, ValueError, r"weight must be on the device of x \(cpu\), got meta"),
        ({"bias": 0.0}, TypeError, "bias must be a torch.Tensor, got float"),
        ({"bias": OFFSETS.to(torch.complex64)}, TypeError, "bias must be float32"),
        ({"bias": OFFSETS[0]}, ValueError, r"bias must be \(C\), got shape \(\)"),
        ({"bias": OFFSETS[:7]}, ValueError, r"bias must have 8 entries.*got shape \(7,\)"),
        ({"bias": OFFSETS.to("meta")}, ValueError, r"bias must be on the device of x \(cpu\), got meta"),
    ],
)
def test_depthwise_conv(change, error, message, backend):
    with pytest.raises(error, match=message):
        fk.depthwise_conv(**{"x": MAP, "weight": FILTERS, "bias": OFFSETS} | change)


def test_backends():
    names = [b.name for b in fk.backends()]
    assert names == ["cuda", "triton", "cpu", "torch", "reference"]
    assert all(isinstance(b.available, bool) and b.reason for b in fk.backends())
    with (
        pytest.raises(ValueError, match=r"name must be one of .* got 'gpu'"),
        fk.use_backend("gpu"),
    ):
        pass
    with pytest.raises(TypeError, match="name must be a string"), fk.use_backend(None):
        pass
    for backend in fk.backends():
        if not backend.available:
            with (
                pytest.raises(ValueError, match="cannot be used here"),
                fk.use_backend(backend.name),
            ):
                pass


def test_explicit_choice_never_falls_back():
    x = torch.rand(2, 8, 16, device="meta")
    with (
        fk.use_backend("cpu"),
        pytest.raises(ValueError, match="backend 'cpu' does not run nmf here: x is on meta"),
    ):
        fk.nmf(x, U0.to("meta"), V0.to("meta"))
    with (
        fk.use_backend("reference"),
        pytest.raises(ValueError, match="name must be"),
        fk.use_backend("nothing"),
    ):
        pass


def test_choice_ends_with_the_context():
    with fk.use_backend("reference"):
        with fk.use_backend("cpu"):
            pass
        assert fk.nmf(X.requires_grad_(), U0, V0).grad_fn.name() != "NMFBackward"
    assert fk.nmf(X.requires_grad_(), U0, V0).grad_fn.name() == "NMFBackward"
