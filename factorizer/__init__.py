"""The Factorizer family of segmentation networks, and the layers they are made of.

The names below are imported at their first use: `import factorizer` alone loads no torch, so that
the command line answers at once.
"""

import getpass
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .layers import (
        MLP,
        NMF,
        DepthwiseConv,
        FactMixer,
        FactorizerBlock,
        FactorizerStage,
        LayerNorm,
        Linear,
        Matricize,
        MatrixFactorization,
        PositionalEmbedding,
        SubvoxelHead,
        SWMatricize,
        set_num_iters,
        set_rank,
    )
    from .models import PRESETS, Factorizer, UNet, preset
    from .segmentation.in_memory import segment

__all__ = [
    "MLP",
    "NMF",
    "PRESETS",
    "DepthwiseConv",
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
    "SubvoxelHead",
    "UNet",
    "preset",
    "segment",
    "set_num_iters",
    "set_rank",
]


# MONAI asks for the user's name when it is imported, and fails where the user id has none, as in containers.
try:
    getpass.getuser()
except (ImportError, KeyError, OSError):  # Windows without USERNAME; before Python 3.13; since
    os.environ["USER"] = "unknown"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".models" if name in ("PRESETS", "Factorizer", "UNet", "preset") else ".layers"
    if name == "segment":
        home = ".segmentation.in_memory"
    try:
        value = globals()[name] = getattr(import_module(home, __name__), name)
    except ModuleNotFoundError as error:
        if name != "segment" or (error.name or "").startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"factorizer.segment needs {error.name}: pip install 'factorizer-kernels[seg]'", name=error.name
        ) from error
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
