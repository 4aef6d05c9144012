"""Matrix factorisation: where it starts, how it is updated, and the layer."""

from .nmf import NMF, MatrixFactorization, set_num_iters, set_rank
from .solvers import SOLVERS, Solver

__all__ = ["NMF", "SOLVERS", "MatrixFactorization", "Solver", "set_num_iters", "set_rank"]
