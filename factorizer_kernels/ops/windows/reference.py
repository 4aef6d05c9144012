"""Shifted-window matricisation in plain PyTorch: the definition, on any device, differentiable."""

import torch
from torch import Tensor

from factorizer_kernels.ops.windows.geometry import Windows, product
from factorizer_kernels.shared.registry import without_autocast


def sw_matricize(x: Tensor, windows: Windows) -> Tensor:
    """x (B, C, S1..Sp) -> (S·B·H, G1···Gp, head_dim, P1···Pp)."""
    with without_autocast(x):
        return torch.cat([_cut(_roll(x, windows.shift(s)), windows) for s in range(windows.num_shifts)])


def sw_dematricize(z: Tensor, size: tuple[int, ...], windows: Windows) -> Tensor:
    """The inverse: every copy is put together, rolled back, and the copies are averaged."""
    copies = z.tensor_split(windows.num_shifts)
    with without_autocast(z):
        volumes = [
            _roll(_join(copy, size, windows), tuple(-step for step in windows.shift(s)))
            for s, copy in enumerate(copies)
        ]
        return torch.stack(volumes).mean(0)


def _roll(x: Tensor, shift: tuple[int, ...]) -> Tensor:
    axes = [axis for axis, step in enumerate(shift) if step != 0]
    if not axes:
        return x
    # Over (B·C, S1..Sp): of (B, C, S1..Sp) in channels-last order torch's compiler takes the result to be
    # contiguous, while roll keeps the order, and a view in the backward graph fails.
    rows = x.flatten(0, 1).roll([shift[a] for a in axes], [a + 1 for a in axes])
    return rows.view(x.shape)


def _cut(x: Tensor, windows: Windows) -> Tensor:
    batch, channels, *spatial = x.shape
    p = len(spatial)
    heads = channels // windows.head_dim
    split = [n for s, patch in zip(spatial, windows.patch_size, strict=True) for n in (s // patch, patch)]
    # (B, H, D, G1, P1, G2, P2, ...) -> (B, H, G1, G2, ..., D, P1, P2, ...)
    grid_axes, patch_axes = range(3, 3 + 2 * p, 2), range(4, 4 + 2 * p, 2)
    cut = x.reshape(batch, heads, windows.head_dim, *split).permute(0, 1, *grid_axes, 2, *patch_axes)
    grid = product(split[::2])
    return cut.reshape(batch * heads, grid, windows.head_dim, product(windows.patch_size))


def _join(z: Tensor, size: tuple[int, ...], windows: Windows) -> Tensor:
    batch, channels, *spatial = size
    p = len(spatial)
    grid = [s // patch for s, patch in zip(spatial, windows.patch_size, strict=True)]
    heads = channels // windows.head_dim
    # (B, H, G1, .., Gp, D, P1, .., Pp) -> (B, H, D, G1, P1, ...)
    pairs = [axis for a in range(p) for axis in (2 + a, 3 + p + a)]
    cut = z.reshape(batch, heads, *grid, windows.head_dim, *windows.patch_size)
    return cut.permute(0, 1, 2 + p, *pairs).reshape(size)
