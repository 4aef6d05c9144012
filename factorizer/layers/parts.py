"""Exchangeable parts: how a network is told which class to build, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

#: A class, or a pair (class, keywords) or (class, positional arguments). A pair may be a list, as
#: configuration files have it.
Part = Callable[..., Any] | Sequence[Any]


def build(name: str, part: Part, *args: Any, **defaults: Any) -> Any:
    """Builds `part` with the arguments its owner supplies.

    Args:
        name: what the owner calls this part, for error messages.
        part: a class, or (class, keywords), or (class, positional arguments).
        args: the owner's positional arguments; the part's own come after them.
        defaults: the owner's keyword arguments; the part's own keywords win, and positional
            arguments of the part replace them all.

    Raises:
        TypeError: `part` is none of the three forms.
    """
    if callable(part):
        return part(*args, **defaults)
    if isinstance(part, Sequence) and len(part) == 2 and callable(part[0]):
        cls, own = part
        if isinstance(own, Mapping):
            return cls(*args, **{**defaults, **own})
        if isinstance(own, Sequence) and not isinstance(own, str):
            return cls(*args, *own)
    raise TypeError(
        f"{name} must be a class, or a pair (class, keywords) or (class, positional arguments), got {part!r}"
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has a hook, or all modules have one, or it was given another forward of its own: so
    that it must be called by itself."""
    own = module.__dict__  # which takes a quarter of the time of the attributes
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _has_any_global_hook()
    )


def untouched(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` does what one of these very classes does, and nothing else."""
    return type(module) in kinds and not has_hooks(module)
