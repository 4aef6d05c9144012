"""Fused, differentiable matrix-factorisation operators for any PyTorch model.

``ops`` has one folder for each family of operators. Each folder is read in the same order: ``spec.py`` (the
contract that every backend meets), ``reference.py`` (plain PyTorch, the definition), the backends
(``cpu.py``, ``cuda.py``, ``triton``), ``autograd.py`` (the backward), ``functional.py`` (the public
function). ``choice.py`` chooses the backend of a call. ``shared`` is what all families are made with.
"""

from factorizer_kernels.choice import Backend, backends, use_backend
from factorizer_kernels.ops.depthwise.functional import depthwise_conv
from factorizer_kernels.ops.nmf.functional import nmf, nmf_factors
from factorizer_kernels.ops.pointwise.functional import (
    join,
    layer_norm,
    linear,
    linear_norm_mlp,
    norm_linear,
    patch_conv,
)
from factorizer_kernels.ops.swin_nmf.functional import norm_linear_swin_nmf, swin_nmf
from factorizer_kernels.ops.windows.functional import sw_dematricize, sw_matricize
from factorizer_kernels.shared.allocation import give_back_freed_memory, keep_freed_memory

__all__ = [
    "Backend",
    "backends",
    "depthwise_conv",
    "give_back_freed_memory",
    "join",
    "keep_freed_memory",
    "layer_norm",
    "linear",
    "linear_norm_mlp",
    "nmf",
    "nmf_factors",
    "norm_linear",
    "norm_linear_swin_nmf",
    "patch_conv",
    "sw_dematricize",
    "sw_matricize",
    "swin_nmf",
    "use_backend",
]

__version__ = "0.1.0"
