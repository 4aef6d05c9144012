"""Shifted-window NMF in plain PyTorch: the definition, act -> sw_matricize -> nmf -> sw_dematricize."""

import torch
from torch import Tensor

from factorizer_kernels.ops.nmf.arguments import Options
from factorizer_kernels.ops.nmf.reference import nmf
from factorizer_kernels.ops.windows.geometry import Windows
from factorizer_kernels.ops.windows.reference import sw_dematricize, sw_matricize


def swin_nmf(x: Tensor, u0: Tensor, v0: Tensor, windows: Windows, relu: bool, options: Options) -> Tensor:
    """x (B, C, S1..Sp) -> the same shape: the mean over the shifts of every window's low-rank NMF."""
    z = sw_matricize(torch.relu(x) if relu else x, windows)
    return sw_dematricize(nmf(z, u0, v0, options), windows)
