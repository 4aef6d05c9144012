"""Fused, differentiable matrix-factorisation operators for any PyTorch model.

Each operator family has one folder, and each folder is read in the same order: ``reference.py`` (plain
PyTorch, the definition), one file per backend (the kernel calls), ``autograd.py`` (the backward),
``functional.py`` (the public function). ``shared/registry.py`` holds the contract that every backend meets.
"""

from factorizer_kernels.choice import Backend, backends, use_backend
from factorizer_kernels.ops.nmf.functional import nmf, nmf_factors
from factorizer_kernels.ops.swin_nmf.functional import swin_nmf
from factorizer_kernels.ops.windows.functional import sw_dematricize, sw_matricize

__all__ = [
    "Backend",
    "backends",
    "nmf",
    "nmf_factors",
    "sw_dematricize",
    "sw_matricize",
    "swin_nmf",
    "use_backend",
]

__version__ = "0.1.0"
