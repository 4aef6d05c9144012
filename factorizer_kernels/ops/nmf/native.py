"""A factorisation as the compiled module takes it, and the operators of NMF on it, for the CPU and CUDA.

``cpu.py`` and ``cuda.py`` say how their kernels are called with a `Problem`, which is made here alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.windows.geometry import Windows, whole_matrices
from factorizer_kernels.ops.windows.native import native_windows
from factorizer_kernels.shared.maps import empty_map
from factorizer_kernels.shared.native import DTYPE_CODES, memory, native, volume
from factorizer_kernels.shared.registry import Reason, kernel, never


class Description(NamedTuple):
    """A problem but for its tensors: the matrices' leading dimensions, and the module's descriptions."""

    batch_shape: tuple[int, ...]
    windows: Any
    options: Any


@lru_cache(maxsize=256)  # a network asks for the same few again and again
def described(windows: Windows, rank: int, relu: bool, options: Options) -> Description:
    """The description of factorising the windows, whose fields are tuples."""
    native_options = native.NMFOptions(rank=rank, relu=relu, **options._asdict())
    return Description(windows.batch_shape, native_windows(windows), native_options)


class Problem(ABC):
    """Every window of a feature map, factorised from u0 and v0; each backend has a subclass with its calls.

    Attributes:
        x: the map (B, C, S1..Sp), of any strides.
        u0, v0: the first factors, transposed and contiguous: (R, M) and (R, N), shared by all the matrices,
            or one for each.
        native: the module's description, checked. It holds the addresses of the three.
    """

    def __init__(
        self,
        x: Tensor,
        windows: Windows,
        u0: Tensor,
        v0: Tensor,
        batch_shape: Sequence[int] | None,
        relu: bool,
        options: Options,
    ):
        """``batch_shape``: the matrices' leading dimensions, if they are not those of the windows."""
        description = described(windows, u0.shape[-1], relu, options)
        self.x, self.options = x, options
        self.batch_shape = description.batch_shape if batch_shape is None else batch_shape
        self.shapes = u0.shape, v0.shape
        shared = u0.dim() == v0.dim() == 2 or (prod(u0.shape[:-2]) == 1 and prod(v0.shape[:-2]) == 1)
        if not shared:
            u0, v0 = (factor.expand(*self.batch_shape, *factor.shape[-2:]) for factor in (u0, v0))
        self.u0, self.v0 = u0.mT.contiguous(), v0.mT.contiguous()
        self.native = native.NMFProblem(
            DTYPE_CODES[x.dtype], description.windows, volume(x), memory(self.u0), memory(self.v0),
            shared, description.options,
        )  # fmt: skip

    @classmethod
    def of_windows(
        cls, x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts, relu: bool, options
    ) -> "Problem":
        """For the arguments of the operator ``swin_nmf``."""
        windows = Windows(x.shape, head_dim, tuple(patch_size), tuple(shifts))
        return cls(x, windows, u0, v0, None, relu, Options(*options))

    @classmethod
    def of_matrices(cls, x: Tensor, u0: Tensor, v0: Tensor, options) -> "Problem":
        """For the arguments of the operator ``nmf``: x (..., M, N), each matrix one window of a 1-D map."""
        windows = whole_matrices(x.shape)
        # A view where the leading dimensions are strided as one, else a copy.
        return cls(x.reshape(windows.size), windows, u0, v0, x.shape[:-2], False, Options(*options))

    def loss_gradient(self, dy: Tensor) -> Tensor:
        """dy as the backward reads it."""
        return dy

    @property
    @abstractmethod
    def forward(self) -> Callable[..., None]:
        """The call that writes y (of x's shape), or u and v (as ``new_factors`` makes them).

        It takes the ``memory`` of each, by name. The problem must outlive it.
        """

    @abstractmethod
    def backward(self, factor_grads: bool, **loss) -> tuple[Tensor, Tensor, Tensor]:
        """(dx, du0, dv0) from ``dy``, a ``volume``, or from ``du`` and ``dv``, the ``memory`` of each."""

    def new_factors(self) -> tuple[Tensor, Tensor]:
        """u (..., R, M) and v (..., R, N) for every matrix, empty."""
        u_shape, v_shape = ((*self.batch_shape, *factor.shape[-2:]) for factor in (self.u0, self.v0))
        return self.u0.new_empty(u_shape), self.v0.new_empty(v_shape)

    def factor_grads(self, du0: Tensor, dv0: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients laid out as u0 and v0 here, in the shapes of those given, summed where they broadcast."""
        u_shape, v_shape = self.shapes
        return du0.mT.sum_to_size(u_shape).contiguous(), dv0.mT.sum_to_size(v_shape).contiguous()

    def no_factor_grads(self) -> tuple[Tensor, Tensor]:
        """What a backward pass returns for u0 and v0 where their gradients are not wanted."""
        return self.u0.new_empty((0,)), self.v0.new_empty((0,))


def register(backend: str, problem: type[Problem], limit: Reason = never, yields: Reason = never) -> None:
    """Register the operators of this family for a backend, on its kind of problem."""

    @kernel("nmf", backend, limit, yields)
    def nmf(x: Tensor, u0: Tensor, v0: Tensor, *options) -> Tensor:
        y = empty_map(x)
        made = problem.of_matrices(x, u0, v0, options)  # a name, since it owns what the call reads
        made.forward(y=memory(y))
        return y

    @kernel("nmf_backward", backend, limit)
    def nmf_backward(dy, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options):
        made = problem.of_matrices(x, u0, v0, options)
        dy = made.loss_gradient(dy.reshape(made.x.shape))
        dx, du0, dv0 = made.backward(factor_grads, dy=volume(dy))
        return dx.view(x.shape), du0, dv0

    @kernel("nmf_factors", backend, limit, yields)
    def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, *options) -> tuple[Tensor, Tensor]:
        made = problem.of_matrices(x, u0, v0, options)
        u, v = made.new_factors()
        made.forward(u=memory(u), v=memory(v))
        return _transposed(u, x), _transposed(v, x)

    @kernel("nmf_factors_backward", backend, limit)
    def nmf_factors_backward(du, dv, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options):
        made = problem.of_matrices(x, u0, v0, options)
        du, dv = _transposed(du, u0), _transposed(dv, v0)
        dx, du0, dv0 = made.backward(factor_grads, du=memory(du), dv=memory(dv))
        return dx.view(x.shape), du0, dv0


def _transposed(factor: Tensor, like: Tensor) -> Tensor:
    """U (..., M, R) from (..., R, M), or the other way round: contiguous, in the dtype of like."""
    return factor.mT.to(like.dtype).contiguous()
