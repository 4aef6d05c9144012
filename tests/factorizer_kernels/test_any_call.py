"""Any call of the public functions: the reference's result, or an error that names the argument."""

import inspect

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests_support import away_from_dead_components, grads_of

import factorizer_kernels as fk

ERRORS = (TypeError, ValueError, NotImplementedError)


def _numbers(draw, *shape):
    """Positive and away from zero, where the solvers are well conditioned; in any memory order."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = 0.1 + torch.rand(shape, generator=generator, dtype=torch.float64)
    order = draw(st.permutations(range(len(shape))))
    x = x.permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
    kind = draw(st.sampled_from(["plain", "offset", "strided", "expanded"]))
    if kind == "offset":
        return torch.cat([x.flatten(), x.new_zeros(3)])[: x.numel()].view(shape)
    if kind == "strided":
        return torch.stack([x, x.new_full((), float("nan")).expand_as(x)], -1)[..., 0]
    if kind == "expanded" and len(shape) > 2 and shape[0] > 0:
        return x[:1].expand(shape)
    return x


def _solve_options(draw):
    return {
        "num_iters": draw(st.integers(0, 4)),
        "solver": draw(st.sampled_from(["mu", "hals"])),
        "num_grad_steps": draw(st.one_of(st.none(), st.integers(0, 5))),
        "eps": draw(st.sampled_from([1e-16, 1e-8])),
    }


def _factors(draw, rows, columns, batch):
    """u0 and v0 for matrices of leading dimensions ``batch``: shared, one for each, or broadcast."""
    rank = draw(st.integers(1, min(3, rows, columns)))
    lead = st.sampled_from([(), batch, (1,) * len(batch), batch[-1:]])
    return _numbers(draw, *draw(lead), rows, rank), _numbers(draw, *draw(lead), columns, rank)


def _window_options(draw):
    axes = draw(st.integers(1, 3))
    patch = [draw(st.integers(1, 4)) for _ in range(axes)]
    grid = [draw(st.integers(1, 3)) for _ in range(axes)]
    head_dim, heads = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    step = st.integers(-9, 9)
    shift = st.one_of(st.none(), step, st.lists(step, min_size=axes, max_size=axes))
    options = {
        **draw(st.sampled_from([{"head_dim": head_dim}, {"num_heads": heads}])),
        **draw(st.sampled_from([{"patch_size": patch}, {"grid_size": grid}])),
        "shifts": draw(st.one_of(st.none(), st.lists(shift, min_size=1, max_size=3))),
    }
    spatial = [p * g for p, g in zip(patch, grid, strict=True)]
    size = (draw(st.integers(0, 2)), head_dim * heads, *spatial)
    copies = len(options["shifts"] or [None])
    matrices = (copies * size[0] * heads, torch.Size(grid).numel(), head_dim, torch.Size(patch).numel())
    return size, options, matrices


FUNCTIONS = (
    fk.depthwise_conv, fk.nmf, fk.nmf_factors, fk.swin_nmf, fk.sw_matricize, fk.sw_dematricize,
)  # fmt: skip


@st.composite
def calls(draw):
    """(function, its arguments by name): a call that is right."""
    function = draw(st.sampled_from(FUNCTIONS))
    if function is fk.depthwise_conv:
        axes = draw(st.integers(1, 3))
        batch, channels = draw(st.integers(0, 2)), draw(st.integers(0, 4))
        kernel_size = [draw(st.sampled_from([1, 3, 5, 7])) for _ in range(axes)]
        bias = draw(st.sampled_from([None, _numbers(draw, channels)]))
        x = _numbers(draw, batch, channels, *(draw(st.integers(0, 12)) for _ in range(axes)))
        return function, {"x": x, "weight": _numbers(draw, channels, *kernel_size), "bias": bias}
    if function in (fk.nmf, fk.nmf_factors):
        batch = tuple(draw(st.lists(st.integers(0, 3), max_size=2)))
        rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 20))
        u0, v0 = _factors(draw, rows, columns, batch)
        x = _numbers(draw, *batch, rows, columns)
        return function, {"x": x, "u0": u0, "v0": v0, **_solve_options(draw)}
    size, options, matrices = _window_options(draw)
    if function is fk.sw_matricize:
        return function, {"x": _numbers(draw, *size), **options}
    if function is fk.sw_dematricize:
        return function, {"z": _numbers(draw, *matrices), "size": list(size), **options}
    u0, v0 = _factors(draw, *matrices[2:], matrices[:2])
    act = draw(st.sampled_from(["relu", None]))
    arguments = {"x": _numbers(draw, *size), "u0": u0, "v0": v0, **options}
    return function, {**arguments, "act": act, **_solve_options(draw)}


def _values(backend, function, arguments):
    with fk.use_backend(backend):
        out = function(**arguments)
    return out if isinstance(out, tuple) else (out,)


def _values_and_gradients(backend, function, arguments):
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor)
    }
    values = _values(backend, function, arguments | leaves)
    if not all(v.requires_grad for v in values):
        return values
    losses = [torch.linspace(-1, 1, v.numel(), dtype=v.dtype).view(v.shape) for v in values]
    gradients = torch.autograd.grad(values, leaves.values(), losses, allow_unused=True)
    absent = map(torch.zeros_like, leaves.values())
    return *values, *(zero if g is None else g for g, zero in zip(gradients, absent, strict=True))


def _stable(function, arguments):
    """Whether the reference's result is decided by more than rounding: see docs/numerics.md."""
    if arguments.get("solver") != "hals" or arguments["u0"].shape[-1] == 1:
        return True
    inputs = [arguments[name] for name in ("x", "u0", "v0")]
    options = {name: value for name, value in arguments.items() if name not in ("x", "u0", "v0")}
    with fk.use_backend("reference"):
        out = function(*inputs, **options)
    losses = [torch.ones_like(v) for v in (out if isinstance(out, tuple) else (out,))]
    if options["num_iters"] > 0 and options["num_grad_steps"] == 0:
        return True
    expected = grads_of("reference", function, inputs, losses, options)
    return away_from_dead_components(expected, function, inputs, losses, options)


