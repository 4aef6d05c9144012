"""Shifted-window NMF on the C++ kernels."""

from factorizer_kernels.ops.nmf.cpu import CpuProblem
from factorizer_kernels.ops.swin_nmf.native import register

register("cpu", CpuProblem, takes_out=True)
