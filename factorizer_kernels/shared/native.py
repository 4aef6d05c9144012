"""The compiled module and what its CPU kernels are called with: addresses, sizes, strides.

With every address goes the number of bytes that are there. The module compares them with what it will touch
and raises ValueError where they are too few, so that an error of ours is an exception, not a crash.
"""

import ctypes
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from factorizer_kernels.ops.windows.geometry import rolls

try:
    from factorizer_kernels import _native as native  # type: ignore[attr-defined]
except ImportError as _error:
    native = None
    missing: str | None = str(_error)
else:
    missing = None

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _share_torch_threads() -> None:
    # Torch's own OpenMP team does the work, so that two teams never compete for the cores. The symbol is
    # looked up through torch's library and so is that of the runtime it is linked to, whatever its name.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        launcher = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return  # another threading runtime: the module starts threads of its own
    native.set_team_launcher(ctypes.cast(launcher, ctypes.c_void_p).value)


if native is not None:
    _share_torch_threads()


def _pad(values, filler) -> list[int]:
    """Sizes or strides of the spatial axes, with leading axes up to three."""
    return [filler] * (3 - len(values)) + list(values)


def memory(x: Tensor) -> tuple[int, int]:
    """The address of x's first element, and the bytes from there to the end of x's storage."""
    return x.data_ptr(), int(x.untyped_storage().nbytes() - x.storage_offset() * x.element_size())


def volume(x: Tensor) -> "native.Volume":
    """A (B, C, S1..Sp) tensor of any strides."""
    batch, channels, *spatial = x.stride()
    return native.Volume(*memory(x), [batch, channels, *_pad(spatial, 0)])


def windows(size, head_dim: int, patch_size, shifts) -> "native.Windows":
    """The cut of a (B, C, S1..Sp) volume."""
    batch, channels, *spatial = size
    axes = len(spatial)
    steps = rolls(shifts, spatial)
    flat = [s for i in range(0, len(steps), axes) for s in _pad(steps[i : i + axes], 0)]
    return native.Windows(batch, channels // head_dim, head_dim, _pad(spatial, 1), _pad(patch_size, 1), flat)


class Factors:
    """u0 and v0 as the kernels want them: transposed, in the compute dtype, shared or one per matrix."""

    def __init__(self, u0: Tensor, v0: Tensor, batch):
        self.shapes = (u0.shape, v0.shape)
        self.shared = prod(u0.shape[:-2]) == 1 and prod(v0.shape[:-2]) == 1
        if not self.shared:
            u0, v0 = u0.expand(*batch, *u0.shape[-2:]), v0.expand(*batch, *v0.shape[-2:])
        self.rank = u0.shape[-1]
        self.u0, self.v0 = (f.mT.contiguous() for f in (u0, v0))

    def arguments(self):
        return [self._argument(self.u0), self._argument(self.v0)]

    def new_grads(self, wanted: bool) -> tuple[Tensor, Tensor]:
        if not wanted:
            return self.u0.new_empty((0,)), self.v0.new_empty((0,))
        return torch.empty_like(self.u0), torch.empty_like(self.v0)

    def grads(self, du0: Tensor, dv0: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        """The kernels' gradients in the shapes of u0 and v0, summed where those were broadcast."""
        if not wanted:
            return du0, dv0
        return self._grad(du0, self.shapes[0]), self._grad(dv0, self.shapes[1])

    def _grad(self, grad: Tensor, shape) -> Tensor:
        grad = grad.mT
        return (grad.reshape(shape) if self.shared else grad.sum_to_size(shape)).contiguous()

    def _argument(self, factor: Tensor) -> tuple[int, int, int]:
        return (*memory(factor), 0 if self.shared else factor.shape[-1] * factor.shape[-2])


def threads() -> int:
    return torch.get_num_threads()
