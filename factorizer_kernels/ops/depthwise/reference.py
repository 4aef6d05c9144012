"""Depthwise convolution in plain PyTorch: the definition, on any device, differentiable to any order."""

import torch.nn.functional as F
from torch import Tensor

from factorizer_kernels.shared.dtypes import autocast_disabled


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (B, C, S1..Sp), weight (C, k1..kp) and bias (C) or None -> (B, C, S1..Sp), in x's dtype."""
    with autocast_disabled(x):
        if x.numel() == 0:  # torch's convolution takes no map without channels or voxels
            scale = weight.flatten(1).sum(1)
            y = x * scale.view(-1, *(1,) * (x.dim() - 2))
            y = y if bias is None else y + bias.view_as(scale).view(-1, *(1,) * (x.dim() - 2))
        else:
            convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
            padding = [k // 2 for k in weight.shape[1:]]
            y = convolve(x.to(weight.dtype), weight.unsqueeze(1), bias, padding=padding, groups=x.shape[1])
    return y.to(x.dtype)
