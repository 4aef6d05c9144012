"""Layers: channels first, any batch, one to three spatial axes."""

from .block import FactorizerBlock, FactorizerStage
from .conv import ConvStage
from .depthwise import DepthwiseConv
from .factorization import NMF, MatrixFactorization, set_num_iters, set_rank
from .head import SubvoxelHead
from .linear import Linear
from .matricize import Matricize, SWMatricize
from .mixer import FactMixer
from .mlp import MLP
from .norm import LayerNorm
from .positional import PositionalEmbedding

__all__ = [
    "MLP",
    "NMF",
    "ConvStage",
    "DepthwiseConv",
    "FactMixer",
    "FactorizerBlock",
    "FactorizerStage",
    "LayerNorm",
    "Linear",
    "Matricize",
    "MatrixFactorization",
    "PositionalEmbedding",
    "SWMatricize",
    "SubvoxelHead",
    "set_num_iters",
    "set_rank",
]
