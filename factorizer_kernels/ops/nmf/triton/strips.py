"""How long matrices are cut for passes over them: each into strips, each strip into blocks of columns."""

from torch import Tensor

from factorizer_kernels.ops.nmf.triton.problem import Problem
from factorizer_kernels.shared.launches import cdiv, padded

# Elements of one block, and strips of one matrix: enough to fill a device, few enough to add up.
BLOCK_ELEMENTS = 4096
MAX_STRIPS = 512


class Strips:
    """The strips of all the matrices of x.

    Attributes:
        map_windows, windows: the matrices of one shift, and of all the shifts.
        block: columns of one block.
        strips, strip_blocks: strips of one matrix, and blocks of one strip.
        map_arguments: what every kernel that passes over the map takes first.
    """

    def __init__(self, problem: Problem, x: Tensor) -> None:
        self.map_windows = problem.map_windows(x)
        self.windows = problem.num_shifts * self.map_windows
        self.block = BLOCK_ELEMENTS // padded(problem.rows)
        blocks = cdiv(problem.columns, self.block)
        self.strip_blocks = cdiv(blocks, MAX_STRIPS)
        self.strips = cdiv(blocks, self.strip_blocks)
        self.map_arguments = (x, x.stride(), tuple(x.shape[2:]), x.shape[1] // problem.rows, self.map_windows)
