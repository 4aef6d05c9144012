"""The operators' problems, and what a user could take instead of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask
from torch import Tensor, nn

import factorizer_kernels as fk

from .harness import (
    DEVICE,
    FUSED,
    Contender,
    Effort,
    Function,
    Under,
    affordable,
    assert_close,
    cotangent,
    forward_backward,
)

# Relative L2 distance from float64, of the value and of the gradient. float32: an operator's iterations
# average some hundred roundings of 6e-8 and amplify them with the rank; half precision rounds x itself.
TOLERANCES = {torch.float32: (5e-6, 1e-4), torch.bfloat16: (1e-2, 2e-2)}

LONG_SUM = 4096  # columns: beyond, the roundings of a float32 sum grow with the root of its terms

PIECE = 2**24  # elements that float64's result is computed of at a time


@dataclass(frozen=True)
class OperatorProblem:
    """x, u0 and v0 of one operator's call. Frozen, so that float64's result is computed once."""

    size: tuple[int, ...]
    rank: int = 1
    num_iters: int = 5
    solver: str = "hals"
    dtype: torch.dtype = torch.float32

    @property
    def iteration(self) -> dict[str, Any]:
        return {"num_iters": self.num_iters, "solver": self.solver}

    def draw_matrices(
        self, batch: int, rows: int, columns: int, window: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, rows, columns), u0 and v0 for windows of so many columns.

        At rank 1 x is Gaussian. Above, its columns are noisy mixtures of u0's, all well above zero: in
        Gaussian data entries of the factors, or whole components, come to lie at zero, where rounding
        decides what the projections of HALS keep, and with it the gradient. There would be no truth.
        """
        generator = torch.Generator().manual_seed(0)
        rand = partial(torch.rand, generator=generator)
        u0, v0 = rand(rows, self.rank), rand(window, self.rank)
        if self.rank == 1:
            x = torch.randn(batch, rows, columns, generator=generator)
        else:
            u0, v0 = torch.eye(rows, self.rank) + 0.1 * (1 + u0), 1 + 0.5 * v0
            x = u0 @ (1 + 0.5 * rand(batch, self.rank, columns)) + 0.1 * rand(batch, rows, columns)
        return x, u0, v0

    def input(self) -> Tensor:
        return drawn(self)[0].to(DEVICE, self.dtype)

    def factors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [factor.to(DEVICE, dtype) for factor in drawn(self)[1:]]

    def check(self, function: Function, mode: str) -> None:
        x = self.input()
        results = forward_backward(function, x)()[:2] if mode == "forward+backward" else (function(x),)
        expected = truth(self, len(results) == 2)
        longer = max(1.0, (self.columns / LONG_SUM) ** 0.5)
        for result, reference, tolerance, what in zip(
            results, expected, TOLERANCES[self.dtype], ("result", "gradient of x"), strict=False
        ):
            assert_close(result, reference, longer * tolerance, what)


@lru_cache(maxsize=1)
def truth(problem: OperatorProblem, gradient: bool) -> tuple[Tensor, ...]:
    """float64's value, and gradient of x: piece by piece, because the reference keeps many copies."""
    function = Under("reference", problem.function(torch.float64))
    x, dy = problem.input(), cotangent(problem.input())
    pieces = []
    for x_piece, dy_piece in zip(problem.pieces(x), problem.pieces(dy), strict=True):
        leaf = x_piece.double().requires_grad_(gradient)
        y = function(leaf)
        pieces.append((y.detach(), *torch.autograd.grad(y, leaf, dy_piece.double())) if gradient else (y,))
    return tuple(torch.cat(parts, 1).view(x.shape) for parts in zip(*pieces, strict=True))


@lru_cache(maxsize=1)
def drawn(problem: OperatorProblem) -> tuple[Tensor, Tensor, Tensor]:
    return problem.draw()


