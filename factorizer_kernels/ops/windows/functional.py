"""The public functions ``sw_matricize`` and ``sw_dematricize``."""

from collections.abc import Sequence

from torch import Tensor

from factorizer_kernels.choice import choose, load_kernels
from factorizer_kernels.ops.windows import reference
from factorizer_kernels.ops.windows.autograd import SWDematricize, SWMatricize
from factorizer_kernels.ops.windows.geometry import Shift, map_size, resolve
from factorizer_kernels.shared import checks
from factorizer_kernels.shared.autograd import call_function

load_kernels(__package__)


def sw_matricize(
    x: Tensor,
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    grid_size: int | Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
    shifts: Sequence[Shift] | None = None,
) -> Tensor:
    """Cut a feature map into (shifted) windows, each a head_dim x voxels matrix (Factorizer, section 3).

    Args:
        x: (B, C, S1..Sp), p = 1, 2 or 3; float32, float64, bfloat16 or float16.
        num_heads, head_dim: exactly one of them; C splits as (heads, head_dim), head_dim fastest.
        grid_size, patch_size: exactly one of them, an int or one int per spatial axis; each Si splits as
            (grid, patch), patch fastest.
        shifts: one copy per entry: None (no shift), an int for all axes, or one int per axis. A shift of
            s rolls x cyclically by +s before the cut. None alone: a single unshifted copy.

    Returns:
        (S·B·H, G1···Gp, head_dim, P1···Pp), shifts outermost, then batch, then heads; x's dtype.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    x = checks.feature_map("x", x)
    windows = resolve(
        x.shape,
        num_heads=num_heads,
        head_dim=head_dim,
        grid_size=grid_size,
        patch_size=patch_size,
        shifts=shifts,
    )
    backend = choose("sw_matricize", x)
    if backend == "reference":
        return reference.sw_matricize(x, windows)
    return call_function("sw_matricize", SWMatricize, x, windows, False, backend)


def sw_dematricize(
    z: Tensor,
    size: Sequence[int],
    *,
    num_heads: int | None = None,
    head_dim: int | None = None,
    grid_size: int | Sequence[int] | None = None,
    patch_size: int | Sequence[int] | None = None,
    shifts: Sequence[Shift] | None = None,
) -> Tensor:
    """Put (shifted) windows back together: cut back, roll back, average over the shifts.

    Args:
        z: (S·B·H, G1···Gp, head_dim, P1···Pp), as `sw_matricize` returns it.
        size: the full (B, C, S1..Sp) of the result. The other options are those of `sw_matricize`.

    Returns:
        (B, C, S1..Sp) in z's dtype.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """
    z = checks.tensor("z", z, "(S·B·H, G1···Gp, head_dim, P1···Pp)", 4, 4)
    size = map_size("size", size)
    windows = resolve(
        size,
        num_heads=num_heads,
        head_dim=head_dim,
        grid_size=grid_size,
        patch_size=patch_size,
        shifts=shifts,
    )
    if tuple(z.shape) != windows.matrices_shape:
        raise ValueError(
            f"z must have shape {windows.matrices_shape} for size {size} and these options, "
            f"got {tuple(z.shape)}"
        )
    backend = choose("sw_dematricize", z)
    if backend == "reference":
        return reference.sw_dematricize(z, windows)
    return call_function("sw_dematricize", SWDematricize, z, windows, True, backend)
