"""NMF: the calls of the C++ kernels, which are those of ``swin_nmf`` on one window an item."""

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.native import Factors
from factorizer_kernels.ops.windows.geometry import whole_matrices
from factorizer_kernels.ops.windows.native import native_windows
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.registry import kernel


class _Call:
    """The arguments that forward and backward share."""

    def __init__(self, x: Tensor, u0: Tensor, v0: Tensor, options):
        self.options = Options(*options)
        self.windows = whole_matrices(x.shape)
        # A view where the leading dimensions are strided as one, else a copy.
        self.x = x.reshape(self.windows.size)
        self.factors = Factors(u0, v0, x.shape[:-2])

    def arguments(self):
        return (
            cpu.DTYPE_CODES[self.x.dtype], native_windows(self.windows), cpu.volume(self.x),
            *self.factors.arguments(), self.factors.rank, self.options.num_iters,
        )  # fmt: skip

    def forward(self, **outputs: Tensor) -> None:
        cpu.native.swin_nmf_forward(
            *self.arguments(), self.options.hals, False, self.options.eps, cpu.threads(),
            **{name: cpu.memory(output) for name, output in outputs.items()},
        )  # fmt: skip

    def backward(self, factor_grads, **grads) -> tuple[Tensor, Tensor, Tensor]:
        dx = self.x.new_empty(self.x.shape)
        du0, dv0 = self.factors.new_grads(factor_grads)
        cpu.native.swin_nmf_backward(
            *self.arguments(), self.options.grad_steps, self.options.hals, False, self.options.eps,
            cpu.threads(), dx=cpu.memory(dx), du0=cpu.memory(du0), dv0=cpu.memory(dv0), **grads,
        )  # fmt: skip
        return dx, *self.factors.grads(du0, dv0, factor_grads)


@kernel("nmf", "cpu")
def nmf(x: Tensor, u0: Tensor, v0: Tensor, *options) -> Tensor:
    y = x.new_empty(x.shape)
    _Call(x, u0, v0, options).forward(y=y)
    return y


@kernel("nmf_backward", "cpu")
def nmf_backward(
    dy: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x, u0, v0, options)
    dy = dy.reshape(call.x.shape)
    dx, du0, dv0 = call.backward(factor_grads, dy=cpu.volume(dy))
    return dx.view(x.shape), du0, dv0


@kernel("nmf_factors", "cpu")
def nmf_factors(x: Tensor, u0: Tensor, v0: Tensor, *options) -> tuple[Tensor, Tensor]:
    call = _Call(x, u0, v0, options)
    *batch, rows, columns = x.shape
    u = call.factors.u0.new_empty((*batch, call.factors.rank, rows))
    v = call.factors.v0.new_empty((*batch, call.factors.rank, columns))
    call.forward(u=u, v=v)
    return _transposed(u, x.dtype), _transposed(v, x.dtype)


@kernel("nmf_factors_backward", "cpu")
def nmf_factors_backward(
    du: Tensor, dv: Tensor, x: Tensor, u0: Tensor, v0: Tensor, factor_grads: bool, *options
) -> tuple[Tensor, Tensor, Tensor]:
    call = _Call(x, u0, v0, options)
    dtype = call.factors.u0.dtype
    du, dv = _transposed(du, dtype), _transposed(dv, dtype)
    none = cpu.native.Volume(0, 0, [0] * 5)
    dx, du0, dv0 = call.backward(factor_grads, dy=none, du=cpu.memory(du), dv=cpu.memory(dv))
    return dx.view(x.shape), du0, dv0


def _transposed(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.mT.to(dtype).contiguous()
