"""The CUDA kernels, executed on the CPU, against the golden cases and the reference, values and gradients."""

from math import prod

import pytest
import torch
from tests_support import SPECIAL, check_special, check_spoiled_voxel, grads_of

import factorizer_kernels as fk

pytestmark = pytest.mark.usefixtures("poisoned")

# Relative L2 against the reference in float64. float32: some hundred roundings of 6e-8, and HALS gradients
# are conditioned a hundred times worse. Half precisions round x, the result, and dx: once each.
VALUES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
GRADIENTS = {torch.float32: 1e-3, torch.float16: 4e-3, torch.bfloat16: 1e-2}


def compare(function, inputs, rel, values=None, gradients=None, dys=None, **options):
    """Values and all gradients under cuda against the reference in float64; twice, to the same bits."""
    generator = torch.Generator().manual_seed(0)
    dtype = inputs[0].dtype
    exact = tuple(t.detach().double() for t in inputs)
    with fk.use_backend("reference"):
        shapes = function(*exact, **options)
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    losses = dys or [torch.randn(v.shape, generator=generator).to(dtype) for v in shapes]
    expected = grads_of("reference", function, exact, [loss.double() for loss in losses], options)
    result, again = (grads_of("cuda", function, inputs, losses, options) for _ in range(2))
    for value, wanted in zip(result.values, expected.values, strict=True):
        assert value.dtype == dtype
        assert rel(value, wanted) < (values or VALUES[dtype])
    scale = expected.gradients[0].norm()
    for gradient, wanted, given in zip(result.gradients, expected.gradients, inputs, strict=True):
        assert gradient.dtype == given.dtype
        # The gradients of u0 and v0 may cancel to nothing at rank 1: the distance is to x's gradient too.
        assert (gradient.double() - wanted).norm() <= (gradients or GRADIENTS[dtype]) * max(
            wanted.norm(), 0.1 * scale
        )
    for a, b in zip(result.values + result.gradients, again.values + again.gradients, strict=True):
        assert torch.equal(a, b)


def draw(batch, rows, columns, rank):
    """A draw in which no component of HALS dies: X near UVᵀ, the first factors near U and V."""
    torch.manual_seed(rows + columns + rank)
    u = torch.rand(rows, rank) + 2 * torch.eye(rows, rank)
    v = torch.rand(columns, rank) + 2 * torch.eye(columns, rank)
    x = u @ v.mT + 0.1 * torch.rand(*batch, rows, columns)
    return x, u * (1 + 0.1 * torch.rand_like(u)), v * (1 + 0.1 * torch.rand_like(v))


def volume(shape, options, rank=1, act="relu"):
    torch.manual_seed(len(shape))
    x = torch.randn(shape) if act else torch.rand(shape)
    patch = options.get("patch_size", shape[2:])
    columns = prod(patch) if not isinstance(patch, int) else patch ** (len(shape) - 2)
    return x, torch.rand(options["head_dim"], rank), torch.rand(columns, rank)


@pytest.mark.golden_kind("nmf")
def test_golden(golden, rel):
    meta = golden["meta"]
    options = {k: meta[k] for k in ("num_iters", "solver", "num_grad_steps", "eps")}
    x, u0, v0 = (golden[k].float() for k in ("x", "u0", "v0"))
    x.requires_grad_()
    with fk.use_backend("cuda"):
        if x.shape[-2] > 8 or x.shape[-1] > 1024:
            with pytest.raises(ValueError, match="backend 'cuda' does not run nmf here: it takes"):
                fk.nmf(x, u0, v0, **options)
            return
        y = fk.nmf(x, u0, v0, **options)
        u, v = fk.nmf_factors(x, u0, v0, **options)
    for result, name in ((y, "y"), (u, "u"), (v, "v")):
        assert rel(result, golden[name]) < 2e-5
    if meta["num_iters"] > 0:
        (dx,) = torch.autograd.grad(y, x, golden["dy"].float())
        assert rel(dx, golden["dx"]) < 2e-3


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("rank", range(1, 9))
def test_every_rank(rank, solver, rel):
    compare(fk.nmf, draw((6,), 8, 21, rank), rel, num_iters=3, solver=solver)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize(
    ("batch", "rows", "columns", "rank"),
    [
        ((), 1, 1, 1), ((2,), 1, 7, 1), ((2,), 7, 1, 1), ((3,), 5, 132, 2), ((1, 2), 6, 260, 3),
        ((1,), 8, 1024, 2),
    ],
)  # fmt: skip
def test_matrices(batch, rows, columns, rank, solver, rel):
    inputs = draw(batch, rows, columns, rank)
    for function in (fk.nmf, fk.nmf_factors):
        compare(function, inputs, rel, num_iters=2, solver=solver)


@pytest.mark.parametrize(
    ("num_iters", "num_grad_steps"), [(0, None), (0, 0), (1, None), (3, 1), (3, 2), (2, 9)]
)
@pytest.mark.parametrize("rank", [1, 2])
def test_iterations_and_grad_steps(num_iters, num_grad_steps, rank, rel):
    for solver in ("mu", "hals"):
        options = {"num_iters": num_iters, "num_grad_steps": num_grad_steps, "solver": solver}
        compare(fk.nmf, draw((2,), 4, 8, rank), rel, **options)


