"""What the compiled module's kernels of NMF are called with, on the CPU and on CUDA."""

from math import prod

import torch
from torch import Tensor

from factorizer_kernels.shared.native import memory


class Factors:
    """u0 and v0 as the kernels want them: transposed, in the compute dtype, shared or one per matrix."""

    def __init__(self, u0: Tensor, v0: Tensor, batch):
        self.shapes = (u0.shape, v0.shape)
        self.shared = prod(u0.shape[:-2]) == 1 and prod(v0.shape[:-2]) == 1
        if not self.shared:
            u0, v0 = u0.expand(*batch, *u0.shape[-2:]), v0.expand(*batch, *v0.shape[-2:])
        self.rank = u0.shape[-1]
        self.u0, self.v0 = (f.mT.contiguous() for f in (u0, v0))

    def arguments(self):
        return [self._argument(self.u0), self._argument(self.v0)]

    def new_grads(self, wanted: bool) -> tuple[Tensor, Tensor]:
        if not wanted:
            return self.u0.new_empty((0,)), self.v0.new_empty((0,))
        return torch.empty_like(self.u0), torch.empty_like(self.v0)

    def grads(self, du0: Tensor, dv0: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        """The kernels' gradients in the shapes of u0 and v0, summed where those were broadcast."""
        if not wanted:
            return du0, dv0
        return self._grad(du0, self.shapes[0]), self._grad(dv0, self.shapes[1])

    def _grad(self, grad: Tensor, shape) -> Tensor:
        grad = grad.mT
        return (grad.reshape(shape) if self.shared else grad.sum_to_size(shape)).contiguous()

    def _argument(self, factor: Tensor) -> tuple[int, int, int]:
        return (*memory(factor), 0 if self.shared else factor.shape[-1] * factor.shape[-2])
