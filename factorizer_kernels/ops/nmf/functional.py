"""The public functions ``nmf`` and ``nmf_factors``."""

from torch import Tensor

from factorizer_kernels.choice import choose
from factorizer_kernels.ops.nmf import cpu, cuda, reference  # noqa: F401  (cpu and cuda register kernels)
from factorizer_kernels.ops.nmf.autograd import NMF, NMFFactors
from factorizer_kernels.shared import checks
from factorizer_kernels.shared.autograd import apply
from factorizer_kernels.shared.registry import Matrices


def nmf(
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    *,
    num_iters: int = 5,
    solver: str = "hals",
    num_grad_steps: int | None = None,
    eps: float = 1e-16,
) -> Tensor:
    """Low-rank nonnegative approximation of a batch of matrices: U Vᵀ after a few updates of U and V.

    Args:
        x: (..., M, N), float32, float64, bfloat16 or float16. MU takes x >= 0 (not checked element by
            element); HALS takes any real x.
        u0: (M, R), shared by all the matrices, or (..., M, R) broadcast against x. Nonnegative.
        v0: (N, R) or (..., N, R), likewise.
        num_iters: iterations, each updating U first, then V. 0 returns u0 v0ᵀ.
        solver: "mu", multiplicative updates (Lee and Seung, 2001), or "hals", hierarchical alternating
            least squares (Cichocki et al., 2007).
        num_grad_steps: only the last so many iterations are differentiated, the factors before them are
            constants; None, or num_iters and more: all of them, and u0 and v0 get gradients too.
        eps: guards the divisions, in the arithmetic's precision.

    Returns:
        (..., M, N) in x's dtype; the arithmetic is float32, or float64 for float64.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or options do not fit; the message names the argument.
    """
    return _run("nmf", x, u0, v0, num_iters, solver, num_grad_steps, eps)


def nmf_factors(
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    *,
    num_iters: int = 5,
    solver: str = "hals",
    num_grad_steps: int | None = None,
    eps: float = 1e-16,
) -> tuple[Tensor, Tensor]:
    """The factors themselves: U (..., M, R) and V (..., N, R), in x's dtype. Arguments as of :func:`nmf`."""
    return _run("nmf_factors", x, u0, v0, num_iters, solver, num_grad_steps, eps)


_FUNCTIONS = {
    "nmf": (reference.nmf, NMF),
    "nmf_factors": (reference.nmf_factors, NMFFactors),
}


def _run(operator, x, u0, v0, num_iters, solver, num_grad_steps, eps):
    x = checks.tensor("x", x, "(..., M, N)", 2)
    *batch, rows, columns = x.shape
    u0, v0 = checks.factors(x, u0, v0, rows, columns, batch)
    options = checks.solver_options(x, num_iters, solver, num_grad_steps, eps)
    plain, fused = _FUNCTIONS[operator]
    backend = choose(operator, x, Matrices(rows, columns, u0.shape[-1], 1))
    if backend == "reference":
        return plain(x, u0, v0, *options)
    return apply(fused, x, u0, v0, *options, backend)
