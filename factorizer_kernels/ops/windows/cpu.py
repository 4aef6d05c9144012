"""Shifted-window matricisation: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.ops.windows.geometry import matricized_shape
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared import registry


def sw_matricize(x: Tensor, head_dim, patch_size, shifts, mean) -> Tensor:
    z = x.new_empty(matricized_shape(x.shape, head_dim, patch_size, len(shifts)))
    scale = len(patch_size) / len(shifts) if mean else 1.0
    cut = cpu.windows(x.shape, head_dim, patch_size, shifts)
    cpu.native.sw_matricize(cpu.DTYPE_CODES[x.dtype], cut, cpu.volume(x), cpu.memory(z), scale, cpu.threads())
    return z


def sw_dematricize(z: Tensor, size, head_dim, patch_size, shifts, mean) -> Tensor:
    z = z.contiguous()
    x = z.new_empty(size)
    scale = len(patch_size) / len(shifts) if mean else 1.0
    cut = cpu.windows(size, head_dim, patch_size, shifts)
    cpu.native.sw_dematricize(
        cpu.DTYPE_CODES[z.dtype], cut, cpu.volume(x), cpu.memory(z), scale, cpu.threads()
    )
    return x


if cpu.native is not None:
    registry.kernel("sw_matricize", "cpu")(sw_matricize)
    registry.kernel("sw_dematricize", "cpu")(sw_dematricize)
