"""What the compiled module's kernels of windows are called with, on the CPU and on CUDA."""

from typing import Any

from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.shared import native


def native_windows(windows: Windows) -> Any:
    """The module's description of the windows."""
    shifts = [step for shift in windows.shifts_3d for step in shift]
    return native.native.Windows(
        windows.size[0], windows.heads, windows.rows, windows.size_3d, windows.patch_3d, shifts
    )
