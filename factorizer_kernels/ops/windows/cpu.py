"""Shifted-window matricisation: the calls of the C++ kernels."""

from torch import Tensor

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.native import native_windows
from factorizer_kernels.shared.native import DTYPE_CODES, memory, native, threads, volume
from factorizer_kernels.shared.registry import kernel


@kernel("sw_matricize", "cpu")
def sw_matricize(x: Tensor, head_dim, patch_size, shifts, mean) -> Tensor:
    windows = Windows(x.shape, head_dim, tuple(patch_size), tuple(shifts))
    z = x.new_empty(windows.matrices_shape)
    native.sw_matricize(*_arguments(x, windows, z, mean))
    return z


@kernel("sw_dematricize", "cpu")
def sw_dematricize(z: Tensor, size, head_dim, patch_size, shifts, mean) -> Tensor:
    windows = Windows(tuple(size), head_dim, tuple(patch_size), tuple(shifts))
    x = z.new_empty(size)
    z = z.contiguous()
    native.sw_dematricize(*_arguments(x, windows, z, mean))
    return x


def _arguments(x: Tensor, windows: Windows, z: Tensor, mean: bool) -> tuple:
    scale = 1 / windows.num_shifts if mean else 1.0
    return DTYPE_CODES[x.dtype], native_windows(windows), volume(x), memory(z), scale, threads()
