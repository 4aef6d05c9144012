"""What the compiled module's kernels of windows are called with, on the CPU and on CUDA."""

from functools import lru_cache
from typing import Any

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared.native import native


@lru_cache(maxsize=256)  # a network asks for the same few again and again
def native_windows(windows: Windows) -> Any:
    """The module's description of the windows, whose fields are tuples."""
    shifts = [step for shift in windows.shifts_3d for step in shift]
    return native.Windows(
        windows.size[0], windows.heads, windows.rows, windows.size_3d, windows.patch_3d, shifts
    )
