"""The Triton kernels of NMF. Read problem, updates, rank1, resident, resident_rank1,
strips, streaming, streaming_rank1, sweep, operators.

``updates`` (any rank up to 8) and ``rank1`` (the rank-1 identity) are the arithmetic of one step,
forward and backward. ``resident`` and ``resident_rank1`` run all the iterations of one window in one program.
``streaming`` and ``streaming_rank1`` pass over matrices that do not fit on chip, in ``strips``. ``sweep``
updates factors of any rank around torch's matrix products. ``operators`` chooses among them.
"""

from factorizer_kernels.ops.nmf.triton import operators

__all__ = ["operators"]
