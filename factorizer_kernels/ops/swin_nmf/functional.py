"""The public functions ``swin_nmf``, and ``norm_linear_swin_nmf``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from factorizer_kernels.choice import choose, load_kernels
from factorizer_kernels.ops.nmf.arguments import Options, check_factorisation, first_factors
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.ops.pointwise.functional import norm_linear, norm_linear_arguments
from factorizer_kernels.ops.swin_nmf import reference, spec
from factorizer_kernels.ops.swin_nmf.autograd import NormLinearSwinNMF, SwinNMF
from factorizer_kernels.ops.swin_nmf.autograd import norm_linear_swin_nmf as run_both
from factorizer_kernels.ops.windows.geometry import Shift, Windows, resolve
from factorizer_kernels.shared.autograd import call_function, differentiated, over
from factorizer_kernels.shared.checks import check_overwrite, feature_map, one_of, plain_tensor, remembered

load_kernels(__package__)


def swin_nmf(
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    grid_size: int | Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
    shifts: Sequence[Shift] | None = None,
    act: str | None = "relu",
    num_iters: int = 5,
    solver: str = "hals",
    num_grad_steps: int | None = None,
    eps: float = 1e-16,
    overwrite: Tensor | None = None,
) -> Tensor:
    """Replace every (shifted) window of a feature map by its low-rank NMF (Factorizer paper, section 3).

    The same as act -> `sw_matricize` -> `nmf` -> `sw_dematricize`, without any of the
    intermediates in memory: autograd keeps x, u0 and v0.

    Args:
        x: (B, C, S1..Sp), p = 1, 2 or 3; float32, float64, bfloat16 or float16.
        u0: (head_dim, R), or with leading dimensions that broadcast to (S·B·H, G1···Gp). Nonnegative.
            Converted to the arithmetic's dtype: float32, or float64 where x is. A gradient
            reaches it only where all the iterations are differentiated.
        v0: (P1···Pp, R), likewise.
        num_heads, head_dim, grid_size, patch_size, shifts: the windows, see `sw_matricize`.
        act: "relu", or None for none.
        num_iters, solver, num_grad_steps, eps: the factorisation, see `nmf`.
        overwrite: a map that is not read afterwards, such as x: its memory may be used for the result. It is
            where it fits and nothing is differentiated, compiled or recorded.

    Returns:
        (B, C, S1..Sp) in x's dtype, the mean over the shifts.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    check_overwrite(overwrite)
    arguments = _resolved(
        x, u0, v0, num_heads=num_heads, head_dim=head_dim, grid_size=grid_size, patch_size=patch_size,
        shifts=shifts, act=act, num_iters=num_iters, solver=solver, num_grad_steps=num_grad_steps, eps=eps,
    )  # fmt: skip
    x = plain_tensor(x).detach() if arguments.options.constant else plain_tensor(x)
    if arguments.backend == "reference":
        return reference.swin_nmf(x, *arguments[:-1])
    if overwrite is not None and not differentiated((x, *arguments)):
        u0, v0, windows, relu, solution, backend = arguments
        flat = (x, u0, v0, *windows.options, relu, *solution, backend)
        return over(overwrite, "swin_nmf", spec.swin_nmf, *flat)
    return call_function("swin_nmf", SwinNMF, x, *arguments)


def norm_linear_swin_nmf(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    u0: Tensor,
    v0: Tensor,
    *,
    norm_eps: float = 1e-5,
    overwrite: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`norm_linear`, then `swin_nmf`, where autograd does not keep the map between the two.

    The first half of a Factorizer's block. The backward computes the map between again, for one pass over x;
    the residual connection's gradient is added on the way.

    Args:
        x: (B, C, S1..Sp), as for `swin_nmf`.
        norm_weight, norm_bias, weight, bias: of `norm_linear`; W (D, C).
        u0, v0: of `swin_nmf`, on a map of D channels.
        norm_eps: added to the variance.
        overwrite: a map that is not read afterwards, and is not x: its memory may be used for the result. It
            is where it fits and nothing is differentiated, compiled or recorded.
        options: the others of `swin_nmf`.

    Returns:
        The factorised map (B, D, S1..Sp) in x's dtype, or under autocast in autocast's; and x, for the
        residual connection: where that one is used in place of x, the backward adds its gradient to x's.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    x = feature_map("x", x)
    check_overwrite(overwrite)
    chain = norm_linear_arguments(x, norm_weight, norm_bias, weight, bias, norm_eps)
    between = x.new_empty((), dtype=chain.dtype).expand(x.shape[0], chain.weight.shape[0], *x.shape[2:])
    arguments = _resolved(between, u0, v0, **options)
    if "reference" in (chain.backend, arguments.backend) or arguments.options.constant:
        y, x = norm_linear(x, norm_weight, norm_bias, weight, bias, eps=norm_eps, residual=True)
        return swin_nmf(y, u0, v0, **options), x
    if overwrite is not None and not differentiated((x, *chain, *arguments)):
        return run_both(x, *chain, *arguments, overwrite=overwrite), x
    return call_function("norm_linear_swin_nmf", NormLinearSwinNMF, x, *chain, *arguments)


class _Arguments(NamedTuple):
    u0: Tensor
    v0: Tensor
    windows: Windows
    relu: bool
    options: Options
    backend: str


def _resolved(
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    grid_size: int | Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
    shifts: Sequence[Shift] | None = None,
    act: str | None = "relu",
    num_iters: int = 5,
    solver: str = "hals",
    num_grad_steps: int | None = None,
    eps: float = 1e-16,
) -> _Arguments:
    """The arguments of `swin_nmf`, checked and completed, for a map like x."""
    windows, relu, options, sizes = _checked(
        x, u0, v0, num_heads, head_dim, grid_size, patch_size, shifts, act, num_iters, solver, num_grad_steps,
        eps,
    )  # fmt: skip
    u0, v0 = first_factors(x, u0, v0, options)
    return _Arguments(u0, v0, windows, relu, options, choose("swin_nmf", x, sizes))


@remembered
def _checked(
    x, u0, v0, num_heads, head_dim, grid_size, patch_size, shifts, act, num_iters, solver, num_grad_steps, eps
) -> tuple[Windows, bool, Options, MatrixSizes]:
    x = feature_map("x", x)
    windows = resolve(
        x.shape,
        num_heads=num_heads,
        head_dim=head_dim,
        grid_size=grid_size,
        patch_size=patch_size,
        shifts=shifts,
    )
    relu = one_of("act", act, ("relu", None)) == "relu"
    options = check_factorisation(x, u0, v0, windows.matrices_shape, num_iters, solver, num_grad_steps, eps)
    sizes = MatrixSizes(
        windows.rows, windows.columns, u0.shape[-1], windows.num_shifts, options.num_iters, options.solver
    )
    return windows, relu, options, sizes
