"""The operators under ``torch.func.vmap``: the mapped dimension joins a batch that the operator has anyway.

A rule takes ``info`` (with the mapped dimension's size), where each argument has that dimension, and the
operator's arguments; it returns the outputs and where these have it. In ``nmf`` it becomes the first leading
dimension; in the windowed operators, whose matrices are numbered by (shift, batch, head), it goes between
shift and batch. A factor's gradient belongs to one element of the mapped dimension, so a factor that has not
got that dimension is expanded where its gradient is wanted.
"""

import torch
from torch import Tensor

_ops = torch.ops.factorizer_kernels


def _mapped_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


# --- nmf: (size, ..., M, N) --------------------------------------------------------------------


def _nmf_factor(factor: Tensor, dim: int | None, size: int, batch_dims: int, expand: bool) -> Tensor:
    """(size, 1.., lead.., extent, R), aligned with ``batch_dims`` leading dimensions of x."""
    if dim is None and not expand:
        return factor
    factor = _mapped_first(factor, dim, size)
    return factor.reshape(size, *(1,) * (batch_dims + 3 - factor.dim()), *factor.shape[1:])


def _nmf_arguments(size, in_dims, x, u0, v0, expand=False):
    x_dim, u_dim, v_dim = in_dims
    x = _mapped_first(x, x_dim, size)
    batch_dims = x.dim() - 3
    u0 = _nmf_factor(u0, u_dim, size, batch_dims, expand)
    v0 = _nmf_factor(v0, v_dim, size, batch_dims, expand)
    return x, u0, v0


def _without(t: Tensor, dim: int | None) -> torch.Size:
    return t.shape if dim is None else t.movedim(dim, 0).shape[1:]


def nmf(info, in_dims, x, u0, v0, *options):
    arguments = _nmf_arguments(info.batch_size, in_dims[:3], x, u0, v0)
    return _ops.nmf.default(*arguments, *options), 0


def nmf_factors(info, in_dims, x, u0, v0, *options):
    arguments = _nmf_arguments(info.batch_size, in_dims[:3], x, u0, v0)
    return _ops.nmf_factors.default(*arguments, *options), (0, 0)


def _nmf_backward(operator, info, in_dims, losses, x, u0, v0, *options):
    size, factor_grads = info.batch_size, options[-2]
    losses = [_mapped_first(t, dim, size) for t, dim in zip(losses, in_dims, strict=False)]
    dims = in_dims[len(losses) : len(losses) + 3]
    arguments = _nmf_arguments(size, dims, x, u0, v0, expand=factor_grads)
    dx, du0, dv0 = operator(*losses, *arguments, *options)
    if not factor_grads:
        return (dx, du0, dv0), (0, None, None)
    du0 = du0.reshape(size, *_without(u0, dims[1]))
    dv0 = dv0.reshape(size, *_without(v0, dims[2]))
    return (dx, du0, dv0), (0, 0, 0)


def nmf_backward(info, in_dims, dy, *arguments):
    return _nmf_backward(_ops.nmf_backward.default, info, in_dims, (dy,), *arguments)


def nmf_factors_backward(info, in_dims, du, dv, *arguments):
    return _nmf_backward(_ops.nmf_factors_backward.default, info, in_dims, (du, dv), *arguments)


# --- Windows: (size · B, C, S1..Sp) and (S · size · B·H, ...) -------------------------------------


def _fold_map(x: Tensor, dim: int | None, size: int) -> Tensor:
    return _mapped_first(x, dim, size).flatten(0, 1)


def _fold_matrices(z: Tensor, copies: int) -> Tensor:
    """(size, S·B·H, ...) -> (S·size·B·H, ...)"""
    return z.unflatten(1, (copies, -1)).transpose(0, 1).flatten(0, 2)


def _unfold_matrices(z: Tensor, copies: int, size: int) -> Tensor:
    """(S·size·B·H, ...) -> (size, S·B·H, ...)"""
    return z.unflatten(0, (copies, size, -1)).transpose(0, 1).flatten(1, 2)


def sw_matricize(info, in_dims, x, head_dim, patch_size, shifts, *options):
    x = _fold_map(x, in_dims[0], info.batch_size)
    z = _ops.sw_matricize.default(x, head_dim, patch_size, shifts, *options)
    return _unfold_matrices(z, len(shifts) // len(patch_size), info.batch_size), 0


def sw_dematricize(info, in_dims, z, size, head_dim, patch_size, shifts, *options):
    z = _fold_matrices(_mapped_first(z, in_dims[0], info.batch_size), len(shifts) // len(patch_size))
    batch, *rest = size
    full = [info.batch_size * batch, *rest]
    x = _ops.sw_dematricize.default(z, full, head_dim, patch_size, shifts, *options)
    return x.unflatten(0, (info.batch_size, batch)), 0


class _WindowFactor:
    """u0 or v0 of ``swin_nmf``, with leading dimensions that broadcast to (S·B·H, G)."""

    def __init__(self, factor: Tensor, dim: int | None, size: int, matrices: int, copies: int, expand: bool):
        self.size, self.copies, self.shape = size, copies, _without(factor, dim)
        self.folded = dim is not None or expand or factor.shape[:-2].numel() > 1
        if self.folded:
            factor = _mapped_first(factor, dim, size)
            lead = (1,) * (5 - factor.dim())
            factor = factor.reshape(size, *lead, *factor.shape[1:])
            factor = _fold_matrices(factor.expand(size, matrices, *factor.shape[2:]), copies)
        self.factor = factor

    def gradient(self, grad: Tensor) -> Tensor:
        """(size, *shape), summed where the factor was broadcast."""
        grad = _unfold_matrices(grad, self.copies, self.size)
        aligned = (1,) * (4 - len(self.shape)) + tuple(self.shape)
        return grad.sum_to_size(self.size, *aligned).reshape(self.size, *self.shape)


def _swin_nmf_arguments(size, in_dims, x, u0, v0, windows, expand=False):
    head_dim, patch_size, shifts = windows
    x = _fold_map(x, in_dims[0], size)
    copies = len(shifts) // len(patch_size)
    matrices = copies * (x.shape[0] // size) * (x.shape[1] // head_dim)
    factors = [
        _WindowFactor(factor, dim, size, matrices, copies, expand)
        for factor, dim in zip((u0, v0), in_dims[1:3], strict=True)
    ]
    return x, *factors


def swin_nmf(info, in_dims, x, u0, v0, head_dim, patch_size, shifts, *options):
    windows = (head_dim, patch_size, shifts)
    x, u0, v0 = _swin_nmf_arguments(info.batch_size, in_dims[:3], x, u0, v0, windows)
    y = _ops.swin_nmf.default(x, u0.factor, v0.factor, *windows, *options)
    return y.unflatten(0, (info.batch_size, -1)), 0


def swin_nmf_backward(info, in_dims, dy, x, u0, v0, head_dim, patch_size, shifts, *options):
    size, factor_grads = info.batch_size, options[-2]
    windows = (head_dim, patch_size, shifts)
    x, u0, v0 = _swin_nmf_arguments(size, in_dims[1:4], x, u0, v0, windows, expand=factor_grads)
    dy = _fold_map(dy, in_dims[0], size)
    dx, du0, dv0 = _ops.swin_nmf_backward.default(dy, x, u0.factor, v0.factor, *windows, *options)
    dx = dx.unflatten(0, (size, -1))
    if not factor_grads:
        return (dx, du0, dv0), (0, None, None)
    return (dx, u0.gradient(du0), v0.gradient(dv0)), (0, 0, 0)
