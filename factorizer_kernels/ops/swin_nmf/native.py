"""The operators of shifted-window NMF on the compiled module's kernels, for the CPU and CUDA."""

from torch import Tensor

from factorizer_kernels.ops.nmf.native import Problem
from factorizer_kernels.shared.maps import empty_map
from factorizer_kernels.shared.native import memory, volume
from factorizer_kernels.shared.registry import Reason, kernel, never


def register(backend: str, problem: type[Problem], limit: Reason = never, takes_out: bool = False) -> None:
    """Register the operators of this family for a backend, on its kind of problem.

    ``takes_out``: the forward reads every voxel of a head, for all its windows, before it writes one.
    """

    @kernel("swin_nmf", backend, limit, takes_out=takes_out)
    def swin_nmf(
        x: Tensor, u0: Tensor, v0: Tensor, head_dim, patch_size, shifts, relu, *options,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        y = empty_map(x) if out is None or out.shape != x.shape or out.dtype != x.dtype else out
        made = problem.of_windows(x, u0, v0, head_dim, patch_size, shifts, relu, options)
        made.forward(y=memory(y))
        return y

    @kernel("swin_nmf_backward", backend, limit)
    def swin_nmf_backward(
        dy, x: Tensor, u0: Tensor, v0: Tensor, factor_grads, head_dim, patch_size, shifts, relu, *options
    ):
        made = problem.of_windows(x, u0, v0, head_dim, patch_size, shifts, relu, options)
        dy = made.loss_gradient(dy)  # a name, since the call reads it by its address
        return made.backward(factor_grads, dy=volume(dy))
