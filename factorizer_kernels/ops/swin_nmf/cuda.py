"""Shifted-window NMF on the CUDA kernels."""

from factorizer_kernels.ops.nmf.cuda import CudaProblem, limit
from factorizer_kernels.ops.swin_nmf.native import register

register("cuda", CudaProblem, limit)
