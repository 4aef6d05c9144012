"""The updates of a matrix factorisation X ≈ U Vᵀ.

X is (..., M, N), U (..., M, R), V (..., N, R). A solver's one iteration updates U for fixed V, then
V for fixed U; the same formula serves both, with Xᵀ for X and the factors exchanged. The formulas
below are those for U, with A = X V and B = Vᵀ V.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.reference import hals_update, mu_update
from factorizer_kernels.shared.checks import integer, number


class Solver:
    """One iteration of a factorisation.

    Args:
        factor: which factors are updated, in this order: 0 for U, 1 for V.
        eps: guards the divisions.
    """

    #: The name under which `factorizer_kernels.nmf` knows the solver, where it does.
    kernel: ClassVar[str | None] = None
    #: Whether the solver minimises a weighted error, and wants the weights.
    weighted: ClassVar[bool] = False

    def __init__(self, factor: int | Sequence[int] = (0, 1), eps: float = 1e-16) -> None:
        self.factor = (factor,) if isinstance(factor, int) else tuple(factor)
        if not self.factor or any(f not in (0, 1) for f in self.factor):
            raise ValueError(f"factor must be 0, 1 or a sequence of them, got {factor!r}")
        if not number("eps", eps) > 0:
            raise ValueError(f"eps must be positive, got {eps!r}")
        self.eps = eps

    def __call__(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> tuple[Tensor, Tensor]:
        for factor in self.factor:
            if factor == 0:
                u = self.update(x, u, v, w)
            else:
                v = self.update(x.mT, v, u, None if w is None else w.mT)
        return u, v

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        """The new U."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(factor={self.factor}, eps={self.eps:g})"


class LeastSquares(Solver):
    """Alternating least squares: U ← A B⁻¹, the minimum over all real U.

    The unconstrained step of ALS in Berry et al., Computational Statistics & Data Analysis 52,
    2007. B gets a ridge of the order of its rounding error, so that a rank-deficient V does not
    break the solution.
    """

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        gram = v.mT @ v
        rank = gram.shape[-1]
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
        ridge = 10 * torch.finfo(gram.dtype).eps * trace + self.eps
        gram = gram + ridge[..., None, None] * torch.eye(rank, dtype=gram.dtype, device=gram.device)
        return torch.linalg.solve_ex(gram, x @ v, left=False).result


class ProjectedLeastSquares(LeastSquares):
    """Projected alternating least squares: U ← max(0, A B⁻¹).

    Berry et al., Computational Statistics & Data Analysis 52, 2007. An approximation of the
    nonnegative least-squares solution: the error may rise.
    """

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        return super().update(x, u, v, w).relu()


class CoordinateDescent(Solver):
    """Coordinate descent, column by column, for real factors.

    U_r ← (A_r - Σ_{j≠r} U_j B_jr + ε) / (B_rr + ε): HALS (Cichocki and Phan, IEICE Transactions
    E92-A, 2009) without the projection.
    """

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        a, b = x @ v, v.mT @ v
        columns = list(u.unbind(-1))
        for r in range(len(columns)):
            numerator = a[..., r] + self.eps
            for j in range(len(columns)):
                if j != r:
                    numerator = numerator - columns[j] * b[..., j, r, None]
            columns[r] = numerator / (b[..., r, r, None] + self.eps)
        return torch.stack(columns, -1)


class HALS(Solver):
    """Hierarchical alternating least squares: coordinate descent with the projection max(0, ·).

    Cichocki and Phan, Fast local algorithms for large scale nonnegative matrix and tensor
    factorizations, IEICE Transactions E92-A, 2009.
    """

    kernel = "hals"

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        return hals_update(u, x @ v, v.mT @ v, self.eps)


class MultiplicativeUpdate(Solver):
    """Multiplicative update, U ← U ∘ A / (U B + ε), for X ≥ 0.

    Lee and Seung, Advances in Neural Information Processing Systems 13, 2001, theorem 1. ε stands
    below the fraction line only: zero stays zero.
    """

    kernel = "mu"

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        return mu_update(u, x @ v, v.mT @ v, self.eps)


class PublishedMultiplicativeUpdate(Solver):
    """Multiplicative update with ε above the fraction line too, U ← (U ∘ A + ε) / (U B + ε), for X ≥ 0.

    As the published code has it: a factor that is zero, of a column of zeros, jumps to 1. For state dicts
    that were trained so; where no column is zero `MultiplicativeUpdate` gives the same, and faster.
    """

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        return (u * (x @ v) + self.eps) / (u @ (v.mT @ v) + self.eps)


