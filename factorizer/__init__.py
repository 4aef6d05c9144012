"""The Factorizer family of segmentation networks, and the layers they are made of."""

from .layers import (
    MLP,
    NMF,
    FactMixer,
    FactorizerBlock,
    FactorizerStage,
    LayerNorm,
    Linear,
    Matricize,
    MatrixFactorization,
    PositionalEmbedding,
    SWMatricize,
    set_num_iters,
)
from .models import PRESETS, Factorizer, UNet, preset

__all__ = [
    "MLP",
    "NMF",
    "PRESETS",
    "FactMixer",
    "Factorizer",
    "FactorizerBlock",
    "FactorizerStage",
    "LayerNorm",
    "Linear",
    "Matricize",
    "MatrixFactorization",
    "PositionalEmbedding",
    "SWMatricize",
    "UNet",
    "preset",
    "set_num_iters",
]
