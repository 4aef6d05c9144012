"""The backward of ``sw_matricize`` and ``sw_dematricize``: each is the other's adjoint."""

import torch

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared import registry  # noqa: F401  (defines the operators that are bound here)
from factorizer_kernels.shared.autograd import apply

_sw_matricize = torch.ops.factorizer_kernels.sw_matricize.default
_sw_dematricize = torch.ops.factorizer_kernels.sw_dematricize.default


class SWMatricize(torch.autograd.Function):
    """(x, windows, mean, backend) -> z; keeps nothing. Differentiable to any order."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, windows: Windows, mean: bool, backend: str):
        return _sw_matricize(x, *windows, mean, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *ctx.options = inputs
        ctx.size = tuple(x.shape)

    @staticmethod
    def backward(ctx, dz):
        return apply(SWDematricize, dz, ctx.size, *ctx.options), None, None, None


class SWDematricize(torch.autograd.Function):
    """(z, size, windows, mean, backend) -> x; keeps nothing. Differentiable to any order."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(z, size: tuple[int, ...], windows: Windows, mean: bool, backend: str):
        return _sw_dematricize(z, size, *windows, mean, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, *ctx.options = inputs

    @staticmethod
    def backward(ctx, dx):
        return apply(SWMatricize, dx, *ctx.options), None, None, None, None
