"""What all launches of Triton kernels share: blocks, strides, the device."""

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as _error:
    missing: str | None = f"Triton is missing ({_error}): pip install triton"
else:
    # Earlier ones fail in every kernel here: they know no tuples of blocks.
    too_old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4)
    missing = (
        f"Triton {triton.__version__} is too old: pip install 'triton>=3.4', which torch 2.8 and later bring"
        if too_old
        else None
    )

# Triton reads the variable when a kernel is decorated, so this is final once this module is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def padded(extent: int) -> int:
    """The block that holds ``extent`` elements: Triton's blocks are powers of two."""
    return triton.next_power_of_2(max(extent, 1))


def compute_type(x: Tensor) -> Any:
    """Triton's name for the dtype of the arithmetic on x."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def product_precision() -> str:
    """The precision of ``tl.dot`` for float32, after ``torch.get_float32_matmul_precision()``.

    Torch's "highest" is three products of TF32, as exact as one of float32.
    """
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def strides(x: Tensor, axes: int) -> tuple[int, ...]:
    """The strides of x, or as many zeros where it is an empty stand-in for a tensor that is not used."""
    return x.stride() if x.numel() else (0,) * axes


def launch(kernel: Any, programs: int | tuple[int, ...], x: Tensor, *args: Any, **constants: Any) -> None:
    """Start a kernel on x's device and that device's current stream."""
    grid = programs if isinstance(programs, tuple) else (programs,)
    if not all(grid):
        return
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        try:
            # Fused multiply-adds are named so that the bits do not depend on Triton's default.
            kernel[grid](*args, **constants, enable_fp_fusion=True)
        except Exception as error:
            if x.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"factorizer_kernels, backend 'triton': {kernel.__name__} failed while a CUDA graph was "
                    "captured: make the same call once before, since the first one compiles and loads it"
                ) from error
            raise


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device; a few for the interpreter, so that its programs loop as on a device."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