class FastMultiplicativeUpdate(Solver):
    """Accelerated multiplicative update: several updates of U for one A and B, for X ≥ 0.

    Gillis and Glineur, Neural Computation 24, 2012, with a fixed number of inner updates in place
    of their stopping rule: A and B are the costly part.

    Args:
        num_inner: inner updates.
    """

    def __init__(self, factor: int | Sequence[int] = (0, 1), eps: float = 1e-16, num_inner: int = 3) -> None:
        super().__init__(factor, eps)
        self.num_inner = integer("num_inner", num_inner, 1)

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        a, b = x @ v, v.mT @ v
        for _ in range(self.num_inner):
            u = mu_update(u, a, b, self.eps)
        return u


class WeightedMultiplicativeUpdate(Solver):
    """Weighted multiplicative update, U ← U ∘ ((W∘X) V) / ((W∘(U Vᵀ)) V + ε), for X, W ≥ 0.

    Blondel, Ho and Van Dooren, Weighted nonnegative matrix factorization and face feature
    extraction, 2008. Minimises Σ W∘(X - U Vᵀ)²; without weights it is MU.
    """

    weighted = True

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        if w is None:
            return mu_update(u, x @ v, v.mT @ v, self.eps)
        return u * ((w * x) @ v) / ((w * (u @ v.mT)) @ v + self.eps)


class SemiMultiplicativeUpdate(Solver):
    """Multiplicative update for X of any sign: U ≥ 0 stays so, whatever the signs of X and V.

    U ← U ∘ sqrt((A⁺ + U B⁻) / (A⁻ + U B⁺ + ε)), with A⁺ and A⁻ the positive and negative parts:
    Ding, Li and Jordan, IEEE Transactions on Pattern Analysis and Machine Intelligence 32, 2010,
    semi-NMF. With both factors updated so, both are nonnegative; ("ls-0", "smu-1")
    is that article's semi-NMF.
    """

    def update(self, x: Tensor, u: Tensor, v: Tensor, w: Tensor | None) -> Tensor:
        a, b = x @ v, v.mT @ v
        numerator = a.relu() + u @ (-b).relu()
        denominator = (-a).relu() + u @ b.relu() + self.eps
        # The root's slope at zero is infinite: entries that become zero are kept out of it.
        ratio = numerator / denominator
        positive = ratio > 0
        return u * torch.where(positive, torch.where(positive, ratio, 1).sqrt(), 0)


SOLVERS: dict[str, type[Solver]] = {
    "ls": LeastSquares,
    "nnls": ProjectedLeastSquares,
    "cd": CoordinateDescent,
    "hals": HALS,
    "nncd": HALS,
    "mu": MultiplicativeUpdate,
    "pmu": PublishedMultiplicativeUpdate,
    "fmu": FastMultiplicativeUpdate,
    "wmu": WeightedMultiplicativeUpdate,
    "smu": SemiMultiplicativeUpdate,
}

#: A name, a class, a pair (class, keywords), or a sequence of these that run in turn.
SolverSpec = str | Callable[..., Solver] | Sequence[Any]


def make_solvers(solver: SolverSpec) -> list[Solver]:
    """The solvers that one iteration runs in turn.

    Args:
        solver: one of `SOLVERS`, with "-0" or "-1" after it to update U or V alone; a `Solver`
            class; a pair (class, keywords); or a sequence of these.

    Raises:
        TypeError, ValueError: solver is none of these; or see the solver's class.
    """
    if isinstance(solver, str):
        name, _, factor = solver.partition("-")
        if name not in SOLVERS or factor not in ("", "0", "1") or solver.endswith("-"):
            raise ValueError(
                f"solver must be one of {', '.join(SOLVERS)}, with '-0' or '-1' after it to update "
                f"U or V alone, got {solver!r}"
            )
        return [SOLVERS[name](int(factor)) if factor else SOLVERS[name]()]
    if callable(solver):
        return [solver()]
    if isinstance(solver, Sequence) and solver:
        if len(solver) == 2 and callable(solver[0]) and isinstance(solver[1], Mapping):
            return [solver[0](**solver[1])]
        return [one for entry in solver for one in make_solvers(entry)]
    raise TypeError(
        f"solver must be a name, a class, a pair (class, keywords) or a sequence of these, got {solver!r}"
    )
