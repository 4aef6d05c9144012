"""The contract of the operators ``sw_matricize`` and ``sw_dematricize``.

``patch_size`` has one entry per spatial axis; ``shifts`` is the row-major flattening of (num_shifts, axes).
``mean``: divide by the number of shifts, on either way. With equal ``mean`` each operator is the other's
adjoint.
"""

from torch import Tensor

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared import registry
from factorizer_kernels.shared.vmap import joined, mapped_first, parted

WINDOWS = "int head_dim, SymInt[] patch_size, SymInt[] shifts"


def join_matrices(z: Tensor, num_shifts: int) -> Tensor:
    """(size, S·B·H, ...), the mapped dimension first, as (S·size·B·H, ...)."""
    return z.unflatten(1, (num_shifts, -1)).transpose(0, 1).flatten(0, 2)


def part_matrices(z: Tensor, num_shifts: int, size: int) -> Tensor:
    """(S·size·B·H, ...) as (size, S·B·H, ...), the mapped dimension first."""
    return z.unflatten(0, (num_shifts, size, -1)).transpose(0, 1).flatten(1, 2)


def _matricize_fake(x, head_dim, patch_size, shifts, mean, backend):
    return x.new_empty(Windows(x.shape, head_dim, patch_size, shifts).matrices_shape)


def _matricize_vmap(info, in_dims, x, head_dim, patch_size, shifts, mean, backend):
    x = joined(x, in_dims[0], info.batch_size)
    windows = Windows(x.shape, head_dim, patch_size, shifts)
    z = sw_matricize(x, *windows.options, mean, backend)
    return part_matrices(z, windows.num_shifts, info.batch_size), 0


def _dematricize_fake(z, size, head_dim, patch_size, shifts, mean, backend):
    return z.new_empty(size)


def _dematricize_vmap(info, in_dims, z, size, head_dim, patch_size, shifts, mean, backend):
    batch, *rest = size
    windows = Windows((info.batch_size * batch, *rest), head_dim, patch_size, shifts)
    z = join_matrices(mapped_first(z, in_dims[0], info.batch_size), windows.num_shifts)
    return parted(sw_dematricize(z, *windows, mean, backend), info.batch_size), 0


sw_matricize = registry.define(
    "sw_matricize",
    f"(Tensor x, {WINDOWS}, bool mean, str backend) -> Tensor",
    _matricize_fake,
    _matricize_vmap,
)
sw_dematricize = registry.define(
    "sw_dematricize",
    f"(Tensor z, SymInt[] size, {WINDOWS}, bool mean, str backend) -> Tensor",
    _dematricize_fake,
    _dematricize_vmap,
)
