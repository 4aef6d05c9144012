"""Matrix factorisation as a layer: X ≈ U Vᵀ, and the low-rank X in place of X."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer, integers, number
from factorizer_kernels.shared.dtypes import autocast_disabled

from .inits import DRAWS, FixedInit, make_init
from .solvers import Solver, SolverSpec, make_solvers

Factors = tuple[Tensor, Tensor]


class MatrixFactorization(nn.Module):
    """Replaces every M x N matrix of x (..., M, N) by its approximation of rank R.

    Args:
        size: (M, N).
        rank: R; max(ceil(M N / (compression (M + N))), 1) where None.
        compression: how many times fewer numbers the factors hold than the matrix.
        num_iters: iterations of the solver.
        num_grad_steps: only the last so many iterations are differentiated, the factors before them
            are constants; None: all of them.
        init: where the factors start: "uniform", "normal", a pair of them for U and V, "svd" or
            "nndsvd" (`factorizer.layers.factorization.inits`).
        solver: a name, a class, a pair (class, keywords), or a sequence of these that run in turn
            in every iteration (`factorizer.layers.factorization.solvers`). "hals" and "mu" run on
            the kernels of `factorizer_kernels`, the others in plain PyTorch.
        verbose: whether to print the relative error after every iteration.

    Half precision is computed in float32, also under autocast.
    """

    def __init__(
        self,
        size: Sequence[int],
        rank: int | None = None,
        compression: float = 10,
        num_iters: int = 5,
        num_grad_steps: int | None = None,
        init: str | Sequence[str] = "normal",
        solver: SolverSpec = "cd",
        verbose: bool = False,
    ) -> None:
        super().__init__()
        m, n = integers("size", size, 1, (2,))
        if not number("compression", compression) > 0:
            raise ValueError(f"compression must be positive, got {compression!r}")
        if rank is None:
            rank = max(ceil(m * n / (compression * (m + n))), 1)
        self.size = (m, n)
        self.rank = integer("rank", rank, 1)
        self.compression = compression
        self.num_iters = integer("num_iters", num_iters)
        if num_grad_steps is not None:
            integer("num_grad_steps", num_grad_steps)
        self.num_grad_steps = num_grad_steps
        self.init = make_init(init, self.size, self.rank)
        self.solvers: list[Solver] = make_solvers(solver)
        self.verbose = verbose

    @property
    def kernel_options(self) -> dict | None:
        """The solver's options for `factorizer_kernels`, or None where it has no such solver."""
        if len(self.solvers) != 1 or self.verbose:
            return None
        solver = self.solvers[0]
        if solver.kernel is None or solver.factor != (0, 1):
            return None
        kind: Any = next(kind for kind in type(solver).__mro__ if "kernel" in vars(kind))
        # Another rule under an inherited name, or another product.
        if not _keeps(solver, kind, "__call__", "update") or not _keeps(
            self, MatrixFactorization, "reconstruct"
        ):
            return None
        return {
            "num_iters": self.num_iters,
            "solver": solver.kernel,
            "num_grad_steps": self.num_grad_steps,
            "eps": solver.eps,
        }

    def forward(self, x: Tensor, w: Tensor | None = None, start: Factors | None = None) -> Tensor:
        """x (..., M, N) to U Vᵀ of its shape and dtype. Arguments as those of `decompose`."""
        start = self._start(x, w, start)
        options = self.kernel_options
        if options is not None:
            return fk.nmf(x, *start, **options)
        with autocast_disabled(x):
            return self.reconstruct(*self._iterate(x, w, start)).to(x.dtype)

    def decompose(self, x: Tensor, w: Tensor | None = None, start: Factors | None = None) -> Factors:
        """The factors U (..., M, R) and V (..., N, R) of x, in x's dtype.

        Args:
            x: (..., M, N); nonnegative for the multiplicative solvers.
            w: nonnegative weights of x's entries, of its shape, for solvers that take them ("wmu").
            start: U (M, R) or (..., M, R) and V likewise, in place of `init`.
        """
        start = self._start(x, w, start)
        options = self.kernel_options
        if options is not None:
            return fk.nmf_factors(x, *start, **options)
        with autocast_disabled(x):
            u, v = self._iterate(x, w, start)
            return u.to(x.dtype), v.to(x.dtype)

    def reconstruct(self, u: Tensor, v: Tensor) -> Tensor:
        """U Vᵀ."""
        return u @ v.mT

    def loss(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None = None) -> Tensor:
        """The relative error ‖x - U Vᵀ‖ / ‖x‖ (Frobenius) of every batch item, of shape (B,).

        Args:
            x: (B, ..., M, N), or (M, N), whose error is a scalar.
            w: weights of the squared errors and of the squares of x, of x's shape.
        """
        dims = tuple(range(min(1, x.ndim - 2), x.ndim))
        weight = 1 if w is None else w
        error = (weight * (x - self.reconstruct(u, v)).square()).sum(dims).sqrt()
        scale = (weight * x.square()).sum(dims).sqrt()
        return error / scale.clamp_min(torch.finfo(x.dtype).tiny)

    def _start(self, x: Tensor, w: Tensor | None, start: Factors | None) -> Factors:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {kind}")
        # Other sizes go only with factors that were made for them.
        free = start is not None or not isinstance(self.init, FixedInit)
        if x.ndim < 2 or (not free and tuple(x.shape[-2:]) != self.size):
            raise ValueError(f"x must be (..., {self.size[0]}, {self.size[1]}), got shape {tuple(x.shape)}")
        if w is not None:
            if not all(solver.weighted for solver in self.solvers):
                raise ValueError(f"w must be None for the solvers {self.solvers}: they know no weights")
            if w.shape != x.shape:
                raise ValueError(f"w must have x's shape {tuple(x.shape)}, got {tuple(w.shape)}")
        return self.init(x) if start is None else start

    def _iterate(self, x: Tensor, w: Tensor | None, start: Factors) -> Factors:
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype)
        w = None if w is None else w.to(dtype)
        u, v = (f.to(dtype).expand(*x.shape[:-2], *f.shape[-2:]) for f in start)
        grad_steps = self.num_iters if self.num_grad_steps is None else self.num_grad_steps
        for step in range(self.num_iters):
            differentiated = step >= self.num_iters - grad_steps
            with torch.set_grad_enabled(torch.is_grad_enabled() and differentiated):
                for solver in self.solvers:
                    u, v = solver(x, u, v, w)
            if self.verbose:
                error = self.loss(x, u, v, w).mean().item()
                print(f"iteration {step + 1}: relative error {error:.6g}")
        return u, v

    def extra_repr(self) -> str:
        return f"size={self.size}, rank={self.rank}, num_iters={self.num_iters}, {self.solvers}"


