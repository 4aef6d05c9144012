"""The public functions ``nmf`` and ``nmf_factors``."""

from torch import Tensor

from factorizer_kernels.choice import choose, load_kernels
from factorizer_kernels.ops.nmf import reference
from factorizer_kernels.ops.nmf.arguments import Options, check_factorisation, first_factors
from factorizer_kernels.ops.nmf.autograd import NMF, NMFFactors
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.shared.autograd import call_function
from factorizer_kernels.shared.checks import plain_tensor, remembered, tensor

load_kernels(__package__)


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
    options, sizes = _checked(x, u0, v0, num_iters, solver, num_grad_steps, eps)
    x = plain_tensor(x).detach() if options.constant else plain_tensor(x)
    u0, v0 = first_factors(x, u0, v0, options)
    backend = choose("nmf", x, sizes)
    if backend == "reference":
        return reference.nmf(x, u0, v0, options)
    return call_function("nmf", NMF, x, u0, v0, options, backend)


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
    """The factors themselves: U (..., M, R) and V (..., N, R), in x's dtype. The arguments of `nmf`."""
    options, sizes = _checked(x, u0, v0, num_iters, solver, num_grad_steps, eps)
    x = plain_tensor(x).detach() if options.constant else plain_tensor(x)
    u0, v0 = first_factors(x, u0, v0, options)
    backend = choose("nmf_factors", x, sizes)
    if backend == "reference":
        return reference.nmf_factors(x, u0, v0, options)
    return call_function("nmf_factors", NMFFactors, x, u0, v0, options, backend)


@remembered
def _checked(x, u0, v0, num_iters, solver, num_grad_steps, eps) -> tuple[Options, MatrixSizes]:
    x = tensor("x", x, "(..., M, N)", 2)
    options = check_factorisation(x, u0, v0, x.shape, num_iters, solver, num_grad_steps, eps)
    rows, columns = x.shape[-2:]
    return options, MatrixSizes(rows, columns, u0.shape[-1], 1, options.num_iters, options.solver)
