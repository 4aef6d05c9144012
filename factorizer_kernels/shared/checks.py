"""Checks of the public functions' arguments: every error names the argument, what it got, what it needs."""

import math

import torch
from torch import Tensor

from factorizer_kernels.ops.windows.geometry import MAX_INT, is_integer
from factorizer_kernels.shared.registry import compute_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SOLVERS = ("mu", "hals")


def tensor(name: str, value: object, layout: str, min_dim: int, max_dim: int | None = None) -> Tensor:
    """``value`` as a dense, floating-point tensor; MONAI's MetaTensor and the like are unwrapped."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    if value.dim() < min_dim or (max_dim is not None and value.dim() > max_dim):
        raise ValueError(f"{name} must be {layout}, got shape {tuple(value.shape)}")
    # A subclass of functions only (MetaTensor) would run them again on its way through the operator.
    only_functions = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
    plain = type(value) in (Tensor, torch.nn.Parameter)
    return value if plain or not only_functions else value.as_subclass(Tensor)


def same_device(x: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != x.device:
            raise ValueError(f"{name} must be on the device of x ({x.device}), got {other.device}")


def factors(x: Tensor, u0: object, v0: object, rows, columns, batch) -> tuple[Tensor, Tensor]:
    """u0 (..., M, R) and v0 (..., N, R) for M x N matrices of leading dimensions ``batch``, converted."""
    u0 = tensor("u0", u0, "(M, R) or (..., M, R)", 2)
    v0 = tensor("v0", v0, "(N, R) or (..., N, R)", 2)
    same_device(x, u0=u0, v0=v0)
    for name, factor, extent, meaning in (("u0", u0, rows, "rows"), ("v0", v0, columns, "columns")):
        if factor.shape[-2] != extent:
            raise ValueError(
                f"{name} must have {extent} rows, one for each of the {meaning} of the matrices, "
                f"got shape {tuple(factor.shape)}"
            )
        if not _broadcasts(factor.shape[:-2], batch):
            raise ValueError(
                f"{name}'s leading dimensions must broadcast to {tuple(batch)}, "
                f"got shape {tuple(factor.shape)}"
            )
    if u0.shape[-1] != v0.shape[-1]:
        raise ValueError(
            f"u0 and v0 must have the same rank (last dimension), got {u0.shape[-1]} and {v0.shape[-1]}"
        )
    if u0.shape[-1] < 1:
        raise ValueError("u0 and v0 must have a rank (last dimension) of at least 1, got 0")
    dtype = compute_dtype(x.dtype)
    return u0.to(dtype), v0.to(dtype)


def solver_options(x: Tensor, num_iters, solver, num_grad_steps, eps) -> tuple[int, str, int, float]:
    """(num_iters, solver, grad_steps, eps), with grad_steps clipped to num_iters."""
    num_iters = _count("num_iters", num_iters)
    grad_steps = num_iters
    if num_grad_steps is not None:
        grad_steps = min(_count("num_grad_steps", num_grad_steps), num_iters)
    if not isinstance(solver, str):
        raise TypeError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    smallest = torch.finfo(compute_dtype(x.dtype)).tiny
    if not smallest <= eps < math.inf:
        raise ValueError(
            f"eps must be finite and at least {smallest:.3g}, the smallest normal number of the arithmetic "
            f"({compute_dtype(x.dtype)}), got {eps!r}"
        )
    return num_iters, solver, grad_steps, float(eps)


def _count(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
    if value > MAX_INT:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return value


def _broadcasts(shape, target) -> bool:
    if len(shape) > len(target):
        return False
    tail = target[len(target) - len(shape) :]
    return all(own == 1 or own == other for own, other in zip(shape, tail, strict=True))


def size(name: str, value) -> tuple[int, ...]:
    """A full size (B, C, S1..Sp) as a tuple."""
    if isinstance(value, (str, Tensor)) or not hasattr(value, "__len__"):
        raise TypeError(f"{name} must be a sequence of integers (B, C, S1..Sp), got {value!r}")
    for extent in value:
        if not is_integer(extent):
            raise TypeError(f"{name} must hold integers, got {extent!r}")
        if extent < 0:
            raise ValueError(f"{name} must not hold negative numbers, got {tuple(value)}")
    if not 3 <= len(value) <= 5:
        raise ValueError(f"{name} must be (B, C, S1..Sp) with p = 1, 2 or 3, got {tuple(value)}")
    return tuple(value)
