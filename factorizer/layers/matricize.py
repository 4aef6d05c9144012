"""Feature maps as batches of matrices, one for each head and (shifted) window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.ops.windows.geometry import Shift, resolve
from factorizer_kernels.shared.checks import integers

from .checks import check_features
from .resize import crop_to, pad_to, round_up


class SWMatricize(nn.Module):
    """Cuts x (B, C, S1..Sp) into windows, once for every shift, and puts them together again.

    Every head of every window becomes one head_dim x voxels matrix; see
    `factorizer_kernels.sw_matricize` for the layout. An x whose size the windows do not divide is
    padded with zeros at the end of the axis, and cropped again on the way back.

    Args:
        input_size: (None, C, S1..Sp), p = 1, 2 or 3: the size that `output_size` is told for. Other
            spatial sizes may be passed to `forward`.
        num_heads, head_dim: exactly one of them; they multiply to C.
        grid_size, patch_size: exactly one of them: windows along each axis, or voxels of a window;
            an int or one int per axis.
        shifts: one entry per copy: None (unshifted), an int for all axes, or one int per axis.
            Default: [None, patch // 2].

    Attributes:
        output_size: (None, windows, head_dim, voxels of a window).

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        input_size: Sequence[int | None],
        num_heads: int | None = None,
        head_dim: int | None = None,
        grid_size: int | Sequence[int] | None = None,
        patch_size: int | Sequence[int] | None = None,
        shifts: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(input_size, Sequence) or isinstance(input_size, str):
            raise TypeError(f"input_size must be a sequence (B or None, C, S1..Sp), got {input_size!r}")
        self.channels, *spatial_size = integers("input_size[1:]", input_size[1:], 1, (2, 3, 4))
        self.spatial_size = tuple(spatial_size)
        self.shifts = shifts
        self.window_options: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "grid_size": grid_size,
            "patch_size": patch_size,
        }
        # Axes of extent zero are divisible by everything: this checks the options alone.
        resolve((1, self.channels, *[0] * len(self.spatial_size)), **self.window_options, shifts=None)
        multiple: Any = patch_size or grid_size
        whole = isinstance(multiple, Sequence)
        self._multiple = tuple(multiple) if whole else (multiple,) * len(self.spatial_size)
        fitted = self.fitted_size(self.spatial_size)
        size = (1, self.channels, *fitted)
        self.output_size = (None, *resolve(size, **self.options(fitted)).matrices_shape[1:])

    def fitted_size(self, spatial_size: Sequence[int]) -> tuple[int, ...]:
        """The smallest size that holds `spatial_size` and is made of whole windows."""
        return round_up(spatial_size, self._multiple)

    def window_size(self, spatial_size: Sequence[int]) -> tuple[int, ...]:
        """Voxels of one window along each axis, for an x of this spatial size."""
        size = (1, self.channels, *self.fitted_size(spatial_size))
        return resolve(size, **self.window_options, shifts=None).patch_size

    def options(self, spatial_size: Sequence[int]) -> dict[str, Any]:
        """The window options of the operators of `factorizer_kernels`, for this spatial size."""
        return self.window_options | {"shifts": self._copies(spatial_size)}

    def _copies(self, spatial_size: Sequence[int]) -> Sequence[Shift]:
        if self.shifts is not None:
            return self.shifts
        return [None, [p // 2 for p in self.window_size(spatial_size)]]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, S1..Sp) -> (shifts * B * heads, windows, head_dim, voxels of a window)."""
        check_features(type(self).__name__, x, self.channels, len(self.spatial_size))
        x = pad_to(x, self.fitted_size(x.shape[2:]))
        return fk.sw_matricize(x, **self.options(x.shape[2:]))

    def inverse_forward(self, z: Tensor, spatial_size: Sequence[int] | None = None) -> Tensor:
        """The matrices z back to (B, C, S1..Sp), averaged over the shifts.

        Args:
            z: as `forward` returned it for an x of this spatial size.
            spatial_size: S1..Sp; that of `input_size` where None.
        """
        size = tuple(self.spatial_size if spatial_size is None else spatial_size)
        fitted = self.fitted_size(size)
        options = self.options(fitted)
        heads = resolve((1, self.channels, *fitted), **options).head_dim
        copies = len(options["shifts"]) * (self.channels // heads)
        x = fk.sw_dematricize(z, (z.shape[0] // copies, self.channels, *fitted), **options)
        return crop_to(x, size)

    def extra_repr(self) -> str:
        options = {k: v for k, v in (self.window_options | {"shifts": self.shifts}).items() if v is not None}
        size = (None, self.channels, *self.spatial_size)
        return ", ".join([f"{size}", *(f"{k}={v}" for k, v in options.items())])


class Matricize(SWMatricize):
    """Cuts x (B, C, S1..Sp) into windows, in one copy.

    Arguments as those of `SWMatricize`, but `shifts` is the one shift of the one copy: None
    (unshifted), an int, or one int per axis.
    """

    def _copies(self, spatial_size: Sequence[int]) -> Sequence[Shift]:
        return [self.shifts]
