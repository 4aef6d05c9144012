"""The contract between operators and backends: how an operator is defined, and a kernel registered for it.

An operator is defined once, by its family: `define`. Its last argument names the backend that runs it,
so that a compiled graph and the backward pass run where the forward ran. A backend implements an operator by
registering a kernel: `kernel`. Plain PyTorch (the backend ``reference``) registers none: it is
differentiable as it stands and never becomes an opaque operator.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from factorizer_kernels.shared.checks import plain

_LIBRARY = torch.library.Library("factorizer_kernels", "DEF")

Reason = Callable[[Tensor, Any], str | None]


class Kernel(NamedTuple):
    """What a backend runs for an operator; see `kernel`."""

    function: Callable
    limit: Reason
    yields: Reason
    takes_out: bool


_KERNELS: dict[tuple[str, str], Kernel] = {}
_NAMES: dict[torch._ops.OpOverload, str] = {}


def define(name: str, schema: str, fake: Callable, vmap: Callable) -> torch._ops.OpOverload:
    """Define the operator ``torch.ops.factorizer_kernels.<name>``, and return it.

    Args:
        schema: in torch's language, ``"(Tensor x, ..., str backend) -> Tensor"``. Outputs are contiguous and
            share no memory with the arguments.
        fake: takes the operator's arguments, returns empty outputs: their shapes, dtypes and device.
        vmap: the rule for ``torch.func.vmap``, see ``vmap.py``.
    """
    arguments = schema.partition(")")[0].split(", ")
    if arguments[-1] != "str backend":
        raise ValueError(f"the last argument of {name} must be 'str backend', got {arguments[-1]!r}")

    def run(*args):
        *arguments, backend = args
        return _KERNELS[name, backend].function(*arguments)

    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"factorizer_kernels::{name}", fake, lib=_LIBRARY)
    torch.library.register_vmap(f"factorizer_kernels::{name}", vmap, lib=_LIBRARY)
    operator = getattr(torch.ops.factorizer_kernels, name).default
    _NAMES[operator] = name
    return operator


def call(operator: torch._ops.OpOverload, *arguments: Any) -> Any:
    """``operator(*arguments)``, where nothing is differentiated that it does not differentiate itself.

    A plain call goes to the kernel at once: the way through PyTorch's dispatcher takes as long as a small
    kernel.
    """
    if not plain(arguments):
        return operator(*arguments)
    outputs = _KERNELS[_NAMES[operator], arguments[-1]].function(*arguments[:-1])
    return outputs if isinstance(outputs, Tensor) else tuple(outputs)


def never(x: Tensor, sizes: Any) -> None:
    """The limit of a kernel that can run every call; when one yields that is the fastest at all of them."""


def kernel(
    operator: str, backend: str, limit: Reason = never, yields: Reason = never, takes_out: bool = False
) -> Callable[[Callable], Callable]:
    """Register the decorated function as the kernel of ``operator`` on ``backend``.

    The function takes the operator's arguments without the last one, in the schema's order.

    Args:
        limit: ``limit(x, sizes)`` returns why the kernel cannot run this call, or None where it can. What
            ``sizes`` are is a matter of the family.
        yields: ``yields(x, sizes)`` returns why a backend after this one should run a call that the kernel
            can run as well, or None. A backend that was asked for by name does not yield.
        takes_out: whether the function takes ``out=``, a contiguous tensor for the result, which may be a
            map that the kernel reads: it writes a voxel after all that depends on its old value.
    """

    def register(function: Callable) -> Callable:
        _KERNELS[operator, backend] = Kernel(function, limit, yields, takes_out)
        return function

    return register


def find(operator: str, backend: str) -> Kernel | None:
    """The kernel of ``operator`` on ``backend``, or None where it has none."""
    return _KERNELS.get((operator, backend))
