"""swin_nmf: against the reference in value and gradient, memory, layouts, determinism."""

from functools import partial

import pytest
import torch
from tests_support import away_from_dead_components, grads_of

import factorizer_kernels as fk

# (size, options): 1-D to 3-D, every kind of shift, patches off the vector width, one window as large as
# the map, windows beyond the cache (32³ x 8), many heads and few voxels.
CASES = [
    ((2, 8, 24), {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}),
    ((1, 6, 35), {"head_dim": 3, "patch_size": 7, "shifts": [-3, 36]}),
    ((2, 8, 12, 20), {"head_dim": 4, "patch_size": (4, 5), "shifts": [None, (1, -2), 3]}),
    ((1, 16, 16, 8, 16), {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}),
    ((1, 16, 8, 8, 8), {"num_heads": 2, "patch_size": 4, "shifts": [0, 1, 2, 3]}),
    ((1, 6, 9, 6, 15), {"head_dim": 3, "patch_size": (3, 2, 5), "shifts": [(2, 1, -1)]}),
    ((1, 8, 12, 10, 14), {"head_dim": 4, "grid_size": 1}),
    ((1, 8, 32, 32, 32), {"head_dim": 8, "grid_size": 1, "shifts": [None, 5]}),
    ((1, 4, 9, 70, 34), {"head_dim": 4, "patch_size": (9, 70, 17), "shifts": [(1, 2, 3)]}),
    ((1, 64, 8, 8, 8), {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}),
    ((1, 40, 6), {"head_dim": 40, "patch_size": 3}),
    ((0, 8, 8), {"head_dim": 4, "patch_size": 4}),
]  # fmt: skip


