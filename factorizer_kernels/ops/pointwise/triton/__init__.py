"""Triton kernels of the pointwise operators.

Read tiles, norm, norm_linear, linear_norm_mlp, blocks. They are registered where they are defined.
"""

from factorizer_kernels.ops.pointwise.triton import blocks, linear_norm_mlp, norm_linear

__all__ = ["blocks", "linear_norm_mlp", "norm_linear"]