class NMF(MatrixFactorization):
    """Nonnegative matrix factorisation of every M x N matrix of x (..., M, N).

    Arguments as those of `MatrixFactorization`, with other defaults: the factors start at U[0, 1)
    and are updated by HALS (Factorizer paper, Medical Image Analysis 84, 2023).
    """

    def __init__(
        self,
        size: Sequence[int],
        rank: int | None = None,
        compression: float = 10,
        num_iters: int = 5,
        num_grad_steps: int | None = None,
        init: str | Sequence[str] = "uniform",
        solver: SolverSpec = "hals",
        verbose: bool = False,
    ) -> None:
        super().__init__(size, rank, compression, num_iters, num_grad_steps, init, solver, verbose)


def _keeps(part: Any, kind: type, *methods: str) -> bool:
    """Whether these methods of `part` are those of `kind`, neither overridden nor set on the instance."""
    own, cls = vars(part), type(part)
    return all(name not in own and getattr(cls, name) is getattr(kind, name) for name in methods)


def set_num_iters(module: nn.Module, num_iters: int) -> None:
    """Sets the iterations of every factorisation in `module`; a trained network may run with fewer.

    What a network loses by that `factorizer speed` measures.

    Raises:
        TypeError, ValueError: num_iters is no whole number of at least 0.
    """
    integer("num_iters", num_iters)
    for part in module.modules():
        if isinstance(part, MatrixFactorization):
            part.num_iters = num_iters


def set_rank(module: nn.Module, rank: int, seed: int = 0) -> None:
    """Sets the rank of every factorisation in `module` that starts from fixed factors.

    A lower rank keeps the first columns of u0 and v0; a higher one gets further columns, drawn as the
    others were, with `seed`. The weights know nothing of the rank, so a trained network goes on
    working; it is at its best at the rank that it was trained with.
    """
    integer("rank", rank, 1)
    generator = torch.Generator("cpu").manual_seed(seed)
    for part in module.modules():
        if isinstance(part, MatrixFactorization) and isinstance(part.init, FixedInit):
            for name, draw in zip(("u0", "v0"), part.init.names, strict=True):
                start = getattr(part.init, name)
                with torch.device("cpu"):  # whatever the default is
                    more = DRAWS[draw](start.shape[0], max(rank - part.rank, 0), generator=generator)
                columns = torch.cat([start, more.to(start)], dim=1)[:, :rank]
                setattr(part.init, name, columns.contiguous())
            part.rank = rank
