"""Shifted-window matricisation: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.native import native_windows
from factorizer_kernels.shared import native as cpu
from factorizer_kernels.shared.registry import kernel


@kernel("sw_matricize", "cpu")
def sw_matricize(x: Tensor, head_dim, patch_size, shifts, mean) -> Tensor:
    windows = Windows(x.shape, head_dim, patch_size, shifts)
    z = x.new_empty(windows.matrices_shape)
    cpu.native.sw_matricize(
        cpu.DTYPE_CODES[x.dtype], native_windows(windows), cpu.volume(x), cpu.memory(z),
        1 / windows.num_shifts if mean else 1.0, cpu.threads(),
    )  # fmt: skip
    return z


@kernel("sw_dematricize", "cpu")
def sw_dematricize(z: Tensor, size, head_dim, patch_size, shifts, mean) -> Tensor:
    windows = Windows(size, head_dim, patch_size, shifts)
    z = z.contiguous()
    x = z.new_empty(size)
    cpu.native.sw_dematricize(
        cpu.DTYPE_CODES[z.dtype], native_windows(windows), cpu.volume(x), cpu.memory(z),
        1 / windows.num_shifts if mean else 1.0, cpu.threads(),
    )  # fmt: skip
    return x
