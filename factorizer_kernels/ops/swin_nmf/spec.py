"""The contract of the operator ``swin_nmf`` and of its backward pass.

The windows' options are those of ``ops/windows/spec.py``, the factorisation's those of ``ops/nmf/spec.py``.
"""

from torch import Tensor

from factorizer_kernels.ops.nmf.spec import GRADIENTS, OPTIONS, TENSORS, gradients_fake
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.spec import WINDOWS, join_matrices, part_matrices
from factorizer_kernels.shared.registry import define
from factorizer_kernels.shared.vmap import joined, mapped_first, parted, shape_without


def _fake(x, *others):
    return x.new_empty(x.shape)


def _backward_fake(dy, x, u0, v0, factor_grads, *others):
    return gradients_fake(x, u0, v0, factor_grads)


# The rules for vmap: the mapped dimension joins the batch. The matrices, and with them u0 and v0, are
# numbered by (shift, batch, head), so there it goes between shift and batch.


class _WindowFactor:
    """u0 or v0, whose leading dimensions broadcast to ``batch_shape`` (S·B·H, G) for each mapped element."""

    def __init__(self, factor: Tensor, dim: int | None, size: int, windows: Windows, expand: bool):
        self.size, self.num_shifts, self.shape = size, windows.num_shifts, shape_without(factor, dim)
        if dim is not None or expand or factor.shape[:-2].numel() > 1:
            factor = mapped_first(factor, dim, size)
            factor = factor.reshape(size, *(1,) * (5 - factor.dim()), *factor.shape[1:])
            matrices = windows.batch_shape[0]
            factor = join_matrices(factor.expand(size, matrices, *factor.shape[2:]), self.num_shifts)
        self.factor = factor

    def gradient(self, grad: Tensor) -> Tensor:
        """(size, *shape), summed where the factor was broadcast."""
        grad = part_matrices(grad, self.num_shifts, self.size)
        aligned = (1,) * (4 - len(self.shape)) + tuple(self.shape)
        return grad.sum_to_size(self.size, *aligned).reshape(self.size, *self.shape)


def _joined_arguments(size, in_dims, x, u0, v0, options, expand=False):
    x_dim, u_dim, v_dim = in_dims
    windows = Windows(shape_without(x, x_dim), *options)
    u0 = _WindowFactor(u0, u_dim, size, windows, expand)
    v0 = _WindowFactor(v0, v_dim, size, windows, expand)
    return joined(x, x_dim, size), u0, v0


def _vmap(info, in_dims, x, u0, v0, head_dim, patch_size, shifts, *options):
    size, windows = info.batch_size, (head_dim, patch_size, shifts)
    x, u0, v0 = _joined_arguments(size, in_dims[:3], x, u0, v0, windows)
    return parted(swin_nmf(x, u0.factor, v0.factor, *windows, *options), size), 0


def _backward_vmap(info, in_dims, dy, x, u0, v0, factor_grads, head_dim, patch_size, shifts, *options):
    size, windows = info.batch_size, (head_dim, patch_size, shifts)
    dy_dim, *dims = in_dims[:4]
    x, u0, v0 = _joined_arguments(size, dims, x, u0, v0, windows, expand=factor_grads)
    dy = joined(dy, dy_dim, size)
    dx, du0, dv0 = swin_nmf_backward(dy, x, u0.factor, v0.factor, factor_grads, *windows, *options)
    if not factor_grads:
        return (parted(dx, size), du0, dv0), (0, None, None)
    return (parted(dx, size), u0.gradient(du0), v0.gradient(dv0)), (0, 0, 0)


swin_nmf = define("swin_nmf", f"({TENSORS}, {WINDOWS}, bool relu, {OPTIONS}) -> Tensor", _fake, _vmap)
swin_nmf_backward = define(
    "swin_nmf_backward",
    f"(Tensor dy, {TENSORS}, bool factor_grads, {WINDOWS}, bool relu, {OPTIONS}) -> {GRADIENTS}",
    _backward_fake,
    _backward_vmap,
)
