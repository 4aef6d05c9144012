"""The public function ``swin_nmf``."""

from collections.abc import Sequence

from torch import Tensor

from factorizer_kernels.choice import choose, load_kernels
from factorizer_kernels.ops.nmf.arguments import check_factorisation
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.ops.swin_nmf import reference
from factorizer_kernels.ops.swin_nmf.autograd import SwinNMF
from factorizer_kernels.ops.windows.geometry import Shift, resolve
from factorizer_kernels.shared.autograd import call_function
from factorizer_kernels.shared.checks import feature_map, one_of

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
) -> Tensor:
    """Replace every (shifted) window of a feature map by its low-rank NMF (Factorizer paper, section 3).

    The same as act -> :func:`sw_matricize` -> :func:`nmf` -> :func:`sw_dematricize`, without any of the
    intermediates in memory: autograd keeps x, u0 and v0.

    Args:
        x: (B, C, S1..Sp), p = 1, 2 or 3; float32, float64, bfloat16 or float16.
        u0: (head_dim, R), or with leading dimensions that broadcast to (S·B·H, G1···Gp). Nonnegative.
            Converted to the arithmetic's dtype: float32, or float64 where x is. A gradient
            reaches it only where all the iterations are differentiated.
        v0: (P1···Pp, R), likewise.
        num_heads, head_dim, grid_size, patch_size, shifts: the windows, see :func:`sw_matricize`.
        act: "relu", or None for none.
        num_iters, solver, num_grad_steps, eps: the factorisation, see :func:`nmf`.

    Returns:
        (B, C, S1..Sp) in x's dtype: the mean over the shifts.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
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
    u0, v0, options = check_factorisation(
        x, u0, v0, windows.matrices_shape, num_iters, solver, num_grad_steps, eps
    )
    sizes = MatrixSizes(windows.rows, windows.columns, u0.shape[-1], windows.num_shifts)
    backend = choose("swin_nmf", x, sizes)
    if backend == "reference":
        return reference.swin_nmf(x, u0, v0, windows, relu, options)
    return call_function("swin_nmf", SwinNMF, x, u0, v0, windows, relu, options, backend)
