"""Shifted-window NMF in plain PyTorch: the definition, act -> sw_matricize -> nmf -> sw_dematricize."""

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf import reference as nmf_reference
from factorizer_kernels.ops.windows import reference as windows_reference
from factorizer_kernels.ops.windows.geometry import Windows


def swin_nmf(
    x: Tensor,
    u0: Tensor,
    v0: Tensor,
    windows: Windows,
    relu: bool,
    num_iters: int,
    solver: str,
    grad_steps: int,
    eps: float,
) -> Tensor:
    """x (B, C, S1..Sp) -> the same shape: the mean over the shifts of every window's low-rank NMF."""
    z = windows_reference.sw_matricize(torch.relu(x) if relu else x, windows)
    z = nmf_reference.nmf(z, u0, v0, num_iters, solver, grad_steps, eps)
    return windows_reference.sw_dematricize(z, tuple(x.shape), windows)
