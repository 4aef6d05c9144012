"""The contract: every operator's schema, its fake, and the table of kernels that implement it.

A kernel is registered for an operator and a backend with :func:`kernel`. The operator's last argument
names the backend, so that a traced graph and a backward pass run where their forward was meant to. Plain
PyTorch (the backend ``reference``) is not in this table: it is differentiable as it stands and never
becomes an opaque operator.

Meanings shared by all the operators: ``patch_size`` has one entry per spatial axis, ``shifts`` is the
row-major flattening of (num_shifts, num_axes), ``grad_steps`` is the number of differentiated iterations
(``grad_steps == num_iters``: all of them, and the gradient reaches u0 and v0), u0 and v0 are in the
arithmetic's dtype (:func:`compute_dtype`). Gradients of u0 and v0 have their shapes, or one empty axis
where ``factor_grads`` is false. Outputs are contiguous. How they behave under ``torch.func.vmap`` is
in ``vmap.py``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from factorizer_kernels.ops.windows.geometry import matricized_shape
from factorizer_kernels.shared import vmap


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on tensors of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Inside, plain PyTorch computes in the dtypes it is given: in a lower one eps would round to zero."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


# Fakes: shapes and dtypes of the outputs, without computing them.


def _like_x(x, *options):
    return x.new_empty(x.shape)


def _nmf_gradients(x, u0, v0, factor_grads):
    if factor_grads:
        return x.new_empty(x.shape), u0.new_empty(u0.shape), v0.new_empty(v0.shape)
    return x.new_empty(x.shape), u0.new_empty((0,)), v0.new_empty((0,))


def _nmf_backward(dy, x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads, backend):
    return _nmf_gradients(x, u0, v0, factor_grads)


def _nmf_factors(x, u0, v0, num_iters, solver, eps, backend):
    *batch, rows, columns = x.shape
    rank = u0.shape[-1]
    return x.new_empty((*batch, rows, rank)), x.new_empty((*batch, columns, rank))


def _nmf_factors_backward(du, dv, x, u0, v0, num_iters, solver, grad_steps, eps, factor_grads, backend):
    return _nmf_gradients(x, u0, v0, factor_grads)


def _sw_matricize(x, head_dim, patch_size, shifts, mean, backend):
    return x.new_empty(matricized_shape(x.shape, head_dim, patch_size, len(shifts)))


def _sw_dematricize(z, size, *options):
    return z.new_empty(size)


def _swin_nmf_backward(
    dy, x, u0, v0, head_dim, patch_size, shifts, relu, num_iters, solver, grad_steps, eps, factor_grads,
    backend,
):  # fmt: skip
    return _nmf_gradients(x, u0, v0, factor_grads)


_NMF = "Tensor x, Tensor u0, Tensor v0"
_WINDOWS = "int head_dim, SymInt[] patch_size, SymInt[] shifts"
_SOLVE = "int num_iters, str solver, float eps, str backend"
_SOLVE_BACKWARD = "int num_iters, str solver, int grad_steps, float eps, bool factor_grads, str backend"
_GRADIENTS = "(Tensor dx, Tensor du0, Tensor dv0)"

# name: (schema, fake, vmap)
OPERATORS: dict[str, tuple[str, Callable, Callable]] = {
    "nmf": (f"({_NMF}, {_SOLVE}) -> Tensor", _like_x, vmap.nmf),
    "nmf_backward": (
        f"(Tensor dy, {_NMF}, {_SOLVE_BACKWARD}) -> {_GRADIENTS}",
        _nmf_backward,
        vmap.nmf_backward,
    ),
    "nmf_factors": (f"({_NMF}, {_SOLVE}) -> (Tensor u, Tensor v)", _nmf_factors, vmap.nmf_factors),
    "nmf_factors_backward": (
        f"(Tensor du, Tensor dv, {_NMF}, {_SOLVE_BACKWARD}) -> {_GRADIENTS}",
        _nmf_factors_backward,
        vmap.nmf_factors_backward,
    ),
    # mean: divide by the number of shifts, on either way; each operator is the other's adjoint.
    "sw_matricize": (
        f"(Tensor x, {_WINDOWS}, bool mean, str backend) -> Tensor",
        _sw_matricize,
        vmap.sw_matricize,
    ),
    "sw_dematricize": (
        f"(Tensor z, SymInt[] size, {_WINDOWS}, bool mean, str backend) -> Tensor",
        _sw_dematricize,
        vmap.sw_dematricize,
    ),
    "swin_nmf": (f"({_NMF}, {_WINDOWS}, bool relu, {_SOLVE}) -> Tensor", _like_x, vmap.swin_nmf),
    "swin_nmf_backward": (
        f"(Tensor dy, {_NMF}, {_WINDOWS}, bool relu, {_SOLVE_BACKWARD}) -> {_GRADIENTS}",
        _swin_nmf_backward,
        vmap.swin_nmf_backward,
    ),
}

_LIBRARY = torch.library.Library("factorizer_kernels", "DEF")
_KERNELS: dict[tuple[str, str], Callable] = {}


class Matrices(NamedTuple):
    """The matrices that an operator factorises, as far as kernels are chosen by them."""

    rows: int
    columns: int
    rank: int
    copies: int


Limit = Callable[[torch.Tensor, Matrices], str | None]
_LIMITS: dict[tuple[str, str], Limit] = {}


def kernel(operator: str, backend: str, limit: Limit | None = None) -> Callable[[Callable], Callable]:
    """Register the decorated function as ``backend``'s implementation of ``operator``.

    It takes the operator's arguments without the last one (the backend's name), in the schema's order.
    ``limit`` says of x and its matrices what the kernel does not serve, or None where it serves them; without
    it the kernel serves all.
    """

    def register(function: Callable) -> Callable:
        _KERNELS[operator, backend] = function
        if limit is not None:
            _LIMITS[operator, backend] = limit
        return function

    return register


def not_served(operator: str, backend: str, x: torch.Tensor, matrices: Matrices | None) -> str | None:
    """Why ``backend`` does not run ``operator`` on x, or None where it does."""
    if (operator, backend) not in _KERNELS:
        return f"it has no {operator}"
    limit = _LIMITS.get((operator, backend))
    return None if limit is None or matrices is None else limit(x, matrices)


def _define(operator: str, schema: str, fake: Callable, vmap: Callable) -> None:
    def run(*args):
        *arguments, backend = args
        return _KERNELS[operator, backend](*arguments)

    _LIBRARY.define(operator + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(operator, run, "CompositeExplicitAutograd")
    name = f"factorizer_kernels::{operator}"
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_vmap(name, vmap, lib=_LIBRARY)


for _operator, _definition in OPERATORS.items():
    _define(_operator, *_definition)
