"""Checks of arguments. Every error names the argument, what it got and what it needs."""

import math
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from factorizer_kernels.shared.dtypes import DTYPES

MAX_INT = 2**63 - 1  # the largest integer that an operator takes

Function = TypeVar("Function", bound=Callable)


def remembered(function: Function) -> Function:
    """A function that is called again and again with the same few values: its results are kept.

    Of tensors it may use dtype, device, shape and layout alone, and it returns none. Values that cannot be
    hashed and symbolic ones (under torch.compile) go through the function each time, and what is wrong does.
    So do lists and tuples that hold anything but integers, None and others like them: in a tuple True
    is 1, and 1.0 is.
    """
    results: dict[tuple, Any] = {}

    @wraps(function)
    def wrapped(*values, **options):
        if torch.compiler.is_compiling():
            return function(*values, **options)
        try:
            key = tuple([v if type(v) in _ATOMS else _key(v) for v in values])
            if options:
                key = (*key, *options, *map(_key, options.values()))
            result = results.get(key, results)
        except (_NotPlain, TypeError):
            return function(*values, **options)
        if result is results:
            result = function(*values, **options)
            if len(results) >= _MOST_RESULTS:
                results.clear()
            results[key] = result
        return result

    return wrapped  # type: ignore[return-value]


_MOST_RESULTS = 256
_ATOMS = frozenset((int, str, type(None), torch.dtype, torch.Size))
_PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))
# To ask these whether they are tensors takes longer than to look them up.
NO_TENSORS = _ATOMS | {bool, float, tuple, list}


class _NotPlain(Exception):
    pass


def _key(value: Any) -> Any:
    """What tells values apart: for one of another type than those of ``_ATOMS`` with its type."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _PLAIN_TENSORS or isinstance(value, Tensor):
        if value.is_nested:  # it has no shape
            raise _NotPlain
        return kind, value.dtype, value.device, value.shape, value.layout
    if kind is list or kind is tuple:
        return tuple([v if v is None or type(v) is int else _item_key(v) for v in value])
    return kind, value


def _item_key(value: Any) -> Any:
    kind = type(value)
    if kind is list or kind is tuple:
        return tuple([v if v is None or type(v) is int else _item_key(v) for v in value])
    raise _NotPlain


def is_integer(value: object) -> bool:
    """Whether value is an integer; symbolic ones (under torch.compile) are, True is not."""
    return isinstance(value, (int, torch.SymInt, np.integer)) and not isinstance(value, bool)


def integer(name: str, value: Any, minimum: int = 0) -> int:
    """``value``, if it is an integer of at least ``minimum`` that fits in 64 bits."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > MAX_INT:
        raise ValueError(f"{name} must fit in 64 bits, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def integers(name: str, values: Any, minimum: int, lengths: Collection[int]) -> tuple[int, ...]:
    """``values`` as a tuple, if it is a sequence of such integers, as many as one of ``lengths``."""
    if isinstance(values, (str, Tensor)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    if len(values) not in lengths:
        wanted = " or ".join(map(str, lengths))
        raise ValueError(f"{name} must have {wanted} entries, got {tuple(values)}")
    return tuple(integer(f"{name}[{i}]", value, minimum) for i, value in enumerate(values))


def number(name: str, value: Any) -> float:
    """``value`` as a float, if it is a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit in 64 bits, got an integer beyond them") from None


def one_of(name: str, value: Any, allowed: tuple) -> Any:
    """``value``, if it is one of ``allowed``."""
    if not isinstance(value, tuple(map(type, allowed))):
        raise TypeError(f"{name} must be one of {allowed}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return value


def _is_wrapped(a: Tensor) -> bool:
    functorch = torch._C._functorch  # the second: of torch.autograd.grad with is_grads_batched
    return functorch.is_functorch_wrapped_tensor(a) or functorch.is_legacy_batchedtensor(a)


def plain(arguments: tuple) -> bool:
    """Whether a call is nothing but a call: not compiled, traced, transformed, watched or of a subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    ):
        return False
    for a in arguments:
        # A view may have the opposite sign of what its memory holds, or be zeros without any memory; and in a
        # backward pass a tensor of a transform may come without the transform.
        kind = type(a)
        if kind in _PLAIN_TENSORS:
            if a.is_neg() or a._is_zerotensor() or _is_wrapped(a):
                return False
        elif kind not in NO_TENSORS and isinstance(a, Tensor):
            return False
    return True


def plain_tensor(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x without a subclass that only adds to the data, such as MONAI's MetaTensor; in ``dtype`` unless None.

    It would run its own functions again at every operation. A subclass with a dispatch of its own, such as a
    tracer's, stays what it is.
    """
    if type(x) not in _PLAIN_TENSORS and (type(x).__torch_dispatch__ is Tensor.__torch_dispatch__):
        x = x.as_subclass(Tensor)
    return x if dtype is None or x.dtype == dtype else x.to(dtype)


def dispatches_itself(x: Tensor) -> bool:
    """Whether x is of a subclass that runs torch's operators its own way and knows no others, as a DTensor.

    Tracers' own do: what they see of an operator is its fake.
    """
    kind = type(x)
    return (
        kind not in _PLAIN_TENSORS
        and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        and not issubclass(kind, (FakeTensor, FunctionalTensor))
    )


def tensor(
    name: str,
    value: object,
    layout: str,
    min_dim: int,
    max_dim: float = math.inf,
    device: torch.device | None = None,
) -> Tensor:
    """``value`` as a plain, dense, floating-point tensor of ``min_dim`` to ``max_dim`` dimensions.

    Args:
        layout: its dimensions, in words.
        device: where it must be: on the device of x, which the error names. None: anywhere.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {value.dtype}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    if not min_dim <= value.dim() <= max_dim:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on the device of x ({device}), got {value.device}")
    return plain_tensor(value)


def check_overwrite(value: object) -> None:
    """Checks the ``overwrite`` of a public function; a tensor that does not fit is no mistake."""
    if not (value is None or isinstance(value, Tensor)):
        raise TypeError(f"overwrite must be a torch.Tensor or None, got {type(value).__name__}")


def feature_map(
    name: str, value: object, channels: int | None = None, spatial_dims: int | None = None
) -> Tensor:
    """``value`` as a plain tensor (B, C, S1..Sp) of ``channels`` channels and p = ``spatial_dims`` axes.

    None allows any number of channels, and p = 1, 2 or 3.
    """
    least, most = (1, 3) if spatial_dims is None else (spatial_dims, spatial_dims)
    axes = "1, 2 or 3" if spatial_dims is None else spatial_dims
    x = tensor(name, value, f"(B, C, S1..Sp) with p = {axes}", least + 2, most + 2)
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels, got {x.shape[1]} (shape {tuple(x.shape)})")
    return x
