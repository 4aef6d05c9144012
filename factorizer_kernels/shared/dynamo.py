"""What ``torch.compile`` must not look into."""

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable)


def constant_while_compiling(function: Function) -> Function:
    """Mark a function whose result Dynamo takes as a constant of the graph, without tracing it.

    This is ``torch.compiler.assume_constant_result``, which would import Dynamo, and that takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
