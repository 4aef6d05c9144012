"""Shifted-window matricisation in plain PyTorch: the definition, on any device, differentiable."""

import torch
from torch import Tensor

from factorizer_kernels.ops.windows.geometry import Windows, product
from factorizer_kernels.shared.dtypes import autocast_disabled


def sw_matricize(x: Tensor, windows: Windows) -> Tensor:
    """x (B, C, S1..Sp) -> (S·B·H, G1···Gp, head_dim, P1···Pp)."""
    with autocast_disabled(x):
        return torch.cat([_cut(_roll(x, windows.shift(s)), windows) for s in range(windows.num_shifts)])


def sw_dematricize(z: Tensor, windows: Windows) -> Tensor:
    """The inverse: the windows of every shift are put together and rolled back, and the maps are averaged."""
    with autocast_disabled(z):
        maps = [
            _roll(_join(part, windows), tuple(-step for step in windows.shift(s)))
            for s, part in enumerate(z.tensor_split(windows.num_shifts))
        ]
        return torch.stack(maps).mean(0)


def _roll(x: Tensor, shift: tuple[int, ...]) -> Tensor:
    axes = [axis for axis, step in enumerate(shift) if step != 0]
    if not axes:
        return x
    # Over (B·C, S1..Sp): of (B, C, S1..Sp) in channels-last order torch's compiler takes the result to be
    # contiguous, while roll keeps the order, and a view in the backward graph fails.
    rows = x.flatten(0, 1).roll([shift[a] for a in axes], [a + 1 for a in axes])
    return rows.view(x.shape)


def _cut(x: Tensor, windows: Windows) -> Tensor:
    batch, p = windows.size[0], len(windows.grid)
    split = [n for pair in zip(windows.grid, windows.patch_size, strict=True) for n in pair]
    # (B, H, D, G1, P1, G2, P2, ...) -> (B, H, G1, G2, ..., D, P1, P2, ...)
    grid_axes, patch_axes = range(3, 3 + 2 * p, 2), range(4, 4 + 2 * p, 2)
    cut = x.reshape(batch, windows.heads, windows.rows, *split).permute(0, 1, *grid_axes, 2, *patch_axes)
    return cut.reshape(batch * windows.heads, product(windows.grid), windows.rows, windows.columns)


def _join(z: Tensor, windows: Windows) -> Tensor:
    batch, p = windows.size[0], len(windows.grid)
    # (B, H, G1, .., Gp, D, P1, .., Pp) -> (B, H, D, G1, P1, ...)
    pairs = [axis for a in range(p) for axis in (2 + a, 3 + p + a)]
    cut = z.reshape(batch, windows.heads, *windows.grid, windows.rows, *windows.patch_size)
    return cut.permute(0, 1, 2 + p, *pairs).reshape(windows.size)
