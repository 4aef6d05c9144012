"""NMF: the calls of the C++ kernels, which factorise windows."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from factorizer_kernels.ops.nmf.native import Problem, register
from factorizer_kernels.ops.nmf.spec import MatrixSizes
from factorizer_kernels.shared.maps import empty_map
from factorizer_kernels.shared.native import memory, native, threads


class CpuProblem(Problem):
    @property
    def forward(self) -> Callable[..., None]:
        return partial(native.swin_nmf_forward, self.native, threads())

    def backward(self, factor_grads: bool, **loss) -> tuple[Tensor, Tensor, Tensor]:
        dx = empty_map(self.x)
        if not factor_grads:
            native.swin_nmf_backward(self.native, threads(), dx=memory(dx), **loss)
            return dx, *self.no_factor_grads()
        du0, dv0 = self.u0.new_empty(self.u0.shape), self.v0.new_empty(self.v0.shape)
        native.swin_nmf_backward(
            self.native, threads(), dx=memory(dx), du0=memory(du0), dv0=memory(dv0), **loss
        )
        return dx, *self.factor_grads(du0, dv0)


def yields(x: Tensor, sizes: MatrixSizes | None) -> str | None:
    """Why plain PyTorch should factorise x, which it does faster, or None.

    It keeps the iterations for the backward, which the kernels compute again: with few of them, each of large
    products, nothing makes up for that (measured: docs/performance.md). Up to rank 8 the kernels update
    factors in registers, and HALS goes through the reference column by column.
    """
    if sizes is None or sizes.solver != "mu":
        return None
    if sizes.num_iters == 1:
        faster = sizes.rank > 8
    else:
        faster = sizes.num_iters == 2 and x.requires_grad and sizes.rank >= 96
    return "plain PyTorch is faster at so few iterations of MU at such a rank" if faster else None


register("cpu", CpuProblem, yields=yields)