@dataclass(frozen=True)
class Windows(OperatorProblem):
    """``swin_nmf`` of a feature map (B, C, S1..Sp)."""

    head_dim: int = 8
    patch_size: int = 8
    shifts: tuple[int | None, ...] = (None, 4)

    @property
    def heads(self) -> int:
        return self.size[1] // self.head_dim

    @property
    def voxels(self) -> int:
        return prod(self.size[2:])

    @property
    def columns(self) -> int:
        return self.patch_size ** len(self.size[2:])

    @property
    def windows(self) -> dict[str, Any]:
        return {"head_dim": self.head_dim, "patch_size": self.patch_size, "shifts": self.shifts}

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        x, *factors = self.draw_matrices(self.size[0] * self.heads, self.head_dim, self.voxels, self.columns)
        return x.view(self.size), *factors

    def function(self, dtype: torch.dtype = torch.float32) -> Function:
        u0, v0 = self.factors(dtype)
        return partial(fk.swin_nmf, u0=u0, v0=v0, **self.windows, **self.iteration)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = max(1, PIECE // (self.head_dim * self.voxels))
        return x.split(heads * self.head_dim, 1)

    def describe(self, function: Function) -> dict[str, Any]:
        return {"voxels": self.voxels, "x_bytes": prod(self.size) * self.dtype.itemsize}


@dataclass(frozen=True)
class Matrices(OperatorProblem):
    """``nmf`` of a batch of nonnegative matrices (B, M, N); u0 and v0 are shared, or each has its own."""

    own_factors: bool = False

    @property
    def columns(self) -> int:
        return self.size[-1]

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        x, *factors = self.draw_matrices(*self.size, self.size[-1])
        if self.own_factors:
            factors = [factor.repeat(self.size[0], 1, 1) for factor in factors]
        return x.abs(), *factors

    def function(self, dtype: torch.dtype = torch.float32) -> Function:
        u0, v0 = self.factors(dtype)
        return partial(fk.nmf, u0=u0, v0=v0, **self.iteration)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)  # their heads are the batch, and the largest here is small

    def describe(self, function: Function) -> dict[str, Any]:
        """Different updates in different orders: a speed says little without the fit it was had for."""
        x = self.input()
        with torch.no_grad():
            y = function(x)
        info = {"voxels": prod(self.size), "x_bytes": x.nbytes}
        return info if torch.equal(y, x) else info | {"residual": ((x - y).norm() / x.norm()).item()}


# --- ours, and the floor -------------------------------------------------------------------------


def _on(backend: str) -> Callable[[OperatorProblem, Effort], Function]:
    return lambda problem, effort: Under(backend, problem.function())


def _compiled(problem: OperatorProblem, effort: Effort) -> Function:
    function = Under("reference", torch.compile(problem.function(), fullgraph=True))
    x = problem.input().requires_grad_()
    try:
        function(x).sum().backward()
        with torch.no_grad():
            function(x)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0]
        pytest.skip(f"torch.compile fails here: {type(error).__name__}: {first_line}")
    return function


def _copy(problem: OperatorProblem, effort: Effort) -> Function:
    return torch.empty_like(problem.input()).copy_


# --- attention -----------------------------------------------------------------------------------


def _tokens(problem: Windows, x: Tensor) -> Tensor:
    """(B, C, S1..Sp) -> (B, heads, voxels, head_dim), laid out as attention's kernels like it."""
    return x.unflatten(1, (problem.heads, problem.head_dim)).flatten(3).mT.contiguous()


def _attention(problem: Windows, effort: Effort) -> Function:
    """Every voxel looks at every voxel."""
    affordable(effort, 4 * prod(problem.size) * problem.voxels)

    def function(x: Tensor) -> Tensor:
        q = _tokens(problem, x)
        return F.scaled_dot_product_attention(q, q, q).mT.reshape(x.shape)

    return function