def test_no_grad_steps():
    for function in (fk.nmf, fk.nmf_factors):
        leaves = [t.requires_grad_() for t in draw((), 4, 8, 2)]
        with fk.use_backend("cuda"):
            y = function(*leaves, num_iters=2, num_grad_steps=0)
        assert not any(t.requires_grad for t in (y if isinstance(y, tuple) else (y,)))


MAPS = {
    "1-D": ((2, 4, 8), {"head_dim": 2, "patch_size": 4, "shifts": [None, 3]}),
    "2-D odd": ((1, 3, 6, 10), {"head_dim": 3, "patch_size": (3, 5), "shifts": [None, (1, 7)]}),
    "3-D": ((2, 4, 4, 2, 8), {"head_dim": 2, "patch_size": (4, 2, 4), "shifts": [2, (0, 1, 5), 3]}),
    "3-D in fours": (
        (1, 10, 4, 6, 16),
        {"head_dim": 5, "patch_size": (2, 3, 8), "shifts": [None, (1, 2, 4), -4]},
    ),
    "one copy": ((1, 4, 4, 8), {"head_dim": 4, "patch_size": 4, "shifts": [(1, 4)]}),
    "the whole map": ((1, 8, 4, 6, 10), {"head_dim": 8, "patch_size": (4, 6, 10), "shifts": [None, 5]}),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    ("solver", "rank", "act"),
    [("hals", 1, "relu"), ("mu", 1, "relu"), ("hals", 1, None), ("hals", 2, None), ("mu", 2, "relu")],
)
def test_maps(name, solver, rank, act, rel):
    shape, options = MAPS[name]
    compare(
        fk.swin_nmf, volume(shape, options, rank, act), rel, act=act, solver=solver, num_iters=3, **options
    )


PAPER = {"head_dim": 8, "patch_size": 8, "shifts": [None, 4]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 1), ("hals", 3)])
def test_the_shape_that_matters(solver, rank, dtype, rel):
    """8 x 512 windows; with float32 to the accuracy that the project promises."""
    x, u0, v0 = volume((1, 8, 8, 8, 16), PAPER, rank)
    x[:, :, :, :, :4] = -1
    bounds = {"values": 1e-6, "gradients": 1e-4} if dtype == torch.float32 else {}
    compare(fk.swin_nmf, (x.to(dtype), u0, v0), rel, solver=solver, **bounds, **PAPER)


@pytest.mark.parametrize(
    ("patch", "shifts"),
    [
        ((8, 8, 16), [None, 4]),
        (10, [None, 3]),
        ((8, 8, 8), [0, 2, 4, 6]),
        (4, [0, 1, 2, 3]),
        ((5, 7, 12), [None]),
    ],
    ids=str,
)
def test_window_sizes(patch, shifts, rel):
    """One warp and several, chunks that are moved at once and columns one by one."""
    sides = (patch,) * 3 if isinstance(patch, int) else patch
    options = {"head_dim": 8, "patch_size": patch, "shifts": shifts}
    compare(fk.swin_nmf, volume((1, 8, *sides[:2], 2 * sides[2]), options), rel, **options)


@pytest.mark.parametrize(
    ("num_iters", "num_grad_steps", "eps"),
    # The identity is exact in eps; one that can be seen shows that every term of it is there.
    [(1, None, 1e-16), (4, None, 1e-2), (5, 3, 1e-2), (64, 2, 1e-16)],
)
@pytest.mark.parametrize("shifts", [[None], [None, (1, 3)]], ids=["one copy", "two"])
def test_rank_one_identity(shifts, num_iters, num_grad_steps, eps, rel):
    """On a map with empty windows, columns and rows, and small values."""
    torch.manual_seed(1)
    x = torch.randn(2, 4, 4, 12)
    x[0] = -1
    x[1, 2] = -1
    x[1, :, 1] = 0
    x[1, :, :, :4] *= 1e-3
    options = {"num_heads": 1, "patch_size": 4, "shifts": shifts, "eps": eps}
    inputs = (x, torch.rand(4, 1), torch.rand(16, 1))
    compare(fk.swin_nmf, inputs, rel, num_iters=num_iters, num_grad_steps=num_grad_steps, **options)


def test_more_iterations_than_the_identity_keeps(rel):
    x, u0, v0 = volume((1, 4, 4), {"head_dim": 4})
    compare(fk.swin_nmf, (x, u0, v0), rel, head_dim=4, patch_size=4, num_iters=65)


@pytest.mark.parametrize("solver", ["mu", "hals"])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e6])
def test_scales(scale, solver, rel):
    """Where eps is of the order of the sums, and where squares are large."""
    options = {"head_dim": 8, "patch_size": 4, "shifts": [None, 2]}
    x, u0, v0 = volume((1, 8, 4, 8, 8), options)

    def scaled(x, u0, v0, **options):  # and back, so that all the gradients are of one size
        return fk.swin_nmf(scale * x, u0, v0, **options) / scale

    compare(scaled, (x, u0, v0), rel, solver=solver, **options)


