"""The contract of the operators ``nmf`` and ``nmf_factors`` and of their backward passes.

u0 and v0 are in the arithmetic's dtype. The options are those of `Options`, in its order. A backward
pass returns gradients of u0 and v0 in their shapes, or, where ``factor_grads`` is false, with one empty axis.
"""

from typing import NamedTuple

from torch import Tensor

from factorizer_kernels.shared.registry import define
from factorizer_kernels.shared.vmap import mapped_first, shape_without

TENSORS = "Tensor x, Tensor u0, Tensor v0"
OPTIONS = "int num_iters, str solver, int grad_steps, float eps, str backend"
GRADIENTS = "(Tensor dx, Tensor du0, Tensor dv0)"


class MatrixSizes(NamedTuple):
    """What kernels that factorise are asked about, beside x: see ``registry.kernel``."""

    rows: int
    columns: int
    rank: int
    num_shifts: int
    num_iters: int
    solver: str


def _nmf_fake(x, *others):
    return x.new_empty(x.shape)


def _factors_fake(x, u0, *others):
    *batch, rows, columns = x.shape
    rank = u0.shape[-1]
    return x.new_empty((*batch, rows, rank)), x.new_empty((*batch, columns, rank))


def gradients_fake(x, u0, v0, factor_grads):
    if factor_grads:
        return x.new_empty(x.shape), u0.new_empty(u0.shape), v0.new_empty(v0.shape)
    return x.new_empty(x.shape), u0.new_empty((0,)), v0.new_empty((0,))


def _nmf_backward_fake(dy, x, u0, v0, factor_grads, *options):
    return gradients_fake(x, u0, v0, factor_grads)


def _factors_backward_fake(du, dv, x, u0, v0, factor_grads, *options):
    return gradients_fake(x, u0, v0, factor_grads)


# The rules for vmap: the mapped dimension becomes the first of the leading ones, (size, ..., M, N). Each
# element of the mapped dimension has a gradient of the factors: where it is wanted, the factors are expanded.


def _aligned(factor: Tensor, dim: int | None, size: int, batch_dims: int, expand: bool) -> Tensor:
    """(size, 1.., lead.., extent, R), aligned with ``batch_dims`` leading dimensions of x."""
    if dim is None and not expand:
        return factor
    factor = mapped_first(factor, dim, size)
    return factor.reshape(size, *(1,) * (batch_dims + 3 - factor.dim()), *factor.shape[1:])


def _aligned_arguments(size, in_dims, x, u0, v0, expand=False):
    x_dim, u_dim, v_dim = in_dims
    x = mapped_first(x, x_dim, size)
    batch_dims = x.dim() - 3
    u0 = _aligned(u0, u_dim, size, batch_dims, expand)
    v0 = _aligned(v0, v_dim, size, batch_dims, expand)
    return x, u0, v0


def _nmf_vmap(info, in_dims, x, u0, v0, *options):
    return nmf(*_aligned_arguments(info.batch_size, in_dims[:3], x, u0, v0), *options), 0


def _factors_vmap(info, in_dims, x, u0, v0, *options):
    return nmf_factors(*_aligned_arguments(info.batch_size, in_dims[:3], x, u0, v0), *options), (0, 0)


def _backward_vmap(operator, info, in_dims, grads, x, u0, v0, factor_grads, *options):
    size = info.batch_size
    grads = [mapped_first(grad, dim, size) for grad, dim in zip(grads, in_dims, strict=False)]
    dims = in_dims[len(grads) : len(grads) + 3]
    arguments = _aligned_arguments(size, dims, x, u0, v0, expand=factor_grads)
    dx, du0, dv0 = operator(*grads, *arguments, factor_grads, *options)
    if not factor_grads:
        return (dx, du0, dv0), (0, None, None)
    _, u_dim, v_dim = dims
    du0 = du0.reshape(size, *shape_without(u0, u_dim))
    dv0 = dv0.reshape(size, *shape_without(v0, v_dim))
    return (dx, du0, dv0), (0, 0, 0)


def _nmf_backward_vmap(info, in_dims, dy, *arguments):
    return _backward_vmap(nmf_backward, info, in_dims, (dy,), *arguments)


def _factors_backward_vmap(info, in_dims, du, dv, *arguments):
    return _backward_vmap(nmf_factors_backward, info, in_dims, (du, dv), *arguments)


nmf = define("nmf", f"({TENSORS}, {OPTIONS}) -> Tensor", _nmf_fake, _nmf_vmap)
nmf_backward = define(
    "nmf_backward",
    f"(Tensor dy, {TENSORS}, bool factor_grads, {OPTIONS}) -> {GRADIENTS}",
    _nmf_backward_fake,
    _nmf_backward_vmap,
)
nmf_factors = define(
    "nmf_factors",
    f"({TENSORS}, {OPTIONS}) -> (Tensor u, Tensor v)",
    _factors_fake,
    _factors_vmap,
)
nmf_factors_backward = define(
    "nmf_factors_backward",
    f"(Tensor du, Tensor dv, {TENSORS}, bool factor_grads, {OPTIONS}) -> {GRADIENTS}",
    _factors_backward_fake,
    _factors_backward_vmap,
)
