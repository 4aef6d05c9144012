"""What all launches of Triton kernels share: blocks, strides, the device, the compiled kernels.

Triton finds a call's compiled kernel anew each time: it looks at every argument, and makes texts of what it
sees. That takes several times as long as the launch, so `launch` remembers what Triton found. Its key
says more of a call than Triton asks, so no two calls of one key have different kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from factorizer_kernels.shared.checks import NO_TENSORS

# So that the voxels of a block that begins at the last one are still numbers of 32 bits.
MAX_VOXELS = 2**31 - 2**16


def padded(extent: int) -> int:
    """The block that holds ``extent`` elements: Triton's blocks are powers of two.

    (This and `cdiv` are Triton's own on plain integers; those serve its compiler too, and take 20 times
    as long.)
    """
    return 1 << (max(extent, 1) - 1).bit_length()


def cdiv(extent: int, block: int) -> int:
    """How many blocks hold ``extent`` elements."""
    return -(-extent // block)


def compute_type(x: Tensor) -> Any:
    """Triton's name for the dtype of the arithmetic on x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def product_precision() -> str:
    """The precision of ``tl.dot`` for float32: TF32 where torch allows it to its own products.

    Else three products of TF32, as exact as one of float32. From PyTorch 2.9 on there are two ways to allow
    it, and ``torch.get_float32_matmul_precision()`` raises once both were taken; what holds is here.
    """
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if setting == "tf32" else "tf32x3"


def too_many(voxels: int) -> str | None:
    """Why kernels that count a channel's voxels in 32 bits do not take so many, or None where they do."""
    return f"it takes at most {MAX_VOXELS} voxels of a channel, got {voxels}" if voxels > MAX_VOXELS else None


def launch(kernel: Any, programs: int | tuple[int, ...], x: Tensor, *args: Any, **constants: Any) -> None:
    """Start a kernel on x's device and that device's current stream.

    Args:
        args: those of the kernel that are not compile-time constants: tensors, numbers, tuples of integers.
        constants: the others, and the compiler's options.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if not all(grid):
        return
    device = cuda_index(x)
    if device is None:  # interpreted, or counted
        kernel[grid](*args, **constants, enable_fp_fusion=True)
    elif device == torch.cuda.current_device():
        _launch(kernel, grid, device, args, constants)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, device, args, constants)


def cuda_index(x: Tensor) -> int | None:
    """The number of x's CUDA device; None where it is on no such device."""
    return x.device.index if x.is_cuda else None


# (start, the constants, which come last) by the key of a launch. Any thread may add one.
_LAUNCHES: dict[tuple, tuple[Callable[..., None], tuple]] = {}
_MOST_LAUNCHES = 4096


def _launch(kernel: Any, grid: tuple[int, ...], device: int, args: tuple, constants: dict[str, Any]) -> None:
    """`launch` on the current device.

    A kernel is compiled for the tensors' dtypes, for addresses that are multiples of 16, for integers that
    are 1, or multiples of 16, or need 64 bits, and for the constants' values. The key has dtypes, addresses
    modulo 16, numbers and constants as they are, and the types of all: 1 is not 1.0 there.
    """
    seen = [
        a if type(a) in NO_TENSORS or not isinstance(a, Tensor) else (a.dtype, a.data_ptr() & 15)
        for a in args
    ]
    key = (kernel.fn, grid, device, *seen, *map(type, args), *constants, *constants.values())
    found = _LAUNCHES.get(key)
    if found is not None:
        start, behind = found
        start(*args, *behind, stream=triton.runtime.driver.active.get_current_stream(device))
        return
    try:
        # Fused multiply-adds are named so that the bits do not depend on Triton's default.
        compiled = kernel[grid](*args, **constants, enable_fp_fusion=True)
    except Exception as error:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"factorizer_kernels, backend 'triton': {kernel.__name__} failed while a CUDA graph was "
                "captured: make the same call once before, since the first one compiles and loads it"
            ) from error
        raise
    if len(_LAUNCHES) >= _MOST_LAUNCHES:
        _LAUNCHES.clear()
    behind = tuple(constants[name] for name in kernel.arg_names[len(args) :])
    _LAUNCHES[key] = compiled[(*grid, 1, 1)[:3]], behind


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device; a few for the interpreter, so that its programs loop as on a device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
