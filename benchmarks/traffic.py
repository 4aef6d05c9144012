"""The bytes that a network moves to and from a GPU's memory, counted without a GPU: on meta tensors.

Our operators run the host code of their Triton kernels, whose launches are counted and not made; an operation
of PyTorch counts as it stands, as one launch where it moves anything. Each tensor that a launch or an
operation names is counted once, so what a cache misses comes on top, and what a library's convolution keeps
in between.

    python -m benchmarks.traffic [--network swin-brats] [--size 128]
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import JITFunction

# The kernels, which a PyTorch without CUDA leaves out.
import factorizer_kernels.ops.depthwise.triton
import factorizer_kernels.ops.nmf.triton
import factorizer_kernels.ops.pointwise.triton
import factorizer_kernels.ops.swin_nmf.triton
import factorizer_kernels.ops.windows.triton  # noqa: F401
from factorizer.models import PRESETS, preset
from factorizer_kernels import choice
from factorizer_kernels.shared import registry


class Traffic(TorchDispatchMode):
    """Counts, inside, the launches and the bytes of the operations on meta tensors.

    Attributes:
        launches, bytes: of each operation or kernel, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "factorizer_kernels":
            *arguments, backend = args
            kernel = registry.find(function._schema.name.partition("::")[2], backend)
            assert kernel is not None, f"{function} has no kernel of {backend}"
            with self:  # what the kernel's host code asks PyTorch for counts too
                return kernel.function(*arguments)
        with self:  # an operation that PyTorch composes of others counts as these
            result = function.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = function(*args, **(kwargs or {}))
            self._count(str(function), _moved(function, args, kwargs or {}, result))
        return result

    def launch(self, kernel: JITFunction, args: Any) -> None:
        """In place of a launch of a Triton kernel."""
        self._count(kernel.__name__, _extent(tree_leaves(args)))

    def _count(self, name: str, moved: int) -> None:
        if moved > 0:
            self.launches[name] += 1
            self.bytes[name] += moved


def _extent(values: Any) -> int:
    """The bytes of the tensors among the values, each once; elements that lie upon one another are one."""
    found = {}
    for x in values:
        if isinstance(x, Tensor):
            elements = 1
            for size, stride in zip(x.shape, x.stride(), strict=True):
                elements *= size if stride else min(size, 1)
            found[id(x)] = elements * x.element_size()
    return sum(found.values())


def _moved(function: Any, args: Any, kwargs: Any, result: Any) -> int:
    returns = function._schema.returns
    if returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return 0  # a view
    name = function._schema.name.partition("::")[2]
    if name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
        return 0
    inputs = tree_leaves((args, {key: value for key, value in kwargs.items() if key != "out"}))
    outputs = tree_leaves(result)
    if name == "copy_":
        inputs = inputs[1:]  # what it writes over is not read
    if name.startswith("new_") or name.endswith("_like"):
        inputs = []  # a shape's alone
    if name == "convolution_backward":  # a kernel for each gradient, of two of the three tensors
        dy, x, weight, *_ = args
        others = (weight, x, None)
        return sum(
            _extent([dy, other, out]) for other, out in zip(others, result, strict=True) if out is not None
        )
    return _extent(inputs) + _extent(outputs)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the traffic of what runs inside on meta tensors, as on a card that Triton compiles for."""
    traffic = Traffic()
    record = choice._RECORDS["triton"]._replace(devices=("meta",), missing=None)
    run = mock.patch.object(JITFunction, "run", lambda kernel, *args, **_: traffic.launch(kernel, args))
    with mock.patch.dict(choice._RECORDS, {"triton": record}), run, traffic:
        yield traffic


def of_network(make: Callable[[], nn.Module], size: tuple[int, ...]) -> tuple[Traffic, Traffic]:
    """(an inference's, a training step's but for the optimiser) of float32 maps (1, 4, *size)."""
    with torch.device("meta"):
        model = make()
        x = torch.empty(1, 4, *size)
    with counted() as inference, torch.no_grad():
        model.eval()(x)
    with counted() as step:
        model.train()
        y = model(x)
        y.backward(torch.empty_like(y))
    return inference, step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", default="swin-brats", choices=tuple(PRESETS))
    parser.add_argument("--size", type=int, default=128, help="voxels along each axis")
    options = parser.parse_args()
    names = ("inference", "training step")
    counts = of_network(lambda: preset(options.network), (options.size,) * 3)
    for name, traffic in zip(names, counts, strict=True):
        print(f"{name}: {traffic.total / 1e9:.1f} GB")
        for operation, moved in traffic.bytes.most_common(12):
            print(f"  {moved / 1e9:7.2f}  {operation}")


if __name__ == "__main__":
    main()