def test_half_precision_sums_copies_in_float32(rel):
    """Seven copies that add up to the reference's rounding, not to seven of their own."""
    options = {"head_dim": 4, "patch_size": 4, "shifts": [*range(4), -1, -2, -3]}
    x, u0, v0 = volume((1, 4, 8, 8), options, 2)
    compare(fk.swin_nmf, (x.bfloat16(), u0, v0), rel, gradients=4e-3, solver="mu", **options)


@pytest.mark.parametrize("rank", [1, 2])
def test_layouts(rank, rel):
    """Channels last, reversed axes, an expanded dy, addresses off every multiple: read where they lie."""
    options = {"head_dim": 4, "patch_size": 4, "shifts": [None, 4]}
    x, u0, v0 = volume((2, 4, 8, 8), options, rank)
    off = torch.full((x.numel() + 3,), float("nan"))[3:].view(x.shape).copy_(x)
    layouts = [x, x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, off]
    results = []
    for same in layouts:
        leaf = same.detach().requires_grad_()
        with fk.use_backend("cuda"):
            y = fk.swin_nmf(leaf, u0, v0, **options)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, torch.ones(1).expand(y.shape))))
    with fk.use_backend("reference"):
        leaf = x.double().requires_grad_()
        y = fk.swin_nmf(leaf, u0.double(), v0.double(), **options)
    expected = (y, *torch.autograd.grad(y.sum(), leaf))
    for result in results:
        assert all(rel(a, b) < bound for a, b, bound in zip(result, expected, (1e-5, 1e-3), strict=True))


@pytest.mark.parametrize("rank", [1, 2])
def test_factors_of_each_window(rank, rel):
    options = {"head_dim": 4, "patch_size": 4, "shifts": [None, 2]}
    x, _, _ = volume((1, 8, 8, 8), options)
    u0, v0 = torch.rand(4, 1, 4, rank), torch.rand(4, 16, rank)
    compare(fk.swin_nmf, (x, u0, v0), rel, solver="mu", **options)
    compare(fk.swin_nmf, (x, u0, v0), rel, solver="hals", num_iters=2, **options)
    strange = torch.rand(1 + 16 * rank)[1:].view(16, rank)  # v0 at an odd address
    compare(fk.swin_nmf, (x, u0, strange), rel, solver="mu", **options)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 3)])
def test_writes_nothing_beside_its_outputs(name, solver, rank, monkeypatch):
    """Every tensor that is made on the way lies between numbers that must stay."""
    made, original = [], torch.Tensor.new_empty

    def guarded(self, size, dtype=None, **kwargs):
        count = prod(size)
        around = original(self, (count + 128,), dtype=dtype, **kwargs).fill_(float("nan"))
        around[:64] = around[-64:] = 7
        made.append(around)
        return around[64 : 64 + count].view(size)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: guarded(x, x.shape))
    shape, options = MAPS[name]
    x, u0, v0 = (t.requires_grad_() for t in volume(shape, options, rank))
    with fk.use_backend("cuda"):
        y = fk.swin_nmf(x, u0, v0, solver=solver, **options)
    torch.autograd.grad(y.sum(), (x, u0, v0))
    assert len(made) >= 4
    for around in made:
        assert (around[:64] == 7).all()
        assert (around[-64:] == 7).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"u0": torch.rand(8, 9), "v0": torch.rand(16, 9)}, "it takes rank up to 8, got 9"),
        ({"x": torch.rand(9, 16), "u0": torch.rand(9, 1)}, r"it takes head_dim \(rows\) up to 8, got 9"),
        ({"x": torch.rand(8, 1025), "v0": torch.rand(1025, 1)}, "it takes columns up to 1024, got 1025"),
        ({"x": torch.rand(8, 16).double()}, "got float64"),
    ],
)
def test_what_is_not_served(change, words):
    """By name: an error that says so. Without a name: another backend."""
    arguments = {"x": torch.rand(8, 16), "u0": torch.rand(8, 1), "v0": torch.rand(16, 1)} | change
    with (
        fk.use_backend("cuda"),
        pytest.raises(ValueError, match=f"{words}; leave the choice open, .*'reference'"),
    ):
        fk.nmf(**arguments)
    with fk.use_backend("cuda"), pytest.raises(ValueError, match="it has no sw_matricize"):
        fk.sw_matricize(torch.rand(1, 8, 4), head_dim=8, patch_size=4)


@pytest.mark.parametrize(("solver", "rank"), [("hals", 1), ("mu", 1), ("hals", 2), ("mu", 2)])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_maps(name, solver, rank):
    check_special("cuda", name, solver, rank)


@pytest.mark.parametrize(
    ("solver", "rank", "act"), [("hals", 1, "relu"), ("mu", 2, "relu"), ("hals", 1, None)]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_spoiled_voxel(value, solver, rank, act):
    check_spoiled_voxel("cuda", value, solver, rank, act)
