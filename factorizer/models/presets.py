"""The networks of the paper and of its authors' challenge entry, by name."""

from __future__ import annotations

from typing import Any

from ..layers import Matricize, SWMatricize
from .factorizer import Factorizer

_BRATS = {"in_channels": 4, "out_channels": 3, "spatial_size": (128, 128, 128)}

#: Arguments of `Factorizer`. BraTS: four MRI contrasts in, three nested tumour regions out.
#: ISLES'22: two contrasts in, one lesion mask out.
PRESETS: dict[str, dict[str, Any]] = {
    "global-brats": {**_BRATS, "reshape": (Matricize, {"head_dim": 8, "grid_size": 1})},
    "local-brats": {**_BRATS, "reshape": (Matricize, {"head_dim": 8, "patch_size": 8})},
    "swin-brats": {**_BRATS, "reshape": (SWMatricize, {"head_dim": 8, "patch_size": 8})},
    "swin-isles22": {
        "in_channels": 2,
        "out_channels": 1,
        "spatial_size": (64, 64, 64),
        "reshape": (SWMatricize, {"head_dim": 8, "patch_size": 4, "shifts": [None, 1, 2, 3]}),
        "mlp_ratio": 4,
    },
}


def preset(name: str, **overrides: Any) -> Factorizer:
    """A network of `PRESETS`, freshly initialised.

    Args:
        name: one of the keys of `PRESETS`.
        overrides: arguments of `Factorizer` in place of, or besides, those of the preset.

    Raises:
        TypeError, ValueError: there is no such preset; or see `Factorizer`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    return Factorizer(**{**PRESETS[name], **overrides})
