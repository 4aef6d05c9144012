"""The backward of ``sw_matricize`` and ``sw_dematricize``: each is the other's adjoint."""

import torch

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.spec import sw_dematricize, sw_matricize
from factorizer_kernels.shared.autograd import call_function
from factorizer_kernels.shared.registry import call


class SWMatricize(torch.autograd.Function):
    """(x, windows, mean, backend) -> z; keeps nothing. Differentiable to any order."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(x, windows: Windows, mean: bool, backend: str):
        return call(sw_matricize, x, *windows.options, mean, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx, dz):
        return call_function("sw_matricize", SWDematricize, dz, *ctx.options), None, None, None


class SWDematricize(torch.autograd.Function):
    """(z, windows, mean, backend) -> x; keeps nothing. Differentiable to any order."""

    generate_vmap_rule = True  # from the operators' own

    @staticmethod
    def forward(z, windows: Windows, mean: bool, backend: str):
        return call(sw_dematricize, z, *windows, mean, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx, dx):
        return call_function("sw_dematricize", SWMatricize, dx, *ctx.options), None, None, None