def _problem(size, options, rank, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(size, dtype=dtype)
    z = fk.sw_matricize(x, **options)
    rows, columns = z.shape[-2:]
    return (
        x,
        torch.rand(rows, rank, dtype=dtype),
        torch.rand(columns, rank, dtype=dtype),
        torch.randn(size, dtype=dtype),
    )


@pytest.mark.parametrize(("size", "options"), CASES, ids=str)
@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize(
    ("rank", "num_grad_steps", "act"),
    [(1, None, "relu"), (2, None, "relu"), (1, 2, "relu"), (1, 1, None), (2, 1, "relu")],
)
def test_cpu_meets_reference(size, options, solver, rank, num_grad_steps, act, poisoned, rel):
    x, u0, v0, dy = _problem(size, options, rank)
    if act is None and solver == "mu":
        x = x.abs()  # MU's contract
    options = {
        **options,
        "solver": solver,
        "num_iters": 3,
        "num_grad_steps": num_grad_steps,
        "act": act,
    }
    expected = grads_of("reference", fk.swin_nmf, (x, u0, v0), (dy,), options)
    assert away_from_dead_components(expected, fk.swin_nmf, (x, u0, v0), (dy,), options)
    result = grads_of("cpu", fk.swin_nmf, (x, u0, v0), (dy,), options)
    assert rel(result.values[0], expected.values[0]) < 1e-10
    scale = expected.gradients[0].norm()
    for ours, theirs in zip(result.gradients, expected.gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * max(theirs.norm(), scale)


@pytest.mark.parametrize("rank", [1, 3])
def test_float32_accuracy(rank, rel):
    """Against float64. Sums over 512 columns in 8 lanes: some 64 roundings of 6e-8, random in sign."""
    x, u0, v0, dy = _problem((1, 16, 16, 16, 16), {"head_dim": 8, "patch_size": 8}, rank)
    options = {"head_dim": 8, "patch_size": 8, "shifts": [None, 4], "solver": "mu"}
    expected = grads_of("reference", fk.swin_nmf, (x, u0, v0), (dy,), options)
    result = grads_of("cpu", fk.swin_nmf, tuple(t.float() for t in (x, u0, v0)), (dy.float(),), options)
    assert rel(result.values[0], expected.values[0]) < 1e-6
    assert rel(result.gradients[0], expected.gradients[0]) < 1e-4


def test_gradcheck(backend):
    torch.manual_seed(1)
    x = torch.randn(1, 4, 4, 6, dtype=torch.float64, requires_grad=True)
    u0, v0 = (torch.rand(n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 6))
    options = {
        "head_dim": 2,
        "patch_size": (2, 3),
        "shifts": [None, 1],
        "num_iters": 2,
        "solver": "mu",
    }
    assert torch.autograd.gradcheck(lambda *t: fk.swin_nmf(*t, **options), (x, u0, v0))


def test_is_the_composition(backend, rel):
    x, u0, v0, _ = _problem((2, 8, 8, 8), {"head_dim": 4, "patch_size": 4}, 2)
    options = {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}
    z = fk.nmf(fk.sw_matricize(x.relu(), **options), u0, v0, solver="mu")
    expected = fk.sw_dematricize(z, x.shape, **options)
    assert rel(fk.swin_nmf(x, u0, v0, solver="mu", **options), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, backend, rel):
    x, u0, v0, dy = _problem((1, 16, 16, 16, 16), {"head_dim": 8, "patch_size": 8}, 1, torch.float32)
    x = x.to(dtype)
    x[..., :8] = -1  # all-zero windows after relu
    options = {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}
    expected = grads_of("reference", fk.swin_nmf, (x.double(), u0, v0), (dy.double(),), options)
    result = grads_of(
        "cpu" if backend == "cpu" else "reference",
        fk.swin_nmf,
        (x, u0, v0),
        (dy.to(dtype),),
        options,
    )
    assert result.values[0].dtype == result.gradients[0].dtype == dtype
    assert rel(result.values[0], expected.values[0]) < 1e-2
    assert rel(result.gradients[0], expected.gradients[0]) < 1e-2


@pytest.mark.parametrize("dim_order", [(0, 2, 3, 4, 1), (4, 3, 2, 1, 0), (0, 1, 4, 3, 2)], ids=str)
def test_layouts(dim_order, backend, rel):
    options = {"head_dim": 8, "patch_size": 4, "shifts": [None, 2]}
    x, u0, v0, dy = _problem((2, 8, 8, 4, 8), {"head_dim": 8, "patch_size": 4}, 1)
    inverse = [dim_order.index(i) for i in range(5)]
    expected = grads_of("reference", fk.swin_nmf, (x, u0, v0), (dy,), options)
    leaf = x.permute(dim_order).contiguous().permute(inverse).requires_grad_()
    same_dy = dy.permute(dim_order).contiguous().permute(inverse)
    y = fk.swin_nmf(leaf, u0, v0, **options)
    (dx,) = torch.autograd.grad(y, leaf, same_dy)
    assert rel(y, expected.values[0]) < 1e-12
    assert rel(dx, expected.gradients[0]) < 1e-9
    expanded_dy = torch.ones(1, dtype=x.dtype).expand(x.shape)
    y = fk.swin_nmf(leaf, u0, v0, **options)
    (dx,) = torch.autograd.grad(y, leaf, expanded_dy)
    ones = grads_of("reference", fk.swin_nmf, (x, u0, v0), (torch.ones_like(x),), options)
    assert rel(dx, ones.gradients[0]) < 1e-9


def test_factors_per_window(backend, rel):
    options = {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}
    x, u0, v0, dy = _problem((1, 8, 8, 8), options, 1)
    u0, v0 = torch.rand(4, 4, 4, 1, dtype=x.dtype), torch.rand(4, 16, 1, dtype=x.dtype)
    expected = grads_of("reference", fk.swin_nmf, (x, u0, v0), (dy,), options)
    result = grads_of(backend, fk.swin_nmf, (x, u0, v0), (dy,), options)
    assert rel(result.values[0], expected.values[0]) < 1e-12
    assert rel(result.gradients[2], expected.gradients[2]) < 1e-8


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("options", [{"patch_size": 8, "shifts": [None, 4, 2]}, {"grid_size": 1}], ids=str)
def test_same_bits_for_any_number_of_threads(rank, options):
    options = {"head_dim": 8, **options}
    x, u0, v0, dy = _problem((1, 16, 32, 32, 32), options, rank, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            result = grads_of("cpu", fk.swin_nmf, (x, u0, v0), (dy,), options)
            results.append((*result.values, *result.gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_autograd_keeps_x_and_the_small_factors():
    """Beside x itself at most 0.3 of x is kept."""
    x, u0, v0, _ = _problem((1, 32, 32, 32, 32), {"head_dim": 8, "patch_size": 8}, 1, torch.float32)
    x.requires_grad_()
    kept = []
    with (
        fk.use_backend("cpu"),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        fk.swin_nmf(x, u0, v0, head_dim=8, patch_size=8, shifts=[None, 4])
    others = sum(t.numel() for t in kept if t.data_ptr() != x.data_ptr())
    assert kept
    assert others <= 0.3 * x.numel()


@pytest.mark.parametrize("solver", ["mu", "hals"])
def test_neighbours_do_not_matter(solver, rel):
    """Windows side by side, some of which are iterated on and the others taken by their moments."""
    options = {"head_dim": 4, "patch_size": 4}
    x, u0, v0, dy = _problem((1, 4, 4, 4, 44), options, 1)
    x, options = x.abs(), {**options, "act": None, "solver": solver}
    if solver == "hals":
        x[0, 1, 2, 3, 9], x[0, 0, 0, 0, 25] = -0.5, -2.0  # windows 2 and 6 of 11
    else:
        x[..., 8:12] *= 1e-12  # where eps matters
        x[..., 24:28] *= 1e-14
    expected = grads_of("reference", fk.swin_nmf, (x, u0, v0), (dy,), options)
    result = grads_of("cpu", fk.swin_nmf, (x, u0, v0), (dy,), options)
    for begin in range(0, 44, 4):
        window = [t[..., begin : begin + 4].contiguous() for t in (x, dy)]
        alone = grads_of("cpu", fk.swin_nmf, (window[0], u0, v0), (window[1],), options)
        pairs = [
            (result.values[0], alone.values[0], expected.values[0]),
            (result.gradients[0], alone.gradients[0], expected.gradients[0]),
        ]
        for among, by_itself, right in pairs:
            assert torch.equal(among[..., begin : begin + 4], by_itself)
            assert rel(by_itself, right[..., begin : begin + 4]) < 1e-8


def test_nan_stays_in_its_windows(backend):
    options = {"head_dim": 8, "patch_size": 4}
    x, u0, v0, _ = _problem((1, 8, 8, 8, 8), options, 1, torch.float32)
    clean = fk.swin_nmf(x, u0, v0, **options)
    x[0, 0, 0, 0, 0] = float("nan")
    spoiled = fk.swin_nmf(x, u0, v0, **options)
    assert spoiled[..., :4, :4, :4].isnan().all()
    spoiled[..., :4, :4, :4] = clean[..., :4, :4, :4]
    assert torch.equal(spoiled, clean)


# --- after norm_linear ---------------------------------------------------------------------------


def _normed_problem(dtype, layout=lambda x: x):
    """x (2, 6, 8, 4, 12), weights of norm_linear to 4 channels, u0 and v0 of rank 1, and two gradients."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, dx = (layout(randn(2, 6, 8, 4, 12)).to(dtype) for _ in range(2))
    weights = [1 + randn(6) / 4, randn(6), randn(4, 6), randn(4)]
    factors = [randn(2, 1).abs(), randn(64, 1).abs()]
    tensors = [t.to(torch.promote_types(dtype, torch.float32)) for t in (*weights, *factors)]
    return (x, *tensors), (layout(randn(2, 4, 8, 4, 12)).to(dtype), dx)


_NORMED = {"head_dim": 2, "patch_size": 4, "shifts": [None, (2, 0, 1)], "num_iters": 3, "norm_eps": 1e-3}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, lambda x: x),
        (torch.float64, lambda x: x.transpose(2, 4).contiguous().transpose(2, 4)),
        (torch.bfloat16, lambda x: x),
    ],
    ids=["float32", "float64, another layout", "bfloat16"],
)
def test_norm_linear_swin_nmf(dtype, layout, backend):
    """Values and all gradients, that of the x that is returned among them, against float64."""
    tensors, upstream = _normed_problem(dtype, layout)
    exact = _normed_outcome("reference", [t.double() for t in tensors], [g.double() for g in upstream])
    ours = _normed_outcome(backend, tensors, upstream)
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    for result, expected in zip(ours, exact, strict=True):
        assert (result.double() - expected).norm() <= tolerance * expected.norm()


def _normed_outcome(backend, tensors, upstream):
    leaves = [t.clone().requires_grad_() for t in tensors]
    with fk.use_backend(backend):
        y, x = fk.norm_linear_swin_nmf(*leaves, **_NORMED)
    assert torch.equal(x, leaves[0])
    return (y.detach(), *torch.autograd.grad([y, x], leaves, list(upstream), materialize_grads=True))


def test_norm_linear_swin_nmf_is_the_two_in_turn(backend):
    """To the bit, with half of the arguments without a gradient, and where nothing is differentiated."""
    tensors, upstream = _normed_problem(torch.float32)
    eps, options = _NORMED["norm_eps"], {k: v for k, v in _NORMED.items() if k != "norm_eps"}

    def in_turn(*tensors, **more):
        between, x = fk.norm_linear(*tensors[:5], eps=eps, residual=True)
        return fk.swin_nmf(between, *tensors[5:], **options, **more), x

    def together(*tensors, **more):
        return fk.norm_linear_swin_nmf(*tensors, **_NORMED, **more)

    def outcome(function, **more):
        leaves = [t.clone().requires_grad_(i % 2 == 0) for i, t in enumerate(tensors)]
        results = [r for r in function(*leaves, **more) if r.requires_grad]
        wanted = leaves[::2] if len(results) == 2 else leaves[:1]
        return (*results, *torch.autograd.grad(results, wanted, list(upstream[-len(results) :])))

    with fk.use_backend(backend):
        for more in ({}, {"num_grad_steps": 0}):
            pairs = zip(outcome(together, **more), outcome(in_turn, **more), strict=True)
            assert all(torch.equal(ours, expected) for ours, expected in pairs)
        assert all(torch.equal(a, b) for a, b in zip(together(*tensors), in_turn(*tensors), strict=True))


def test_norm_linear_swin_nmf_keeps_no_map_but_x(backend):
    """Where there are kernels; and its second derivative names the way out."""
    tensors, _ = _normed_problem(torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    kept = []
    with (
        fk.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        y, _ = fk.norm_linear_swin_nmf(*leaves, **_NORMED)
        if backend != "reference":
            assert sum(t.numel() for t in kept) == sum(t.numel() for t in tensors)
            (gradient,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
            with pytest.raises(
                NotImplementedError, match="norm_linear_swin_nmf cannot be differentiated twice"
            ):
                gradient.sum().backward()


def test_norm_linear_swin_nmf_under_transforms(backend):
    """Forward mode, per-sample gradients and autocast."""
    tensors, _ = _normed_problem(torch.float64)
    x, *others = tensors
    with fk.use_backend(backend):
        function = partial(fk.norm_linear_swin_nmf, **_NORMED)
        tangent = torch.func.jvp(lambda x: function(x, *others)[0], (x,), (x.cos(),))[1]
        expected = torch.func.vjp(lambda x: function(x, *others)[0], x)[1](tangent)[0]
        torch.testing.assert_close((expected * x.cos()).sum(), tangent.square().sum())

        def loss(x, *others):
            return sum(t.sin().sum() for t in function(x[None], *others))

        samples = torch.func.vmap(torch.func.grad(loss, (0, 3)), (0, *[None] * 6))(x, *others)
        for i in range(2):
            for ours, alone in zip(samples, torch.func.grad(loss, (0, 3))(x[i], *others), strict=True):
                torch.testing.assert_close(ours[i], alone)
        with torch.autocast("cpu", torch.bfloat16):
            y, same = function(*(t.float() for t in tensors))
        assert (y.dtype, same.dtype) == (torch.bfloat16, torch.float32)