@given(calls())
def test_any_call_that_is_right(call):
    function, arguments = call
    assume(_stable(function, arguments))
    expected, result = (_values_and_gradients(b, function, arguments) for b in ("reference", "cpu"))
    assert len(result) == len(expected)
    scale = max([1e-3, *(e.detach().abs().max().item() for e in expected if e.numel())])
    for ours, theirs in zip(result, expected, strict=True):
        assert ours.dtype == theirs.dtype
        # float64: a thousand roundings, and what HALS's conditioning makes of them.
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * scale)


JUNK = [
    None, True, -1, 0, 2, 7, 2.5, float("nan"), float("inf"), "x", "mu", b"relu", [], [None], [1, "2"],
    (2, 2), [[1], [2]], 10**30, -(10**30), {}, object, 1j, torch.float64, torch.tensor(2), torch.rand(3),
    torch.rand(8, 2), torch.rand(2, 8, 2), torch.rand(1, 4, 4, 4, 4, 4), torch.rand(0, 2), torch.rand(8, 0),
    torch.ones(8, 2, dtype=torch.int64), torch.ones(8, 2) > 0, torch.ones(8, 2, dtype=torch.complex64),
    torch.rand(8, 2).to_sparse(), torch.rand(8, 2).to_mkldnn(), torch.rand(8, 2, device="meta"),
]  # fmt: skip


@given(calls(), st.data())
def test_any_call_that_is_wrong(call, data):
    """One or two arguments are replaced by something else, which may still be right."""
    function, arguments = call
    names = st.sampled_from(sorted(inspect.signature(function).parameters))
    for name in data.draw(st.lists(names, min_size=1, max_size=2, unique=True)):
        arguments[name] = data.draw(st.sampled_from(JUNK), label=name)
    before = {name: value.clone() for name, value in arguments.items() if _is_plain(value)}
    errors = []
    for backend in ("reference", "cpu"):
        try:
            _values(backend, function, arguments)
            errors.append(None)
        except ERRORS as error:
            errors.append(error)
    elsewhere = errors[0] is None and "backend 'cpu' does not run" in str(errors[1])
    if not elsewhere:  # a right call of tensors on another device, which only the reference serves
        assert [type(e) for e in errors] == [type(errors[0])] * 2
        assert str(errors[0]) == str(errors[1])
    if errors[0] is not None:
        assert any(name in str(errors[0]) for name in inspect.signature(function).parameters)
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


def _is_plain(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