def _window_attention(problem: Windows, effort: Effort) -> Function:
    """In windows, unshifted; cut and put together by our own kernels, so at no disadvantage."""
    affordable(effort, 4 * prod(problem.size) * problem.columns)
    windows = problem.windows | {"shifts": None}

    def function(x: Tensor) -> Tensor:
        q = fk.sw_matricize(x, **windows).mT.contiguous()
        y = F.scaled_dot_product_attention(q, q, q).mT
        return fk.sw_dematricize(y.contiguous(), x.shape, **windows)

    return function


class _ShiftedWindowAttention(nn.Module):
    """What the second block of each SwinUNETR layer does before its MLP: norm, roll, cut, project, attend
    with a mask and a position bias, project, put together, roll back."""

    def __init__(self, problem: Windows) -> None:
        super().__init__()
        axes = len(problem.size[2:])
        window, shift = (problem.patch_size,) * axes, (problem.patch_size // 2,) * axes
        self.block = SwinTransformerBlock(problem.size[1], problem.heads, window, shift)
        self.register_buffer("mask", compute_mask(list(problem.size[2:]), window, shift, "cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return self.block.forward_part1(x.movedim(1, -1), self.mask).movedim(-1, 1)


def _shifted_window_attention(problem: Windows, effort: Effort) -> Function:
    # It writes the logits to memory, and reads them three times: dearer than its products by far.
    affordable(effort, 12 * prod(problem.size) * problem.columns)
    return _ShiftedWindowAttention(problem).to(DEVICE, problem.dtype)


def _linear_attention(problem: Windows, effort: Effort) -> Function:
    """Every voxel looks at every voxel, with the kernel elu + 1 (Katharopoulos et al., 2020)."""

    def function(x: Tensor) -> Tensor:
        v = _tokens(problem, x)
        q = F.elu(v) + 1
        y = q @ (q.mT @ v) / (q @ q.sum(-2, keepdim=True).mT)
        return y.mT.reshape(x.shape)

    return function


# --- other people's NMF --------------------------------------------------------------------------


def _sklearn(problem: Matrices, effort: Effort) -> Function:
    from sklearn.decomposition import NMF

    if DEVICE.type != "cpu":
        pytest.skip("scikit-learn computes on the CPU")
    solver = {"hals": "cd", "mu": "mu"}[problem.solver]
    u0, v0 = (factor.numpy() for factor in problem.factors())

    def factorise(x):
        model = NMF(problem.rank, init="custom", solver=solver, max_iter=problem.num_iters, tol=0)
        u = model.fit_transform(x, W=u0.copy(), H=v0.T.copy())
        return torch.from_numpy(u @ model.components_)

    def function(x: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few iterations do not converge, and are not meant to
            return torch.stack([factorise(matrix) for matrix in x.numpy()])

    return function


def _torchnmf(problem: Matrices, effort: Effort) -> Function:
    from torchnmf.nmf import NMF

    if problem.solver != "mu":
        pytest.skip("torchnmf has multiplicative updates only")
    u0, v0 = problem.factors()

    def factorise(x: Tensor) -> Tensor:
        model = NMF(W=v0, H=u0).to(DEVICE)
        with torch.enable_grad():  # it takes its updates from autograd
            model.fit(x, beta=2, tol=0, max_iter=problem.num_iters)
        return model().detach()

    return lambda x: torch.stack([factorise(matrix) for matrix in x])


OURS = Contender("ours", _on(FUSED), FUSED)
REFERENCE = Contender("reference", _on("reference"), "reference")
COMPILED = Contender("reference, torch.compile", _compiled)
RELU = Contender("relu", lambda problem, effort: torch.relu)
COPY = Contender("copy", _copy, modes=("forward",))
ATTENTION = Contender("attention, all voxels", _attention)
WINDOW_ATTENTION = Contender("attention, windows", _window_attention)
SHIFTED_ATTENTION = Contender("attention, shifted windows (MONAI)", _shifted_window_attention)
LINEAR_ATTENTION = Contender("linear attention", _linear_attention)
SKLEARN = Contender("scikit-learn", _sklearn, modes=("forward",))
TORCHNMF = Contender("torchnmf", _torchnmf, modes=("forward",))
